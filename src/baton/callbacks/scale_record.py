"""Scales of the layers of one kind over training: recorded, written as CSV, and drawn."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from baton.callbacks.drawing import Drawing
from baton.task import Task

#: Colours of the groups of layers, as matplotlib's maps from light (first layer) to dark (last).
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")


class ScaleRecord(Drawing):
    """Base: record a row of numbers for every layer of a kind after each epoch, and draw them at the end of training.

    `NAME.csv` has a line for each recorded epoch (0 is before training) and layer, and `NAME.png` is what `draw` makes
    of them. A resumed run continues the record. Nothing that is trained is touched.

    Args:
        every_n_epochs: how often; the last epoch always counts.
        folder: where the files go; the command sets it to the run's `pictures/`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]  # of layers, as a message calls them
    row: ClassVar[Any]  # a NamedTuple that begins with epoch and layer
    header: ClassVar[tuple[str, ...]]

    def __init__(self, every_n_epochs: int = 1, folder: str | None = None) -> None:
        super().__init__(folder)
        self.every_n_epochs = every_n_epochs
        self.rows: list[Any] = []
        self._begun = False

    @abstractmethod
    def layers(self, network: nn.Module) -> Sequence[Any]:
        """The layers that are recorded."""

    @abstractmethod
    def measure(self, epoch: int, network: nn.Module) -> list[Any]:
        """Rows of all layers after an epoch."""

    @abstractmethod
    def metrics(self, rows: Sequence[Any]) -> dict[str, float]:
        """The few numbers of an epoch's rows that are recorded as metrics."""

    @abstractmethod
    def draw(self) -> Any:
        """A matplotlib figure of all rows."""

    def details(self, rows: Sequence[Any]) -> dict[str, float]:
        """Numbers for Weights & Biases alone, as they would be too many columns in metrics.csv: none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Put what was recorded into checkpoints."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self.rows = [self.row(*row) for row in state_dict["rows"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where there is nothing to record."""
        self._begun = bool(self.rows)
        if not self.layers(_network(pl_module)):
            name = type(self).__name__
            rank_zero_warn(f"The network has no {self.kind}, so that {name} records nothing: leave it out.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the initial scales."""
        if not self._begun:
            self._begun = True
            self.rows += self.measure(0, _network(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scales where they are due."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        rows = self.measure(epoch, _network(pl_module))
        self.rows += rows
        if rows and isinstance(pl_module, Task):
            pl_module.record(self.metrics(rows))
        if trainer.is_global_zero and self.rows:
            self.write_csv(self.name, self.header, self.rows)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger) and self.details(rows):
                    logger.log_metrics(self.details(rows), step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was recorded."""
        if trainer.is_global_zero and self.rows:
            self.show(trainer, self.name, self.draw())


def plot_layers(axis: Any, rows: Sequence[Any], value: Callable[[Any], float | None]) -> None:
    """Plot a line for each layer over the epochs, darker for deeper ones of a group.

    Args:
        axis: of matplotlib's.
        rows: in order; layers of the same first name are a group and share a hue.
        value: what is plotted of a row; None leaves a gap.
    """
    import matplotlib

    groups: dict[str, list[str]] = {}
    for layer in dict.fromkeys(row.layer for row in rows):
        groups.setdefault(layer.partition(".")[0], []).append(layer)
    for number, (group, layers) in enumerate(groups.items()):
        hue = matplotlib.colormaps[_HUES[number % len(_HUES)]]
        for depth, layer in enumerate(layers, start=1):
            epochs, values = zip(*((row.epoch, value(row)) for row in rows if row.layer == layer), strict=True)
            label = group if depth == len(layers) else None
            axis.plot(epochs, values, color=hue(0.3 + 0.65 * depth / len(layers)), linewidth=1.2, label=label)
    axis.set_xlabel("epoch")
    tidy(axis)


def tidy(axis: Any) -> None:
    """Take away from an axis what is no data; its numbers along x are whole."""
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Any, axis: Any) -> None:
    """Say which colour is which group of layers.

    Args:
        figure: gets the legend, outside.
        axis: whose lines `plot_layers` drew.
    """
    handles = axis.get_legend_handles_labels()
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
    figure.legend(*handles, loc="outside right upper", title="darker: deeper", **style)


def _network(module: Any) -> nn.Module:
    """A task's backbone, or another module itself."""
    return getattr(module, "backbone", module)
