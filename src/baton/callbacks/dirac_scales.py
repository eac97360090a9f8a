"""How important is the identity? The scales a and b of Dirac layers over training, figure 5.6 of Zagoruyko's thesis."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from baton.layers.dirac import DiracConv2d, scale_names
from baton.task import Task

#: Colours of the groups of layers, as matplotlib's maps from light (first layer) to dark (last).
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")
_TITLES = {"a": "mean a (identity)", "b": "mean b (normalised filter)"}


class Row(NamedTuple):
    """What is recorded of one layer in one epoch; None for a term that the layer does not have."""

    epoch: int
    layer: str
    a: float | None
    b: float | None


class DiracScales(Callback):
    """Record the mean a and mean b of every `DiracConv2d` of the backbone, and draw them at the end of training.

    Zagoruyko's thesis, section 5.3.3, "Analysis of scaling coefficients" and figure 5.6 (DiracNet-34 on CIFAR-10).
    `dirac_scales.csv` has a line for each recorded epoch (0 is before training) and layer; `dirac_scales.png` draws a
    line for each layer, darker for deeper ones of a group. Their means over all layers are recorded as metrics,
    `dirac/a_mean` and `dirac/b_mean`; those of each layer are not, as they would be two columns a layer in metrics.csv.
    A resumed run continues the record.

    Args:
        every_n_epochs: how often; the last epoch always counts.
        folder: where the files go; the command sets it to the run's `pictures/`.
    """

    def __init__(self, every_n_epochs: int = 1, folder: str | None = None) -> None:
        self.every_n_epochs, self.folder = every_n_epochs, folder
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Put what was recorded into checkpoints."""
        return {"rows": [list(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self.rows = [Row(*row) for row in state_dict["rows"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the initial scales; warn where there are none."""
        if not _layers(pl_module):
            rank_zero_warn(
                "The network has no Dirac layers with scales, so that DiracScales records nothing: leave it out."
            )
        if not self.rows:
            self._record(0, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scales where they are due."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs and epoch != trainer.max_epochs:
            return
        self._record(epoch, pl_module)
        if isinstance(pl_module, Task):
            for term in _TITLES:
                means = [getattr(row, term) for row in self.rows if row.epoch == epoch]
                means = [mean for mean in means if mean is not None]
                if means:
                    pl_module.record({f"dirac/{term}_mean": statistics.fmean(means)})
        if trainer.is_global_zero and self.folder is not None and self.rows:
            self._write(Path(self.folder) / "dirac_scales.csv")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was recorded."""
        if not trainer.is_global_zero or not self.rows:
            return
        figure = draw(self.rows)
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            figure.savefig(Path(self.folder) / "dirac_scales.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                figure.canvas.draw()
                picture = np.asarray(figure.canvas.buffer_rgba())
                logger.log_image("pictures/dirac_scales", [picture], step=trainer.global_step)

    def _record(self, epoch: int, module: LightningModule) -> None:
        layers = _layers(module)
        scales = [scale for _, layer in layers for scale in (layer.a, layer.b) if scale is not None]
        means = [scale.detach().float().mean() for scale in scales]
        values = iter(torch.stack(means).tolist() if means else [])  # one synchronisation with the device
        for name, layer in layers:
            a, b = (None if scale is None else next(values) for scale in (layer.a, layer.b))
            self.rows.append(Row(epoch, name, a, b))

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("epoch", "layer", "a_mean", "b_mean"), *self.rows])


def draw(rows: Sequence[Row]) -> Any:
    """Draw a panel for a and one for b, a line for each layer over the epochs.

    Args:
        rows: in order; layers of the same first name are a group and share a hue.

    Returns:
        A matplotlib figure.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    terms = [term for term in _TITLES if any(getattr(row, term) is not None for row in rows)]
    groups: dict[str, list[str]] = {}
    for layer in dict.fromkeys(row.layer for row in rows):
        groups.setdefault(layer.partition(".")[0], []).append(layer)
    figure = Figure(figsize=(1.8 + 4.2 * len(terms), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        for number, (group, layers) in enumerate(groups.items()):
            hue = matplotlib.colormaps[_HUES[number % len(_HUES)]]
            for depth, layer in enumerate(layers, start=1):
                epochs, means = zip(
                    *((row.epoch, getattr(row, term)) for row in rows if row.layer == layer), strict=True
                )
                label = group if depth == len(layers) else None
                axis.plot(epochs, means, color=hue(0.3 + 0.65 * depth / len(layers)), linewidth=1.2, label=label)
        axis.set(xlabel="epoch", title=_TITLES[term])
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    legend = axis.get_legend_handles_labels()
    figure.legend(
        *legend, loc="outside right upper", frameon=False, fontsize=8, title="darker: deeper", title_fontsize=8
    )
    return figure


def _layers(module: Any) -> list[tuple[str, DiracConv2d]]:
    """Dirac layers with scales of a task's backbone (or of another module), in order."""
    layers = getattr(module, "backbone", module).named_modules()
    return [(name, layer) for name, layer in layers if isinstance(layer, DiracConv2d) and scale_names(layer)]
