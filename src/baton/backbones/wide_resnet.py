"""Wide residual networks for small images: `wrn_16_1` to `wrn_52_1`, and `wide_resnet` for any depth, width and block.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv:1605.07146); chapter 5.2 of Zagoruyko's thesis.
The wide ResNets for ImageNet are in `wide_resnet_imagenet.py`.

    stem    3×3 convolution to 16 channels, without BatchNorm or ReLU
    group1  n blocks, 16k channels, full resolution
    group2  n blocks, 32k channels, the first block halves the resolution
    group3  n blocks, 64k channels, the first block halves the resolution
    norm    BatchNorm, ReLU, then global pooling and a linear classifier `fc`

The outputs of `group1`, `group2` and `group3` are sums of residual blocks *before* the next BatchNorm and ReLU. They
are the maps that attention transfer compares (thesis, chapter 6) and the three entries of `feature_info`.

Initialisation follows the authors' PyTorch port: convolutions are Gaussian with standard deviation sqrt(2 / fan-in),
BatchNorm scales uniform in (0, 1) and shifts zero (the old Torch default), the classifier Kaiming normal over the
fan-in with gain sqrt(2) and zero bias (their Lua code draws it uniformly in ±1 / sqrt(fan-in) instead).

Dirac-ResNets, section 5.3.3 of the thesis: `dirac` gives every convolution, stem and projections included, an implicit
identity (`baton.layers.DiracConv2d`). The study of initialisations there trains ResNet-28 with weights I + W, W drawn
with a standard deviation from 1e-8 to 1 whatever the filters' shapes: `dirac="identity"`, `init_std=1e-8`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork
from baton.backbones.wide_resnet_blocks import DiracForm, WideBlock, blocks_per_group, convolution, parse_block
from baton.layers.dirac import DiracConv2d

STEM_CHANNELS = 16
#: Of CIFAR as the authors' code has them, in units of [0, 1] pixels; they use them for CIFAR-100 too.
CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


class WideResNet(StagedNetwork):
    """Wide residual network WRN-depth-width for small images (layout and initialisation: see the module).

    It obeys timm's protocol for models. `drop_rate` is the dropout between the convolutions of a block (the paper takes
    0.3 on CIFAR and 0.4 on SVHN), not before the classifier.

    Args:
        depth: 6n + 4 for the usual block; see `blocks_per_group`.
        width: the widening factor k; the groups have 16k, 32k and 64k channels.
        block: kernel sizes of the convolutions in a block, see `parse_block`.
        drop_rate: dropout probability between the convolutions of a block.
        depth_rule: how blocks of mixed kernel sizes count, see `blocks_per_group`.
        dirac: Dirac parameterisation of all convolutions: `identity` (I + W), `scaled` (diag(a) I + W, eq. 5.4) or
            `normalized` (diag(a) I + diag(b) W / ||W||, eq. 5.5); None for ordinary ones.
        init_std: standard deviation of the convolutions' W, whatever their shape; None draws it as above.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a depth, width, block, drop rate, form of weights or pooling that cannot be built.
    """

    stage_names = ("group1", "group2", "group3")

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        block: str | Sequence[int] = (3, 3),
        drop_rate: float = 0.0,
        depth_rule: Literal["paper", "convolutions"] = "paper",
        dirac: DiracForm | None = None,
        init_std: float | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_sizes = parse_block(block)
        n = blocks_per_group(depth, kernel_sizes, depth_rule)
        if width < 1:
            raise ValueError(f"Expected a widening factor width of 1 or more, but got {width}.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"Expected drop_rate in [0, 1), but got {drop_rate}.")
        if drop_rate > 0 and len(kernel_sizes) == 1:
            raise ValueError(
                f"Expected a block of two or more convolutions, because drop_rate={drop_rate} acts between them, "
                f"but got B({kernel_sizes[0]}); set drop_rate=0."
            )
        if init_std is not None and init_std < 0:
            raise ValueError(f"Expected init_std of 0 or more, but got {init_std}.")
        self.in_chans = in_chans
        self.drop_rate, self.init_std = drop_rate, init_std
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        made = {"dirac": dirac, "init_std": init_std, **placed}

        self.stem = convolution(in_chans, STEM_CHANNELS, 3, **made)
        self.feature_info: list[dict[str, Any]] = []
        channels = STEM_CHANNELS
        for i, name in enumerate(self.stage_names):
            wide, stride = 16 * 2**i * width, 1 if i == 0 else 2
            first = WideBlock(channels, wide, kernel_sizes, stride, drop_rate, **made)
            rest = (WideBlock(wide, wide, kernel_sizes, 1, drop_rate, **made) for _ in range(n - 1))
            self.add_module(name, nn.Sequential(first, *rest))
            self.feature_info.append({"num_chs": wide, "reduction": 2**i, "module": name})
            channels = wide
        self.norm = nn.BatchNorm2d(channels, **placed)
        self.act = nn.ReLU()
        self._finish(channels, num_classes, global_pool)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights afresh, as the authors' PyTorch port does (see the module)."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, DiracConv2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                if self.init_std is None:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=self.init_std)
            elif isinstance(module, nn.Linear):
                self.init_classifier(module)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """The authors' PyTorch port: Kaiming normal over the fan-in with gain sqrt(2), bias zero."""
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates.

        Args:
            coarse: one layer for a whole group instead of one for each block.
        """
        blocks = r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 16 height width"]:
        """The stem."""
        return self.stem(x)


def _cfg() -> dict[str, Any]:
    """For CIFAR, as the authors' code has it."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "stem",
        "classifier": "fc",
        "paper_name": "Wide Residual Networks",
        "paper_ids": "arXiv:1605.07146",
    }


_SIZES = ("16_1", "16_2", "16_4", "16_8", "22_8", "28_10", "28_12", "40_1", "40_2", "40_4", "52_1")
default_cfgs = generate_default_cfgs({name: _cfg() for name in ("wide_resnet", *(f"wrn_{size}" for size in _SIZES))})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": tuple(range(len(WideResNet.stage_names)))}
    return build_model_with_cfg(WideResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def wide_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any WRN-depth-width-B(block): the arguments of `WideResNet`; WRN-28-10-B(3,3) if none are given."""
    return _create("wide_resnet", pretrained, **kwargs)


@register_model
def wrn_16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-1: 175,066 parameters with 10 classes."""
    return _create("wrn_16_1", pretrained, **dict({"depth": 16, "width": 1}, **kwargs))


@register_model
def wrn_16_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-2: 691,674 parameters with 10 classes."""
    return _create("wrn_16_2", pretrained, **dict({"depth": 16, "width": 2}, **kwargs))


@register_model
def wrn_16_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-4: 2,748,890 parameters with 10 classes."""
    return _create("wrn_16_4", pretrained, **dict({"depth": 16, "width": 4}, **kwargs))


@register_model
def wrn_16_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-8: 10,961,370 parameters with 10 classes."""
    return _create("wrn_16_8", pretrained, **dict({"depth": 16, "width": 8}, **kwargs))


@register_model
def wrn_22_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-22-8: 17,158,106 parameters with 10 classes."""
    return _create("wrn_22_8", pretrained, **dict({"depth": 22, "width": 8}, **kwargs))


@register_model
def wrn_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-10: 36,479,194 parameters with 10 classes."""
    return _create("wrn_28_10", pretrained, **dict({"depth": 28, "width": 10}, **kwargs))


@register_model
def wrn_28_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-12: 52,517,850 parameters with 10 classes."""
    return _create("wrn_28_12", pretrained, **dict({"depth": 28, "width": 12}, **kwargs))


@register_model
def wrn_40_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-1: 563,930 parameters with 10 classes."""
    return _create("wrn_40_1", pretrained, **dict({"depth": 40, "width": 1}, **kwargs))


@register_model
def wrn_40_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-2: 2,243,546 parameters with 10 classes."""
    return _create("wrn_40_2", pretrained, **dict({"depth": 40, "width": 2}, **kwargs))


@register_model
def wrn_40_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-4: 8,949,210 parameters with 10 classes."""
    return _create("wrn_40_4", pretrained, **dict({"depth": 40, "width": 4}, **kwargs))


@register_model
def wrn_52_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-52-1: 758,362 parameters with 10 classes."""
    return _create("wrn_52_1", pretrained, **dict({"depth": 52, "width": 1}, **kwargs))
