"""How large do filters become? Those of N-Jet layers before and after training, figure 12."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from baton.callbacks.drawing import Drawing, new_figure
from baton.layers.njet import NJetConv2d, njet_layers

_INCHES = 0.5  # of the largest filter


class Filters(NamedTuple):
    """The first filters of a layer.

    Attributes:
        values: (n, channels, height, width), the three channels of images or one.
        sigma: mean scale in pixels; None for plain convolutions.
    """

    values: Tensor
    sigma: float | None


class NJetFilters(Drawing):
    """Draw filters of N-Jet layers before and after training, in their true relative sizes, to `njet_filters.png`.

    Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412),
    figure 12. Each filter has its own scale of colours, from blue (negative) over white (zero) to red; those of images
    are shown in colour, with grey for zero, all others by their first input channel. A network without N-Jet layers
    shows its plain spatial convolutions.

    Args:
        count: how many filters of a layer, the first ones.
        most_layers: of more layers than that, so many are shown, evenly spread from the first to the last.
        folder: where the picture goes; the command sets it to the run's `pictures/`.
    """

    def __init__(self, count: int = 8, most_layers: int = 8, folder: str | None = None) -> None:
        super().__init__(folder)
        if count < 1 or most_layers < 1:
            raise ValueError(f"Expected count and most_layers of 1 or more, but got {count} and {most_layers}.")
        self.count, self.most_layers = count, most_layers
        self.before: dict[str, Filters] = {}

    def state_dict(self) -> dict[str, Any]:
        """Put the filters of the start into checkpoints."""
        return {"before": {name: list(filters) for name, filters in self.before.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the filters of the start."""
        self.before = {name: Filters(*filters) for name, filters in state_dict["before"].items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the filters as they are; warn where there are none."""
        self.before = self.before or self._take(pl_module)
        if not self.before:
            rank_zero_warn("The network has no spatial convolutions, so that NJetFilters draws nothing: leave it out.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if trainer.is_global_zero and self.before:
            self.show(trainer, "njet_filters", draw(self.before, self._take(pl_module)))

    def _take(self, module: Any) -> dict[str, Filters]:
        return first_filters(getattr(module, "backbone", module), self.count, self.most_layers)


@torch.no_grad()
def first_filters(network: nn.Module, count: int, most_layers: int) -> dict[str, Filters]:
    """Filters of a network's N-Jet layers by name, or, without such, of its plain spatial convolutions.

    Args:
        network: any.
        count: how many of a layer.
        most_layers: how many layers at most, evenly spread.
    """
    layers: list[tuple[str, Any]] = list(njet_layers(network)) or [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
    ]
    if len(layers) > most_layers:
        places = torch.linspace(0, len(layers) - 1, most_layers).round().int().tolist()
        layers = [layers[place] for place in places]
    found = {}
    for name, layer in layers:
        jet = isinstance(layer, NJetConv2d)
        values = (layer.filters() if jet else layer.weight)[:count].float().cpu()
        values = (values if values.shape[1] == 3 else values[:, :1]).clone()
        found[name] = Filters(values, layer.sigma.mean().item() if jet else None)
    return found


def draw(before: Mapping[str, Filters], after: Mapping[str, Filters]) -> Any:
    """Draw a row for each layer: filters before on the left, and after on the right.

    Args:
        before: filters by the names of their layers.
        after: those of the same layers.

    Returns:
        A matplotlib figure.
    """
    everything = [*before.values(), *after.values()]
    cell = 1 + max(max(filters.values.shape[2:]) for filters in everything)
    count = max(len(filters.values) for filters in everything)
    figure = new_figure(2 * count * _INCHES + 1.0, len(before) * (_INCHES + 0.4) + 0.4)
    axes = figure.subplots(len(before), 2, squeeze=False)
    for (name, start), (left, right) in zip(before.items(), axes, strict=True):
        for axis, when, filters in ((left, "before", start), (right, "after", after[name])):
            axis.imshow(in_a_row(filters.values, cell).numpy(), interpolation="nearest")
            axis.set(xlim=(-0.5, count * cell - 0.5), xticks=[], yticks=[])  # one pixel is as large everywhere
            axis.spines[:].set_visible(False)
            height, width = filters.values.shape[2:]
            scale = "" if filters.sigma is None else f"σ = {filters.sigma:.2f}, "
            axis.set_title(f"{name} {when}: {scale}{height} × {width}", fontsize=8)
    return figure


def in_a_row(filters: Float[Tensor, "n channels height width"], cell: int) -> Float[Tensor, "cell length 4"]:
    """Put filters side by side, each in the middle of a square, as colours with opacity 0 where no filter is.

    Args:
        filters: of one or three channels.
        cell: side of a square, in pixels.
    """
    from matplotlib import colormaps

    count, channels, height, width = filters.shape
    row = torch.zeros(cell, count * cell, 4)
    largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    shades = (0.5 + 0.5 * filters / largest).permute(0, 2, 3, 1)
    for index, shade in enumerate(shades):
        top, left = (cell - height) // 2, index * cell + (cell - width) // 2
        place = row[top : top + height, left : left + width]
        place[..., 3] = 1
        place[..., :3] = (
            shade if channels == 3 else torch.from_numpy(colormaps["RdBu_r"](shade[..., 0].numpy()))[..., :3]
        )
    return row
