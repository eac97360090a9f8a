"""The patch tower of autoresolution networks: 17 convolutions without padding, so that it can be unrolled.

Pereyra and Szegedy, "Deep autoresolution networks" (2016), sections 2 and 3.2: 17 convolutional layers that turn a
super patch of 127 × 127 pixels into a grid of 47 × 47 patches. Nothing more is said; a stride of 2 and a receptive
field of 35 pixels give that grid: (127 - 35) / 2 + 1 = 47. Our layout, for `a` 3×3 convolutions up to the one with the
stride and `b` after it:

    low     a 3×3 convolutions, 32 channels each; the last one has 64 and the stride
    high    b 3×3 convolutions of 96 channels, each followed by a 1×1 of 96 until there are 17 convolutions in all

With stride 2 the receptive field is 1 + 2a + 4b, with stride 1 it is 1 + 2a + 2b. Without padding every cell of the
grid is what its own patch alone gives, and the grid takes a 59th of the operations of its patches one by one.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.autoresolution_tower import Tower
from baton.backbones.staged import check_options, scaled_width
from baton.layers.conv_relu import ConvReLU

CONVOLUTIONS = 17
LOW, STRIDED, HIGH = 32, 64, 96


def split_receptive_field(receptive_field: int, stride: int) -> tuple[int, int]:
    """Numbers (a, b) of 3×3 convolutions up to and after the one with the stride that give a receptive field.

    Of the splits that fit into 17 convolutions the one with `b` about one more than `a` is taken (stride 2): layers
    after the stride cost a quarter.

    Args:
        receptive_field: side in pixels, odd.
        stride: 1 or 2 pixels.

    Raises:
        ValueError: if no split gives it; names the nearest receptive fields that work.
    """
    if stride not in (1, 2):
        raise ValueError(f"Expected a patch stride of 1 or 2 pixels, but got {stride}.")
    splits: dict[int, tuple[int, int]] = {}
    for a in range(1, CONVOLUTIONS + 1):
        for b in range(CONVOLUTIONS - a + 1):
            size = 1 + 2 * a + 2 * stride * b
            best = splits.setdefault(size, (a, b))
            if abs(b - a - 1) < abs(best[1] - best[0] - 1):
                splits[size] = (a, b)
    if receptive_field not in splits:
        nearest = sorted(sorted(splits), key=lambda size: abs(size - receptive_field))[:2]
        raise ValueError(
            f"{CONVOLUTIONS} convolutions of 3×3 and 1×1 with stride {stride} give odd receptive fields from "
            f"{min(splits)} to {max(splits)} pixels, not {receptive_field}; the nearest are "
            f"{' and '.join(map(str, sorted(nearest)))}."
        )
    return splits[receptive_field]


class AutoresolutionPatch(Tower):
    """Patch tower of 17 convolutions without padding (layout: see the module).

    A map of it has `(side - receptive_field) // stride + 1` cells along each axis.

    Args:
        receptive_field: side of the patch that one cell sees, in pixels.
        stride: pixels between neighbouring cells, 1 or 2.
        width: multiplier of all widths.
        norm: BatchNorm after every convolution. Unrolled and separate evaluation agree exactly in evaluation mode (in
            training mode their batch statistics differ).
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a receptive field, stride, width, drop rate or pooling that cannot be built.
    """

    stage_names = ("low", "high")

    def __init__(
        self,
        receptive_field: int = 35,
        stride: int = 2,
        width: float = 1.0,
        norm: bool = True,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        a, b = split_receptive_field(receptive_field, stride)
        self.receptive_field, self.stride = receptive_field, stride
        options: dict[str, Any] = {"padding": 0, "norm": norm, "device": device, "dtype": dtype}
        low, strided, high = (scaled_width(channels, width) for channels in (LOW, STRIDED, HIGH))
        channels, layers = in_chans, []
        for index in range(a):
            last = index == a - 1
            layers.append(ConvReLU(channels, strided if last else low, 3, stride if last else 1, **options))
            channels = strided if last else low
        self.low = nn.Sequential(*layers)
        seen = 1 + 2 * a
        self.feature_info = [_info("low", channels, stride, seen)]
        layers = []
        pointwise = CONVOLUTIONS - a - b
        for index in range(b):
            # the 1×1 convolutions are spread evenly behind the 3×3 ones
            following = pointwise * (index + 1) // b - pointwise * index // b
            for kernel_size in (3, *(1 for _ in range(following))):
                layers.append(ConvReLU(channels, high, kernel_size, **options))
                channels = high
        if not b:
            for _ in range(pointwise):
                layers.append(ConvReLU(channels, high, 1, **options))
                channels = high
        self.high = nn.Sequential(*layers)
        self.feature_info.append(_info("high", channels, stride, receptive_field))
        self._finish(channels, num_classes, global_pool, drop_rate)


def _info(module: str, channels: int, stride: int, receptive_field: int) -> dict[str, Any]:
    """Without padding a map is smaller than the image by its receptive field: timm's entries, and that."""
    return {"num_chs": channels, "reduction": stride, "module": module, "receptive_field": receptive_field}


def _cfg(size: int) -> dict[str, Any]:
    """The tower sees super patches of `size` pixels on Inception's own scale of pixels, [-1, 1]."""
    return {
        "num_classes": 10,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "low.0.conv",
        "classifier": "fc",
        "paper_name": "Deep Autoresolution Networks",
    }


default_cfgs = generate_default_cfgs(
    {
        "autoresolution_patch": _cfg(127),
        "autoresolution_patch_rf23": _cfg(71),
        "autoresolution_patch_rf15": _cfg(47),
        "autoresolution_patch_rf9": _cfg(24),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(AutoresolutionPatch, variant, pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs)


@register_model
def autoresolution_patch(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's: receptive field 35, stride 2; for images of about 256 pixels (super patch 127: 47 × 47 cells)."""
    return _create("autoresolution_patch", pretrained, **kwargs)


@register_model
def autoresolution_patch_rf23(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Receptive field 23, stride 2; for images of about 96 pixels (super patch 71: 25 × 25 cells)."""
    return _create("autoresolution_patch_rf23", pretrained, **dict({"receptive_field": 23}, **kwargs))


@register_model
def autoresolution_patch_rf15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Receptive field 15, stride 2; for images of 48 and 64 pixels (super patch 47: 17 × 17 cells)."""
    return _create("autoresolution_patch_rf15", pretrained, **dict({"receptive_field": 15}, **kwargs))


@register_model
def autoresolution_patch_rf9(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Receptive field 9, stride 1; for images of 32 pixels (super patch 24: 16 × 16 cells)."""
    return _create("autoresolution_patch_rf9", pretrained, **dict({"receptive_field": 9, "stride": 1}, **kwargs))
