"""Wide residual networks for ImageNet: `wrn18_*`, `wrn34_*` (basic blocks) and `wrn50_2` (bottlenecks).

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv:1605.07146); Zagoruyko's thesis, tables 5.7 and 5.8.

They are timm's `ResNet` with more channels; the stem keeps 64. The second number of a name is the true widening factor.
The heading of table 5.7 in the thesis (1.0, 2.0, 3.0, 4.0) does not fit the parameter counts below it, which are those
of widths 1.0, 1.5, 2.0 and 3.0, the heading in the published paper. So the columns of that table are, in order:

    wrn18_1  11.7M    wrn18_1_5  25.9M    wrn18_2  45.6M    wrn18_3  101.8M
    wrn34_1  21.8M    wrn34_1_5  48.6M    wrn34_2  86.0M

`wrn50_2` (68.9M) is ResNet-50 with the inner 3×3 convolutions twice as wide, the same network as timm's and
torchvision's `wide_resnet50_2`; weights for it are published under that name.

As in 2016, the last BatchNorm of a block starts at scale one; `zero_init_last=True` asks for timm's usual zero.
Here `drop_rate` is timm's dropout before the classifier.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_name": "Wide Residual Networks",
        "paper_ids": "arXiv:1605.07146",
    }


_SIZES = ("18_1", "18_1_5", "18_2", "18_3", "34_1", "34_1_5", "34_2", "50_2")
default_cfgs = generate_default_cfgs({f"wrn{size}": _cfg() for size in _SIZES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(ResNet, variant, pretrained, **dict({"zero_init_last": False}, **kwargs))


def _basic(layers: tuple[int, ...], width: float) -> dict[str, Any]:
    """Arguments of a ResNet of basic blocks, `width` times as wide."""
    return {"block": BasicBlock, "layers": layers, "channels": tuple(int(width * base) for base in (64, 128, 256, 512))}


@register_model
def wrn18_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 1 times as wide: 11,689,512 parameters."""
    return _create("wrn18_1", pretrained, **dict(_basic((2, 2, 2, 2), 1.0), **kwargs))


@register_model
def wrn18_1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 1.5 times as wide: 25,875,816 parameters."""
    return _create("wrn18_1_5", pretrained, **dict(_basic((2, 2, 2, 2), 1.5), **kwargs))


@register_model
def wrn18_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 2 times as wide: 45,618,216 parameters."""
    return _create("wrn18_2", pretrained, **dict(_basic((2, 2, 2, 2), 2.0), **kwargs))


@register_model
def wrn18_3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 3 times as wide: 101,783,976 parameters."""
    return _create("wrn18_3", pretrained, **dict(_basic((2, 2, 2, 2), 3.0), **kwargs))


@register_model
def wrn34_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 1 times as wide: 21,797,672 parameters."""
    return _create("wrn34_1", pretrained, **dict(_basic((3, 4, 6, 3), 1.0), **kwargs))


@register_model
def wrn34_1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 1.5 times as wide: 48,613,608 parameters."""
    return _create("wrn34_1_5", pretrained, **dict(_basic((3, 4, 6, 3), 1.5), **kwargs))


@register_model
def wrn34_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 2 times as wide: 86,036,008 parameters."""
    return _create("wrn34_2", pretrained, **dict(_basic((3, 4, 6, 3), 2.0), **kwargs))


@register_model
def wrn50_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with inner 3×3 convolutions twice as wide: 68,883,240 parameters."""
    return _create(
        "wrn50_2", pretrained, **dict({"block": Bottleneck, "layers": (3, 4, 6, 3), "base_width": 128}, **kwargs)
    )
