"""Networks that are a plain row of convolutions and poolings: built from a description of their stages.

Everything that such a network computes before its head is a leaf module of one of its stages (`nn.Sequential`), in the
order in which it acts, so that a decoder can be derived by walking them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork, draw_kaiming, scaled_width


@dataclass(frozen=True)
class Conv:
    """One convolution, followed by BatchNorm where the network has it, and by a ReLU unless it has none.

    Attributes:
        width: channels, before the network's width multiplier.
        kernel: side in pixels.
        stride: step in pixels.
        padding: cells of zeros at each border; None for half the kernel, which keeps the side at stride 1.
        relu: whether a ReLU follows.
    """

    width: int
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    relu: bool = True


Stages = Mapping[str, Sequence[Conv | nn.Module]]


class PlainNetwork(StagedNetwork):
    """Base of plain networks. A subclass calls `_add_stages` and then `_finish`.

    It may choose over which `fan` weights are drawn, and what BatchNorm adds to the variance, `norm_eps`.

    `feature_info` says beside channels and reduction by how many cells (`border`) missing padding makes a map smaller;
    `min_side` is the smallest image of which every layer leaves something.
    """

    fan: Literal["fan_in", "fan_out"] = "fan_in"
    norm_eps: float = 1e-5
    min_side: int

    def _add_stages(self, stages: Stages, in_chans: int, width: float, norm: bool, **placed: Any) -> int:
        """Build the stages and describe them.

        Args:
            stages: by name, convolutions and what stands between them, in order.
            in_chans: image channels.
            width: multiplier of all widths.
            norm: BatchNorm after every convolution, which then has no bias.
            **placed: `device` and `dtype` of the parameters.

        Returns:
            The channels of the last stage.
        """
        channels, reduction = in_chans, 1
        rows: list[nn.Module] = []
        self.stage_names, self.feature_info = tuple(stages), []
        for name, row in stages.items():
            layers: list[nn.Module] = []
            for item in row:
                if not isinstance(item, Conv):
                    layers.append(item)
                    continue
                out, padding = scaled_width(item.width, width), item.padding
                padding = item.kernel // 2 if padding is None else padding
                layers.append(nn.Conv2d(channels, out, item.kernel, item.stride, padding, bias=not norm, **placed))
                layers += [nn.BatchNorm2d(out, self.norm_eps, **placed)] if norm else []
                layers += [nn.ReLU()] if item.relu else []
                channels = out
            self.add_module(name, nn.Sequential(*layers))
            rows += layers
            reduction *= math.prod(stride for _, stride, _, _ in _windows(layers))
            # measured on an image large enough that no layer lacks pixels, and of a side that every stride divides
            border = 64 - _sides(rows, 64 * reduction)[-1]
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "border": border, "module": name})
        self.min_side = next(side for side in itertools.count(1) if min(_sides(rows, side)) > 0)
        return channels

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh: Kaiming normal over `fan` for convolutions, biases zero."""
        draw_kaiming(self, self.fan)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw a classifier that answers all classes nearly alike at first."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Refuse images of which the layers leave nothing."""
        if min(x.shape[2:]) < self.min_side:
            raise ValueError(
                f"Expected images of at least {self.min_side} pixels a side, but got {x.shape[2]} x {x.shape[3]}; use "
                "larger ones."
            )
        return x


def _windows(layers: Sequence[nn.Module]) -> Iterator[tuple[int, int, int, bool]]:
    """Kernel, stride, padding and whether the side is rounded up, of each convolution and pooling."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            sizes = (layer.kernel_size, layer.stride, layer.padding)
            kernel, stride, padding = (int(size[0] if isinstance(size, tuple) else size) for size in sizes)
            yield kernel, stride, padding, bool(getattr(layer, "ceil_mode", False))


def _sides(layers: Sequence[nn.Module], side: int) -> list[int]:
    """Sides of the maps from the image on; below 1 where nothing is left (what follows then means nothing)."""
    sides = [side]
    for kernel, stride, padding, up in _windows(layers):
        room = sides[-1] + 2 * padding - kernel
        after = (-(-room // stride) if up else room // stride) + 1
        if up and (after - 1) * stride >= sides[-1] + padding:
            after -= 1  # no window starts beyond the map
        sides.append(after)
    return sides
