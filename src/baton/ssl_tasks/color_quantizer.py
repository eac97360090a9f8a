"""Colour targets of split-brain autoencoders: a small image whose colours are classes."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from baton.layers.color_space import from_rgb, full_precision, to_rgb

QuantizedSpace = Literal["rgb", "lab", "lab_rescaled", "lab_gamut"]

#: Outer edges of the bins, as the poster's code has them; the upper ones lie a little above the largest value.
EDGES = {"rgb": ((0.0, 1.01),) * 3, "lab": ((0.0, 101.0), (-87.0, 99.0), (-108.0, 95.0))}
GRID = 10


@functools.cache
def gamut_bins() -> Float[Tensor, "bins 2"]:
    """Centres (a, b), multiples of 10, of the bins of size 10 in which a colour of sRGB lies, in order of a, then b.

    There are 261 in sRGB with D65 white. Zhang et al. (2016) count 313 in a list that they give without saying how it
    was made; it holds bins no colour of sRGB falls into.
    """
    levels = torch.linspace(0, 1, 65, dtype=torch.float64)
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).flatten(2).unsqueeze(0)
    ab = from_rgb(cube, "lab")[0, 1:].flatten(1).T
    return ((ab / GRID).round().unique(dim=0) * GRID).float()


class ColorQuantizer(nn.Module):
    """Turn images into classes of small, anti-aliased images: one map for the first channel, one for the other two.

    On the images' device, a whole batch at a time, in full precision. Spaces:

    * `rgb`: red; green and blue. Bins divide [0, 1.01].
    * `lab`: L; a and b. Bins divide [0, 101], [-87, 99] and [-108, 95]; a and b give one joint class `a * n + b`.
    * `lab_rescaled`: as `lab`, but the bins of a and b divide [min, max + 1] of each small image by itself, so that its
      contrasts count and not its absolute colours; the 1 keeps the maximum inside and grey images in one bin.
    * `lab_gamut`: a and b give the nearest of the bins of `gamut_bins`; `soft` gives several with weights.

    Source: Iyengar, Casabuena, Budhkar, "Split-Brain Autoencoders" (poster) and its code: 100 bins of the first
    channel, 10 of each other one, 12 × 12 cells. `lab_gamut`: Zhang, Isola, Efros, "Colorful image colorization"
    (2016).

    Args:
        space: `rgb`, `lab`, `lab_rescaled` or `lab_gamut`.
        bins: of the first channel, and of each of the other two (`lab_gamut` has its own).
        size: side of the small image, in cells.
    """

    gamut: Tensor

    def __init__(self, space: QuantizedSpace = "lab", bins: tuple[int, int] = (100, 10), size: int = 12) -> None:
        super().__init__()
        if space not in ("rgb", "lab", "lab_rescaled", "lab_gamut"):
            raise ValueError(f"space must be rgb, lab, lab_rescaled or lab_gamut, got {space!r}.")
        if min(bins) < 1 or size < 1:
            raise ValueError(f"bins and size must be at least 1, got {tuple(bins)} and {size}.")
        self.space: QuantizedSpace = space
        self.color_space: Literal["rgb", "lab"] = "rgb" if space == "rgb" else "lab"
        self.bins, self.size = (bins[0], bins[1]), size
        # multiples of ten: exact in every precision a module may be cast to
        self.register_buffer("gamut", gamut_bins() if space == "lab_gamut" else torch.zeros(0, 2), persistent=False)

    @property
    def num_classes(self) -> tuple[int, int]:
        """Classes of the first channel, and of the other two together."""
        return self.bins[0], len(self.gamut) if self.space == "lab_gamut" else self.bins[1] ** 2

    def channels(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """The small image in the coordinates of the colour space, before its colours become classes."""
        channels = from_rgb(rgb, self.color_space)
        with full_precision(rgb.device):
            return F.interpolate(channels, (self.size, self.size), mode="bilinear", antialias=True)

    def forward(self, rgb: Float[Tensor, "b 3 h w"]) -> tuple[Int[Tensor, "b s s"], Int[Tensor, "b s s"]]:
        """Classes of the first channel and of the other two, for images in [0, 1]."""
        return self.quantize(self.channels(rgb))

    def quantize(self, channels: Float[Tensor, "b 3 s s"]) -> tuple[Int[Tensor, "b s s"], Int[Tensor, "b s s"]]:
        """Classes of small images from `channels`."""
        low, high = self.bounds(channels)
        first = _bin(channels[:, 0], low[:, 0], high[:, 0], self.bins[0])
        if self.space == "lab_gamut":
            return first, self._distances(channels).argmin(1)
        second, third = (_bin(channels[:, i], low[:, i], high[:, i], self.bins[1]) for i in (1, 2))
        return first, second * self.bins[1] + third

    def soft(
        self, channels: Float[Tensor, "b 3 s s"], neighbours: int = 10, sigma: float = 5.0
    ) -> tuple[Float[Tensor, "b k s s"], Int[Tensor, "b k s s"]]:
        """Weights and classes of the nearest bins of `lab_gamut`: Gaussian in the distance, summing to one.

        Args:
            channels: small images from `channels`.
            neighbours: bins a cell; the published code has 10, the paper says 5.
            sigma: of the Gaussian, in units of a and b.
        """
        if self.space != "lab_gamut":
            raise ValueError(f"Only lab_gamut has soft targets, this is {self.space}.")
        squares, classes = self._distances(channels).topk(neighbours, dim=1, largest=False)
        return (-squares / (2 * sigma**2)).softmax(1), classes

    def bounds(self, channels: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b 3"], Float[Tensor, "b 3"]]:
        """Outer edges of every image's bins, for each channel."""
        filled = [[channels.new_full((len(channels),), edge) for edge in edges] for edges in EDGES[self.color_space]]
        low, high = (torch.stack(ends, 1) for ends in zip(*filled, strict=True))  # on the device: nothing is copied
        if self.space == "lab_rescaled":
            colors = channels[:, 1:].flatten(2)
            low[:, 1:], high[:, 1:] = colors.amin(2), colors.amax(2) + 1
        return low, high

    def decode(
        self,
        first: Int[Tensor, "b s s"] | Float[Tensor, "b n s s"],
        rest: Int[Tensor, "b s s"] | Float[Tensor, "b m s s"],
        like: Float[Tensor, "b 3 s s"],
    ) -> Float[Tensor, "b 3 s s"]:
        """Turn classes, or probabilities of them (their mean colour), into small images in the space's coordinates.

        Args:
            first: of the first channel.
            rest: of the other two.
            like: small images whose ranges `lab_rescaled` takes; the other spaces do not look at them.
        """
        low, high = (bound.view(-1, 3, 1, 1) for bound in self.bounds(like))
        places = (torch.arange(self.bins[0], device=like.device, dtype=like.dtype) + 0.5) / self.bins[0]
        lightness = low[:, :1] + _look_up(first, places[:, None]) * (high - low)[:, :1]
        if self.space == "lab_gamut":
            color = _look_up(rest, self.gamut.to(like.dtype))
        else:
            line = (torch.arange(self.bins[1], device=like.device, dtype=like.dtype) + 0.5) / self.bins[1]
            color = _look_up(rest, torch.cartesian_prod(line, line).view(-1, 2))
            color = low[:, 1:] + color * (high - low)[:, 1:]
        top = 100.0 if self.color_space == "lab" else 1.0  # the last bin reaches above the largest value
        return torch.cat([lightness.clamp_max(top), color], dim=1)

    def to_rgb(self, channels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """Small images in the space's coordinates as RGB in [0, 1]."""
        return to_rgb(channels, self.color_space)

    def _distances(self, channels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b bins s s"]:
        """Squared distance in a and b to every bin's centre."""
        gamut = self.gamut.to(channels.dtype)
        a, b = (channels[:, i : i + 1] - gamut[:, i - 1].view(1, -1, 1, 1) for i in (1, 2))
        return a.square() + b.square()


def _bin(
    values: Float[Tensor, "b s s"], low: Float[Tensor, " b"], high: Float[Tensor, " b"], count: int
) -> Int[Tensor, "b s s"]:
    """Which of `count` equal bins [edge, next edge) a value lies in; what lies outside goes into the outermost."""
    steps = torch.arange(count + 1, device=values.device, dtype=values.dtype)
    edges = low[:, None] + steps * ((high - low) / count)[:, None]
    found = torch.searchsorted(edges, values.flatten(1).contiguous(), right=True) - 1
    return found.clamp(0, count - 1).view_as(values)


def _look_up(classes: Tensor, table: Float[Tensor, "n c"]) -> Float[Tensor, "b c s s"]:
    """Rows of a table by class, or their mean by probability, as channels."""
    if classes.is_floating_point():
        return torch.einsum("bnhw,nc->bchw", classes.to(table.dtype), table)
    return table[classes].permute(0, 3, 1, 2)
