"""Residual networks for small images: `resnet20`, `resnet32` and `resnet110`, and `resnet_cifar` for any depth.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385), section 4.2.
BatchNorm follows every convolution, and a ReLU every BatchNorm; in a block the last ReLU comes after the sum:

    conv1   3×3 convolution to 16 channels
    layer1  n blocks of 16 channels, full resolution
    layer2  n blocks of 32 channels, the first block halves the resolution, rounded up
    layer3  n blocks of 64 channels, the first block halves the resolution, rounded up

Global pooling and a linear classifier `fc` follow. The outputs of the three stages, after the ReLU of their last block,
are the entries of `feature_info`. With n = (depth - 2) / 6 the paper and a much used public code
(bearpaw/pytorch-classification) read "ResNet-110" differently, so that both must be built by their options:

    who     block         shortcut   resnet20     resnet32   resnet110   parameters with 10 classes
    paper   "basic"       "A"         269,722      464,154   1,727,962   the default here
            "basic"       "B"         272,474      466,906   1,730,714   the code below depth 44
            "bottleneck"  "B"                                1,704,154   the code from depth 44 on

- A basic block is two 3×3 convolutions. A bottleneck is 1×1, 3×3 (with the stride) and 1×1 to four times as many
  channels; the code keeps n = (depth - 2) / 6 = 18 blocks a stage, so that its "ResNet-110" has 164 layers.
- Where channels or resolution change, shortcut "A" takes every second pixel of each axis and appends channels of zeros:
  it has no parameters, and the paper has it "in all cases" on CIFAR. Shortcut "B" is a 1×1 convolution with BatchNorm.
  (Code that puts half of the zeros in front computes the same with its channels in another order.)

Initialisation is the code's: convolutions Gaussian with standard deviation sqrt(2 / fan-out), BatchNorm scales one and
shifts zero, the classifier's weights and biases uniform in ±1 / sqrt(fan-in). The paper refers to He et al., "Delving
Deep into Rectifiers" (arXiv:1502.01852), which prefers the fan-in and allows either. The paper subtracts a mean image;
here images are normalised by a mean and a standard deviation a channel, those of our other CIFAR networks.

Blocks are timm's, and so are the names of tensors, which are those of the code, too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork, check_options, draw_kaiming
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD

STEM_CHANNELS = 16
_BLOCKS: dict[str, Any] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class PaddedShortcut(nn.Module):
    """Shortcut "A" of section 3.3 of the paper: every `stride`-th pixel of each axis, and channels of zeros at the end.

    Args:
        extra: how many channels of zeros.
        stride: step in pixels.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Subsample and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Its arguments, for the printed network."""
        return f"extra={self.extra}, stride={self.stride}"


class CIFARResNet(StagedNetwork):
    """Residual network for small images: (B, C, H, W) to (B, 64, H / 4, W / 4), rounded up (layout: see the module).

    Bottlenecks give 256 channels. It obeys timm's protocol for models.

    Args:
        depth: 6n + 2, for n blocks a stage; the number of layers if blocks are basic.
        block: `basic` or `bottleneck`.
        shortcut: `A` (subsampled, zeros for new channels) or `B` (a projection), where the shape changes.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a depth, block, shortcut, drop rate or pooling that cannot be built.
    """

    stage_names = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        depth: int = 20,
        block: str = "basic",
        shortcut: str = "A",
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth)
        if block not in _BLOCKS:
            raise ValueError(f"Expected block 'basic' or 'bottleneck', but got {block!r}.")
        if shortcut not in ("A", "B"):
            raise ValueError(f"Expected shortcut 'A' (zero channels) or 'B' (projection), but got {shortcut!r}.")
        check_options(1.0, drop_rate)
        kind, placed = _BLOCKS[block], {"device": device, "dtype": dtype}

        self.conv1 = nn.Conv2d(in_chans, STEM_CHANNELS, 3, padding=1, bias=False, **placed)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS, **placed)
        self.feature_info: list[dict[str, Any]] = []
        channels = STEM_CHANNELS
        for i, name in enumerate(self.stage_names):
            inner, stride = STEM_CHANNELS * 2**i, 1 if i == 0 else 2
            out = inner * kind.expansion
            change = _shortcut(shortcut, channels, out, stride, **placed)
            rest = (kind(out, inner, **placed) for _ in range(blocks - 1))
            self.add_module(name, nn.Sequential(kind(channels, inner, stride, change, **placed), *rest))
            self.feature_info.append({"num_chs": out, "reduction": 2**i, "module": name})
            channels = out
        self._finish(channels, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as the code does (see the module)."""
        draw_kaiming(self, "fan_out")

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As PyTorch does, which is what the code does: uniform up to one over the square root of the fan-in."""
        linear.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates.

        Args:
            coarse: one layer for a whole stage instead of one for each block.
        """
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)\." if coarse else r"^layer(\d+)\.(\d+)\."}

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 16 height width"]:
        """The first convolution, BatchNorm and ReLU."""
        return F.relu(self.bn1(self.conv1(x)))


def _blocks_per_stage(depth: int) -> int:
    n, remainder = divmod(depth - 2, 6)
    if n >= 1 and remainder == 0:
        return n
    below = 6 * max(n, 1) + 2
    nearest = f"depths are {below} and {below + 6}" if n >= 1 else f"depth is {below}"
    raise ValueError(
        f"Expected a depth of 6n + 2 (3 stages of n blocks), but got {depth}; the nearest valid {nearest}."
    )


def _shortcut(kind: str, channels: int, out: int, stride: int, **placed: Any) -> nn.Module | None:
    """What stands on a block's shortcut: nothing where the shape stays."""
    if channels == out and stride == 1:
        return None
    if kind == "A":
        return PaddedShortcut(out - channels, stride)
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False, **placed), nn.BatchNorm2d(out, **placed))


def _cfg() -> dict[str, Any]:
    """For CIFAR."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_name": "Deep Residual Learning for Image Recognition",
        "paper_ids": "arXiv:1512.03385",
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in ("resnet_cifar", "resnet20", "resnet32", "resnet110")})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(CIFARResNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def resnet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any depth, block and shortcut: the arguments of `CIFARResNet`; ResNet-20 if none are given."""
    return _create("resnet_cifar", pretrained, **kwargs)


@register_model
def resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 of the paper: 269,722 parameters with 10 classes."""
    return _create("resnet20", pretrained, **dict({"depth": 20}, **kwargs))


@register_model
def resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 of the paper: 464,154 parameters with 10 classes."""
    return _create("resnet32", pretrained, **dict({"depth": 32}, **kwargs))


@register_model
def resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 of the paper: 1,727,962 parameters with 10 classes; for other readings see the module."""
    return _create("resnet110", pretrained, **dict({"depth": 110}, **kwargs))
