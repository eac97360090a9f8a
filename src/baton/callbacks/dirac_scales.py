"""How important is the identity? The scales a and b of Dirac layers over training, figure 5.6 of Zagoruyko's thesis."""

import statistics
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from baton.callbacks.drawing import new_figure
from baton.callbacks.scale_record import ScaleRecord, add_legend, plot_layers
from baton.layers.dirac import DiracConv2d, scale_names

_TITLES = {"a": "mean a (identity)", "b": "mean b (normalised filter)"}


class Row(NamedTuple):
    """What is recorded of one layer in one epoch; None for a term that the layer does not have."""

    epoch: int
    layer: str
    a: float | None
    b: float | None


class DiracScales(ScaleRecord):
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

    name = "dirac_scales"
    kind = "Dirac layers with scales"
    row = Row
    header = ("epoch", "layer", "a_mean", "b_mean")

    def layers(self, network: nn.Module) -> list[tuple[str, DiracConv2d]]:
        """Dirac layers with scales, with their names, in order."""
        named = network.named_modules()
        return [(name, layer) for name, layer in named if isinstance(layer, DiracConv2d) and scale_names(layer)]

    def measure(self, epoch: int, network: nn.Module) -> list[Row]:
        """Mean scales of every layer."""
        layers = self.layers(network)
        scales = [scale for _, layer in layers for scale in (layer.a, layer.b) if scale is not None]
        means = [scale.detach().float().mean() for scale in scales]
        values = iter(torch.stack(means).tolist() if means else [])  # one synchronisation with the device
        rows = []
        for name, layer in layers:
            a, b = (None if scale is None else next(values) for scale in (layer.a, layer.b))
            rows.append(Row(epoch, name, a, b))
        return rows

    def metrics(self, rows: Sequence[Row]) -> dict[str, float]:
        """Means over all layers."""
        values = {}
        for term in _TITLES:
            means = [mean for mean in map(attrgetter(term), rows) if mean is not None]
            if means:
                values[f"dirac/{term}_mean"] = statistics.fmean(means)
        return values

    def draw(self) -> Any:
        """Draw what was recorded."""
        return draw(self.rows)


def draw(rows: Sequence[Row]) -> Any:
    """Draw a panel for a and one for b, a line for each layer over the epochs.

    Args:
        rows: in order; layers of the same first name are a group and share a hue.

    Returns:
        A matplotlib figure.
    """
    terms = [term for term in _TITLES if any(getattr(row, term) is not None for row in rows)]
    figure = new_figure(1.8 + 4.2 * len(terms), 3.6)
    for axis, term in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms, strict=True):
        plot_layers(axis, rows, attrgetter(term))
        axis.set_title(_TITLES[term])
    add_legend(figure, axis)
    return figure
