"""The image tower of autoresolution networks: 40 convolutions, mostly Inception modules, for low-resolution images.

Pereyra and Szegedy, "Deep autoresolution networks" (2016), section 2: "a low-resolution image embedding tower which
consists of 40 convolutional layers" that "uses primarily inception layers"; nothing more is said of it. Our layout:

    stem      3 convolutions. 32 px: 3×3, 1×1, 3×3, all at full resolution.
              larger: 7×7 / 2, pool / 2, 1×1, 3×3, pool / 2 (GoogLeNet's)
    stage1    2 Inception modules
    stage2    pool / 2, 2 Inception modules
    stage3    pool / 2, 2 Inception modules
    embed     1×1 convolution: the embedding; 3 + 6 × 6 + 1 = 40 convolutions. Global pooling and `fc` follow.

A module has six convolutions: 1×1 | 1×1, 3×3 | 1×1, 5×5 | pool 3×3, 1×1, concatenated (Szegedy et al., "Going deeper
with convolutions", 2014), with the widths of GoogLeNet's 3a, 3b, 4a, 4c, 5a and 5b times `width`. Every convolution is
followed by BatchNorm (unless `norm=False`; the paper does not say) and ReLU, the last one included.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from baton.backbones.autoresolution_tower import Tower
from baton.backbones.staged import check_options, scaled_width
from baton.layers.conv_relu import ConvReLU

#: 1×1 | 1×1 and 3×3 | 1×1 and 5×5 | 1×1 after the pooling: GoogLeNet's table 1, rows 3a, 3b, 4a, 4c, 5a, 5b.
WIDTHS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (128, 128, 256, 24, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
EMBEDDING = 128


class Inception(nn.Module):
    """Inception module of six convolutions, every branch at the input's resolution.

    Args:
        in_channels: channels that enter.
        widths: channels of the 1×1; the 1×1 and the 3×3; the 1×1 and the 5×5; the 1×1 after the pooling.
        options: of every `ConvReLU`.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.branch1 = ConvReLU(in_channels, one, 1, **options)
        self.branch3 = nn.Sequential(
            ConvReLU(in_channels, reduce3, 1, **options), ConvReLU(reduce3, three, 3, **options)
        )
        self.branch5 = nn.Sequential(
            ConvReLU(in_channels, reduce5, 1, **options), ConvReLU(reduce5, five, 5, **options)
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvReLU(in_channels, pooled, 1, **options))
        self.out_channels = one + three + five + pooled

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out height width"]:
        """Concatenate the branches."""
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


class AutoresolutionImage(Tower):
    """Image tower of 40 convolutions (layout: see the module).

    Args:
        stem: `small` keeps the resolution (for images of about 32 pixels), `large` divides it by 8 (64 pixels and up).
        width: multiplier of all widths but the embedding's, whose 128 channels stay.
        norm: BatchNorm after every convolution.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a stem, width, drop rate or pooling that cannot be built.
    """

    stage_names = ("stem", "stage1", "stage2", "stage3", "embed")

    def __init__(
        self,
        stem: Literal["small", "large"] = "small",
        width: float = 0.5,
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
        if stem not in ("small", "large"):
            raise ValueError(f"Expected stem 'small' or 'large', but got {stem!r}.")
        options: dict[str, Any] = {"norm": norm, "device": device, "dtype": dtype}
        first, second, third = (scaled_width(channels, width) for channels in (128, 128, 192))
        if stem == "small":
            layers: list[nn.Module] = [
                ConvReLU(in_chans, first, 3, **options),
                ConvReLU(first, second, 1, **options),
                ConvReLU(second, third, 3, **options),
            ]
        else:
            first, second = scaled_width(64, width), scaled_width(64, width)
            layers = [
                ConvReLU(in_chans, first, 7, 2, **options),
                nn.MaxPool2d(3, 2, 1),
                ConvReLU(first, second, 1, **options),
                ConvReLU(second, third, 3, **options),
                nn.MaxPool2d(3, 2, 1),
            ]
        self.stem = nn.Sequential(*layers)
        channels, reduction = third, 1 if stem == "small" else 8
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "stem"}]
        for number in range(3):
            modules: list[nn.Module] = [nn.MaxPool2d(3, 2, 1)] if number else []
            reduction *= 2 if number else 1
            for widths in WIDTHS[2 * number : 2 * number + 2]:
                module = Inception(channels, tuple(scaled_width(w, width) for w in widths), **options)
                modules.append(module)
                channels = module.out_channels
            name = f"stage{number + 1}"
            self.add_module(name, nn.Sequential(*modules))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": name})
        self.embed = nn.Sequential(ConvReLU(channels, EMBEDDING, 1, **options))
        self.feature_info.append({"num_chs": EMBEDDING, "reduction": reduction, "module": "embed"})
        self._finish(EMBEDDING, num_classes, global_pool, drop_rate)


def _cfg(size: int, first_conv: str) -> dict[str, Any]:
    """Inception's own scale of pixels, [-1, 1]."""
    return {
        "num_classes": 10 if size == 32 else 1000,
        "input_size": (3, size, size),
        "pool_size": (8, 8) if size == 32 else (7, 7),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": first_conv,
        "classifier": "fc",
        "paper_name": "Deep Autoresolution Networks",
    }


default_cfgs = generate_default_cfgs(
    {
        "autoresolution_image": _cfg(32, "stem.0.conv"),
        "autoresolution_image_large": _cfg(224, "stem.0.conv"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": tuple(range(len(AutoresolutionImage.stage_names)))}
    return build_model_with_cfg(AutoresolutionImage, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def autoresolution_image(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Image tower for 32 px: half of GoogLeNet's widths."""
    return _create("autoresolution_image", pretrained, **kwargs)


@register_model
def autoresolution_image_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Image tower for larger images (64 px and up): GoogLeNet's stem and widths."""
    kwargs = dict({"stem": "large", "width": 1.0, "num_classes": 1000}, **kwargs)
    return _create("autoresolution_image_large", pretrained, **kwargs)
