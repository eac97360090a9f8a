"""DiracNets, plain networks whose convolutions have an implicit identity, and their plain twins without it.

Zagoruyko and Komodakis, "DiracNets: Training Very Deep Neural Networks Without Skip-Connections" (arXiv:1706.00388,
version 2); chapter 5.3 of Zagoruyko's thesis, table 5.9. `diracnet_34_1` has depth 34 and width k = 1; `plain_34_1` is
the same network with ordinary convolutions; `diracnet` builds any depth and width, and the twin with `dirac=False`.
A layer is ReLU, 3×3 convolution (`DiracConv2d`), BatchNorm, in this order; the k-th group has 2n of them:

    small images, depth 6n + 4                          large images, depth 18 or 34
    stem    3×3 convolution to 16k channels,            7×7 convolution of stride 2 to 64k channels, BatchNorm,
            BatchNorm                                   maximum of 3×3 with stride 2
    group1  2n layers to 16k channels                   4 or 6 layers to 64k channels
    group2  maximum of 2×2, 2n layers to 32k            maximum of 2×2, 4 or 8 layers to 128k
    group3  maximum of 2×2, 2n layers to 64k            maximum of 2×2, 4 or 12 layers to 256k
    group4                                              maximum of 2×2, 4 or 6 layers to 512k
    act     ReLU, then global pooling and a linear classifier `fc`

The code's small stem ends with a ReLU, which changes nothing before the first layer's own and is left out. The thesis
draws a stem of 16 channels and leaves "dimensionality changing layers" out; as in the code, the stem has 16k channels
and the first layer of a group changes their number. The 11.7M and 21.8M parameters of table 5.11 for large images are
those of the ResNets beside them, whose 1×1 projections DiracNets lack: they have 11.5M and 21.6M. The maps of the
groups, the entries of `feature_info`, are those before the next ReLU.

Initialisation is the code's: Kaiming normal over the fan-in (see `DiracConv2d` for the paper's N(0, 1)), a = 1.0,
b = 0.1, BatchNorm scales uniform in (0, 1) and shifts zero, the classifier Kaiming normal with zero bias. Weight decay
must spare a and b, which are named in `no_weight_decay`; the code spares biases and BatchNorms as well.

After training `baton.layers.fold` turns a network into a chain of ReLUs and convolutions, which has the tensors of the
plain twin without BatchNorm: `plain_34_1` with `norm=False`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork, check_options, scaled_width
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD
from baton.backbones.wide_resnet_blocks import blocks_per_group
from baton.layers.dirac import DiracConv2d

#: Layers of each group of the networks for large images.
LARGE_GROUPS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}


class DiracNet(StagedNetwork):
    """DiracNet-depth-width or its plain twin: (B, C, H, W) to (B, 64k, H // 4, W // 4) for small images.

    For large images (B, 512k, H / 32, W / 32): the stem rounds up, the poolings between groups down. Layout and
    initialisation: see the module.

    Args:
        depth: 6n + 4 for small images, 18 or 34 for large ones.
        width: the factor k of all widths.
        images: `small` (CIFAR) or `large` (ImageNet).
        dirac: Dirac parameterisation of the groups' convolutions; without it they are ordinary ones.
        normalize: divide W by its length and scale it by b (eq. 5.5); without it, eq. 5.4. Only with `dirac`.
        norm: BatchNorm after every convolution; without it, and without `dirac`, convolutions have biases.
        init_std: standard deviation of the groups' W, whatever its shape; None draws it as the code does.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for what cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        depth: int = 28,
        width: float = 10,
        images: Literal["small", "large"] = "small",
        dirac: bool = True,
        normalize: bool = True,
        norm: bool = True,
        init_std: float | None = None,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        if dirac and not norm:
            raise ValueError("Expected dirac=False with norm=False, the form of a folded network, but got dirac=True.")
        if init_std is not None and init_std < 0:
            raise ValueError(f"Expected init_std of 0 or more, but got {init_std}.")
        self.init_std = init_std
        layers = layers_per_group(depth, images)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}

        def convolution(channels: int, out: int) -> nn.Module:
            if dirac:
                return DiracConv2d(channels, out, 3, 1, 1, normalize=normalize, init_std=init_std, **placed)
            return nn.Conv2d(channels, out, 3, padding=1, bias=not norm, **placed)

        large = images == "large"
        channels = base = scaled_width(64 if large else 16, width)
        kernel, stride = (7, 2) if large else (3, 1)
        stem = nn.Conv2d(in_chans, channels, kernel, stride, kernel // 2, bias=not norm, **placed)
        self.stem = nn.Sequential(stem)
        self.stem.extend([nn.BatchNorm2d(channels, **placed)] if norm else [])
        self.stem.extend([nn.MaxPool2d(3, 2, 1)] if large else [])
        reduction = 4 if large else 1
        self.stage_names = tuple(f"group{i + 1}" for i in range(len(layers)))
        self.feature_info = []
        for i, (name, count) in enumerate(zip(self.stage_names, layers, strict=True)):
            wide = base * 2**i
            group = nn.Sequential()
            if i:
                group.add_module("pool", nn.MaxPool2d(2))
            for number in range(count):
                block = nn.Sequential()
                block.add_module("act", nn.ReLU())
                block.add_module("conv", convolution(wide if number else channels, wide))
                if norm:
                    block.add_module("norm", nn.BatchNorm2d(wide, **placed))
                group.add_module(str(number), block)
            self.add_module(name, group)
            self.feature_info.append({"num_chs": wide, "reduction": reduction * 2**i, "module": name})
            channels = wide
        #: the smallest image of which every pooling leaves something; the large stem rounds up twice
        self.min_side = 29 if large else 4
        self.act = nn.ReLU()
        self._finish(channels, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as the code does but for `init_std` (see the module)."""
        for name, module in self.named_modules():
            if isinstance(module, DiracConv2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d):
                if self.init_std is None or name.startswith("stem"):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=self.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                self.init_classifier(module)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As the code: Kaiming normal over the fan-in with gain sqrt(2), bias zero."""
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates.

        Args:
            coarse: one layer for a whole group instead of one for each convolution with its BatchNorm.
        """
        return {"stem": r"^stem", "blocks": r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"}

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch stem _ _"]:
        """The stem; images of which the poolings leave nothing are refused."""
        if min(x.shape[2:]) < self.min_side:
            raise ValueError(
                f"Expected images of at least {self.min_side} pixels a side, but got {x.shape[2]} x {x.shape[3]}; use "
                "larger ones."
            )
        return self.stem(x)


def layers_per_group(depth: int, images: Literal["small", "large"] = "small") -> Sequence[int]:
    """Number of convolutions in each group.

    Args:
        depth: 6n + 4 for small images (2n in each of three groups), 18 or 34 for large ones (of four groups).
        images: `small` or `large`.

    Raises:
        ValueError: for a depth that there is not; names those that work.
    """
    if images == "small":
        return (2 * blocks_per_group(depth, (3, 3)),) * 3
    if images != "large":
        raise ValueError(f"Expected images 'small' or 'large', but got {images!r}.")
    if depth not in LARGE_GROUPS:
        raise ValueError(f"Expected a depth of 18 or 34 for large images, but got {depth}.")
    return LARGE_GROUPS[depth]


def small_config(**kwargs: Any) -> dict[str, Any]:
    """For CIFAR, as the code has it."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "fixed_input_size": False,
        "min_input_size": (3, 4, 4),
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "stem.0",
        "classifier": "fc",
        "paper_name": "DiracNets: Training Very Deep Neural Networks Without Skip-Connections",
        "paper_ids": "arXiv:1706.00388",
        **kwargs,
    }


def large_config() -> dict[str, Any]:
    """For ImageNet."""
    return small_config(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        min_input_size=(3, 29, 29),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )


#: Depths and widths that have names, for small images.
SIZES = ("10_1", "16_1", "28_1", "28_5", "28_10", "34_1", "34_2", "52_1", "100_1")
default_cfgs = generate_default_cfgs(
    {
        "diracnet": small_config(),
        **{f"diracnet_{size}": small_config() for size in SIZES},
        **{f"diracnet{depth}": large_config() for depth in LARGE_GROUPS},
    }
)


def create_diracnet(variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> nn.Module:
    """Build a variant with its own arguments, unless others are given."""
    arguments = {**own, **kwargs}
    indices = tuple(range(4 if arguments.get("images") == "large" else 3))
    return build_model_with_cfg(DiracNet, variant, pretrained, feature_cfg={"out_indices": indices}, **arguments)


@register_model
def diracnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any DiracNet, or its plain twin (`dirac=False`): the arguments of `DiracNet`; DiracNet-28-10 by default."""
    return create_diracnet("diracnet", pretrained, kwargs)


@register_model
def diracnet_10_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-10-1: 75,738 parameters with 10 classes."""
    return create_diracnet("diracnet_10_1", pretrained, kwargs, depth=10, width=1)


@register_model
def diracnet_16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-16-1: 173,402 parameters with 10 classes."""
    return create_diracnet("diracnet_16_1", pretrained, kwargs, depth=16, width=1)


@register_model
def diracnet_28_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-28-1: 368,730 parameters with 10 classes."""
    return create_diracnet("diracnet_28_1", pretrained, kwargs, depth=28, width=1)


@register_model
def diracnet_28_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-28-5: 9,124,250 parameters with 10 classes."""
    return create_diracnet("diracnet_28_5", pretrained, kwargs, depth=28, width=5)


@register_model
def diracnet_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-28-10: 36,450,090 parameters with 10 classes."""
    return create_diracnet("diracnet_28_10", pretrained, kwargs, depth=28, width=10)


@register_model
def diracnet_34_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-34-1: 466,394 parameters with 10 classes."""
    return create_diracnet("diracnet_34_1", pretrained, kwargs, depth=34, width=1)


@register_model
def diracnet_34_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-34-2: 1,854,378 parameters with 10 classes."""
    return create_diracnet("diracnet_34_2", pretrained, kwargs, depth=34, width=2)


@register_model
def diracnet_52_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-52-1: 759,386 parameters with 10 classes."""
    return create_diracnet("diracnet_52_1", pretrained, kwargs, depth=52, width=1)


@register_model
def diracnet_100_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-100-1: 1,540,698 parameters with 10 classes."""
    return create_diracnet("diracnet_100_1", pretrained, kwargs, depth=100, width=1)


@register_model
def diracnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-18 for ImageNet: 11,523,368 parameters with 1000 classes."""
    return create_diracnet("diracnet18", pretrained, kwargs, depth=18, width=1, images="large", num_classes=1000)


@register_model
def diracnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiracNet-34 for ImageNet: 21,638,952 parameters with 1000 classes."""
    return create_diracnet("diracnet34", pretrained, kwargs, depth=34, width=1, images="large", num_classes=1000)
