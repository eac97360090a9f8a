"""Networks that are a plain row of convolutions and poolings: built from a description of their stages.

Everything that such a network computes before its head is a leaf module of one of its stages (`nn.Sequential`), in the
order in which it acts, so that a decoder can be derived by walking them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork, draw_kaiming, scaled_width
from baton.layers.deformable import DeformableConv2d
from baton.layers.njet import NJetConv2d
from baton.layers.subsampling import SubsampledNJet


@dataclass(frozen=True)
class Conv:
    """One convolution, followed by BatchNorm where the network has it, and by a ReLU unless it has none.

    Attributes:
        width: channels, before the network's width multiplier.
        kernel: side in pixels.
        stride: step in pixels.
        padding: cells of zeros at each border; None for half the kernel, which keeps the side at stride 1. Only of
            ordinary convolutions: others pad on their own.
        relu: whether a ReLU follows.
    """

    width: int
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    relu: bool = True


Stages = Mapping[str, Sequence[Conv | nn.Module]]
#: Makes a spatial convolution from channels that enter, channels that leave, kernel, stride, `bias=`, and where it is
#: placed, as `spatial_conv` does. A row of several layers is laid flat.
Make = Callable[..., nn.Module]


class PlainNetwork(StagedNetwork):
    """Base of plain networks. A subclass calls `_add_stages` and then `_finish`.

    It may choose over which `fan` weights are drawn, and what BatchNorm adds to the variance, `norm_eps`.

    `feature_info` says beside channels and reduction by how many cells (`border`) missing padding makes a map smaller;
    `min_side` is the smallest image of which every layer leaves something. Where N-Jet layers subsample as their scales
    allow, `reduction` is that of the scales at the start, seldom a whole number, and borders are not counted.
    """

    fan: Literal["fan_in", "fan_out"] = "fan_in"
    norm_eps: float = 1e-5
    min_side: int

    def _add_stages(
        self, stages: Stages, in_chans: int, width: float, norm: bool, make: Make | None = None, **placed: Any
    ) -> int:
        """Build the stages and describe them.

        Args:
            stages: by name, convolutions and what stands between them, in order.
            in_chans: image channels.
            width: multiplier of all widths.
            norm: BatchNorm after every convolution, which then has no bias.
            make: what stands for convolutions whose kernel has more than one pixel; None leaves them ordinary.
            **placed: `device` and `dtype` of the parameters.

        Returns:
            The channels of the last stage.
        """
        channels = in_chans
        reduction: Any = 1  # a whole number, unless scales choose the side
        rows: list[nn.Module] = []
        self.stage_names, self.feature_info = tuple(stages), []
        for name, row in stages.items():
            layers: list[nn.Module] = []
            for item in row:
                if not isinstance(item, Conv):
                    layers.append(item)
                    continue
                out = scaled_width(item.width, width)
                if make is None or item.kernel == 1:
                    padding = item.kernel // 2 if item.padding is None else item.padding
                    layers.append(nn.Conv2d(channels, out, item.kernel, item.stride, padding, bias=not norm, **placed))
                else:
                    made = make(channels, out, item.kernel, item.stride, bias=not norm, **placed)
                    layers += made if isinstance(made, nn.Sequential) else [made]
                layers += [nn.BatchNorm2d(out, self.norm_eps, **placed)] if norm else []
                layers += [nn.ReLU()] if item.relu else []
                channels = out
            self.add_module(name, nn.Sequential(*layers))
            rows += layers
            reduction *= math.prod(map(_factor, layers))
            if any(isinstance(layer, SubsampledNJet) for layer in rows):
                border = 0
            else:  # measured on an image large enough that no layer lacks pixels, of a side that every stride divides
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


def _factor(layer: nn.Module) -> float:
    """How many times shorter a layer makes the sides of maps, before they are rounded."""
    if isinstance(layer, SubsampledNJet):
        return layer.conv.stride * layer.subsample.factor(layer.conv.host_sigma)
    return _number(layer.stride) if isinstance(layer, (NJetConv2d, *_WINDOWED)) else 1


def _sides(layers: Sequence[nn.Module], side: int) -> list[int]:
    """Sides of the maps from the image on; below 1 where nothing is left (what follows then means nothing)."""
    sides = [side]
    for layer in layers:
        sides.append(_side(layer, sides[-1]))
    return sides


def _side(layer: nn.Module, side: int) -> int:
    """Side of the map that a layer makes of one of this side."""
    if isinstance(layer, SubsampledNJet):
        return layer.subsample.side(_side(layer.conv, side), layer.conv.host_sigma)
    if isinstance(layer, NJetConv2d):
        return (side - 1) // layer.stride + 1
    if isinstance(layer, nn.ZeroPad2d):
        return side + sum(layer.padding[:2])
    if not isinstance(layer, _WINDOWED):
        return side
    stride, padding, up = _number(layer.stride), _number(layer.padding), bool(getattr(layer, "ceil_mode", False))
    kernel = _number(getattr(layer, "dilation", 1)) * (_number(layer.kernel_size) - 1) + 1
    room = side + 2 * padding - kernel
    after = (-(-room // stride) if up else room // stride) + 1
    if up and (after - 1) * stride >= side + padding:
        after -= 1  # no window starts beyond the map
    return after


_WINDOWED = (nn.Conv2d, DeformableConv2d, nn.MaxPool2d, nn.AvgPool2d)


def _number(size: Any) -> int:
    return int(size[0] if isinstance(size, tuple) else size)
