"""How long training takes, as a metric, so that tables can show it beside the error."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from baton.task import Task


class TrainingTime(Timer):
    """Record the minutes of wall time that training has taken as `train/minutes` at the end of every epoch.

    Validation, callbacks and checkpoints within the epochs count; starting the run and testing it do not. A resumed run
    goes on counting from its checkpoint: steps that were lost and done again count once. What else the machine does at
    the same time makes it longer, so compare runs that had the same machine for themselves.
    """

    def __init__(self) -> None:
        super().__init__()

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Record the time so far."""
        if isinstance(trainer.lightning_module, Task):
            trainer.lightning_module.record({"train/minutes": self.time_elapsed() / 60})
