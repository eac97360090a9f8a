"""Writes what a task wants to show, to disk and to the loggers."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torchvision.utils import save_image

from baton.random_state import fixed_randomness
from baton.task import Task


class Pictures(Callback):
    """Draw `Task.pictures` from the first validation batch (or, without a validation split, the first training batch).

    Args:
        every_n_epochs: how often.
        folder: where the PNGs go; the command sets it to the run's `pictures/`.
    """

    def __init__(self, every_n_epochs: int = 1, folder: str | None = None) -> None:
        self.every_n_epochs, self.folder = every_n_epochs, folder
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a training batch where nothing better will come."""
        if batch_idx == 0 and not trainer.val_dataloaders and self._due(trainer):
            self._batch = batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the kept training batch."""
        if self._batch is not None:
            self._draw(trainer, pl_module, self._batch)
            self._batch = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first validation batch."""
        if batch_idx == 0 and trainer.training is False and trainer.state.fn == "fit" and self._due(trainer):
            self._draw(trainer, pl_module, batch)

    def _due(self, trainer: Trainer) -> bool:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        return last or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _draw(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, Task):
            return
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad(), fixed_randomness(0):
            pictures = pl_module.pictures(batch)
        pl_module.train(training)
        for name, picture in pictures.items():
            if self.folder is not None:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
                save_image(picture, Path(self.folder) / f"{name}_epoch_{trainer.current_epoch + 1:04d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    image = picture.clamp(0, 1).mul(255).byte().permute(1, 2, 0).cpu().numpy()
                    logger.log_image(f"pictures/{name}", [image], step=trainer.global_step)
