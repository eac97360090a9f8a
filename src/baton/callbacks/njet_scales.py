"""Which resolution does a network learn? Scales and map sizes of N-Jet layers over training, figures 5, 7 and 8."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from baton.backbones import create_backbone
from baton.callbacks.drawing import new_figure
from baton.callbacks.scale_record import ScaleRecord, add_legend, plot_layers, tidy
from baton.layers.gaussian_jet import half_sizes
from baton.layers.njet import NJetConv2d, njet_layers
from baton.layers.subsampling import SubsampledNJet
from baton.random_state import fixed_randomness

Sides = tuple[int, int]


class Row(NamedTuple):
    """What is recorded of one layer in one epoch: scales and sides in pixels; no map where nothing enters the layer."""

    epoch: int
    layer: str
    sigma_min: float
    sigma_mean: float
    sigma_max: float
    filter_side: int
    map_height: int | None
    map_width: int | None


class NJetScales(ScaleRecord):
    """Record scale, filter side and map of every `NJetConv2d` of the backbone, and draw them at the end of training.

    Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412):
    the learned σ of figure 5, and the learned sizes of maps beside those of the plain network, figures 7 and 8.

    `njet_scales.csv` has a line for each recorded epoch (0 is before training) and layer: smallest, mean and largest σ
    of its groups, the side of its largest filter, and the sides of the map that leaves it after safe subsampling. Maps
    are those of a whole image of the training batches' size, which a copy of the network looks at. `njet_scales.png`
    draws σ and the maps over the epochs, and the maps from layer to layer. The mean of all σ is recorded as a metric,
    `njet/sigma_mean`; those of the layers go to Weights & Biases alone, `njet/sigma/LAYER`, as they would be a column a
    layer in metrics.csv. A resumed run continues the record.

    Args:
        every_n_epochs: how often; the last epoch always counts.
        folder: where the files go; the command sets it to the run's `pictures/`.
        plain: name of the backbone whose maps are drawn for comparison, such as `njet_nin_plain`: those that leave its
            spatial convolutions, before a pooling.
        plain_kwargs: its further arguments.
    """

    name = "njet_scales"
    kind = "N-Jet layers"
    row = Row
    header = Row._fields

    def __init__(
        self,
        every_n_epochs: int = 1,
        folder: str | None = None,
        plain: str | None = None,
        plain_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(every_n_epochs, folder)
        self.plain, self.plain_kwargs = plain, plain_kwargs
        self._size: Sides | None = None  # of the training images

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See how large images are, and record the initial scales."""
        if batch_idx == 0 or self._size is None:
            images = next((part for part in batch if isinstance(part, Tensor) and part.ndim == 4), None)
            self._size = None if images is None else (images.shape[2], images.shape[3])
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def layers(self, network: nn.Module) -> list[tuple[str, NJetConv2d]]:
        """N-Jet layers with their names, in order."""
        return njet_layers(network)

    def measure(self, epoch: int, network: nn.Module) -> list[Row]:
        """Scales and sides of every layer."""
        layers = self.layers(network)
        if not layers:
            return []
        # one synchronisation with the device
        joined = torch.cat([layer.sigma.detach().double() for _, layer in layers]).cpu()
        sides = {} if self._size is None else map_sides(network, _njet_outputs(network), self._size)
        rows = []
        for (name, layer), sigma in zip(layers, joined.split([layer.sigma_groups for _, layer in layers]), strict=True):
            half = half_sizes(sigma, layer.extent, layer.size_rule).max()
            scales = sigma.min().item(), sigma.mean().item(), sigma.max().item()
            rows.append(Row(epoch, name, *scales, 2 * int(half) + 1, *sides.get(name, (None, None))))
        return rows

    def metrics(self, rows: Sequence[Row]) -> dict[str, float]:
        """The mean scale of all layers."""
        return {"njet/sigma_mean": statistics.fmean(row.sigma_mean for row in rows)}

    def details(self, rows: Sequence[Row]) -> dict[str, float]:
        """The mean scale of each layer."""
        return {f"njet/sigma/{row.layer}": row.sigma_mean for row in rows}

    def draw(self) -> Any:
        """Draw what was recorded."""
        return draw(self.rows, self._plain_sides())

    def _plain_sides(self) -> list[Sides]:
        """Sides of the maps that leave the plain network's spatial convolutions, in the order of computation."""
        if self.plain is None or self._size is None:
            return []
        with fixed_randomness(0):
            network = create_backbone(self.plain, **{"num_classes": 0, **(self.plain_kwargs or {})})
        spatial = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
        }
        return list(map_sides(network, spatial, self._size).values())


def map_sides(network: Any, modules: Mapping[str, nn.Module], size: Sides) -> dict[str, Sides]:
    """Height and width of the maps that modules return, for one image, in the order of computation.

    A copy of the network computes them, in evaluation mode, so that nothing changes in the original.

    Args:
        network: a timm model.
        modules: of it, by what they are called in the result.
        size: height and width of the image.
    """
    copies: dict[int, Any] = {}
    probe = copy.deepcopy(network, copies).eval()
    for name in [name for name, value in vars(probe).items() if hasattr(value, "_torchdynamo_orig_callable")]:
        delattr(probe, name)  # compiled methods belong to the original
    for module in probe.modules():
        module._forward_hooks.clear()  # as do those who listen to it
    sides: dict[str, Sides] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            sides[name] = output.shape[2], output.shape[3]

        return hook

    for name, module in modules.items():
        copies[id(module)].register_forward_hook(note(name))
    weight = next(probe.parameters())
    image = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
    with torch.no_grad(), fixed_randomness(0):
        probe.forward_features(image)
    return sides


def draw(rows: Sequence[Row], plain: Sequence[Sides] = ()) -> Any:
    """Draw σ over the epochs, and where maps were seen, their sides over the epochs and from layer to layer.

    Args:
        rows: in order; layers of the same first name are a group and share a hue.
        plain: maps of a plain network, for comparison.

    Returns:
        A matplotlib figure.
    """
    seen = any(row.map_height for row in rows)
    figure = new_figure(1.8 + 4.2 * (3 if seen else 1), 3.6)
    axes = figure.subplots(1, 3 if seen else 1, squeeze=False)[0]
    plot_layers(axes[0], rows, lambda row: row.sigma_mean)
    axes[0].set_title("σ in pixels")
    if seen:
        plot_layers(axes[1], rows, _side)
        axes[1].set_title("side of the map in pixels")
        _draw_depth(axes[2], rows, plain)
    add_legend(figure, axes[0])
    return figure


def _draw_depth(axis: Any, rows: Sequence[Row], plain: Sequence[Sides]) -> None:
    first, last = rows[0].epoch, rows[-1].epoch
    for epoch, colour in ((first, "0.7"), (last, "C0")):
        sides = [_side(row) for row in rows if row.epoch == epoch]
        axis.plot(range(1, len(sides) + 1), sides, "o-", color=colour, markersize=3, label=f"epoch {epoch}")
    if plain:
        sides = [math.sqrt(height * width) for height, width in plain]
        axis.plot(range(1, len(plain) + 1), sides, "s--", color="0.2", markersize=3, label="plain network")
    axis.set(xlabel="layer", title="from layer to layer", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    tidy(axis)


def _side(row: Row) -> float | None:
    return None if row.map_height is None or row.map_width is None else math.sqrt(row.map_height * row.map_width)


def _njet_outputs(network: nn.Module) -> dict[str, nn.Module]:
    """What the map of each N-Jet layer leaves: the layer, or what subsamples it."""
    outputs: dict[str, nn.Module] = dict(njet_layers(network))
    for name, module in network.named_modules():
        if isinstance(module, SubsampledNJet):
            outputs[f"{name}.conv".removeprefix(".")] = module
    return outputs
