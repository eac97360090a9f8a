"""Residual networks for small images with N-Jet layers: `njet_resnet32` and `njet_resnet110`.

Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412), section
IV-A, experiment 3.2: the networks of `resnet_cifar` (He et al., CVPR 2016) with N-Jet layers in place of all 3×3
convolutions, the first one included. How the first blocks of `layer2` and `layer3` make maps smaller is `subsample`:

    "safe"    N-Jet-ResNet-32: their first convolution has no stride, and subsamples as far as its scale allows
    "stride"  N-Jet-ResNet-110, where safe subsampling "is reducing the feature map sizes too much"

With safe subsampling, a shortcut interpolates its map to the side that the convolutions left. The code is not
published, nor which blocks its ResNet-110 has: `resnet_cifar` tells of both readings, of basic blocks and of
bottlenecks (whose 3×3 convolution alone becomes an N-Jet layer). Ours are basic, as its paper has them. Parameters with
10 classes:

    block         shortcut   order   njet_resnet32   njet_resnet110
    "basic"       "A"        2             310,441        1,154,999
                             3             515,433        1,919,095
    "bottleneck"  "B"        2                            1,413,761
                             3                            1,801,025

N-Jet weights start so that no map grows (the published code of `njet_nin` draws them from N(0, 1), with which the maps
of a fresh ResNet-110 overflow in evaluation mode); everything else is as in `resnet_cifar`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from baton.backbones.jets import Jets, check_subsample
from baton.backbones.resnet_cifar import CIFARResNet
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD


class ResizedShortcut(nn.Module):
    """Shortcut of a block whose convolutions choose the side: interpolated, new channels as in `resnet_cifar`.

    Args:
        channels: that enter.
        out: that leave.
        kind: `A`, zeros for new channels, or `B`, a projection.
        mode: of the interpolation.
        **placed: `device` and `dtype` of the projection.
    """

    def __init__(self, channels: int, out: int, kind: str, mode: str, **placed: Any) -> None:
        super().__init__()
        self.extra, self.mode = out - channels, mode
        if kind == "B":
            self.projection: nn.Module | None = nn.Sequential(
                nn.Conv2d(channels, out, 1, bias=False, **placed), nn.BatchNorm2d(out, **placed)
            )
        else:
            self.projection = None

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"], sides: tuple[int, int]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Resize and add channels.

        Args:
            x: the block's input.
            sides: of what its convolutions made of it.
        """
        if x.shape[2:] != sides:
            x = F.interpolate(x, sides, mode=self.mode)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra)) if self.projection is None else self.projection(x)

    def extra_repr(self) -> str:
        """Its arguments, for the printed network."""
        return f"extra={self.extra}, mode={self.mode!r}"


class ShrinkingBlock(BasicBlock):
    """timm's basic block, whose shortcut follows the side that its convolutions leave."""

    conv1: Any
    conv2: Any
    downsample: Any

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Convolve twice, resize the shortcut, add."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + self.downsample(x, tuple(y.shape[2:])))


class NJetResNet(CIFARResNet):
    """Residual network with N-Jet layers: (B, C, H, W) to (B, 64, H', W') (layout: see the module).

    Args:
        depth: 6n + 2, for n blocks a stage.
        subsample: `safe` or `stride`.
        block: `basic` or `bottleneck`.
        shortcut: `A` (subsampled, zeros for new channels) or `B` (a projection), where the shape changes.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.
        **jets: options of the N-Jet layers, see `Jets`; their order is 3 unless it is given.

    Raises:
        ValueError: for what cannot be built.
    """

    conv1: Any

    def __init__(
        self,
        depth: int = 32,
        subsample: str = "safe",
        block: str = "basic",
        shortcut: str = "A",
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **jets: Any,
    ) -> None:
        check_subsample(subsample, ("safe", "stride"))
        if subsample == "safe" and block == "bottleneck":
            raise ValueError(
                "Expected basic blocks with subsample='safe', but got 'bottleneck': use subsample='stride'."
            )
        super().__init__(depth, block, shortcut, drop_rate, num_classes, in_chans, global_pool, device, dtype)
        names = ("conv1", "conv2") if block == "basic" else ("conv2",)
        stages = [getattr(self, name) for name in self.stage_names]
        make = Jets(1 + len(names) * sum(map(len, stages)), **{"order": 3, **jets})
        self.conv1 = _like(self.conv1, make)
        reduction = 1.0
        for stage, info in zip(stages, self.feature_info, strict=True):
            for index, old in enumerate(stage):
                if subsample == "safe" and old.conv1.stride[0] > 1:
                    stage[index] = _shrinking(old, make, shortcut)
                    first = stage[index].conv1
                    reduction *= first.subsample.factor(first.conv.host_sigma)
                    continue
                for name in names:
                    setattr(old, name, _like(getattr(old, name), make))
            if subsample == "safe":
                info["reduction"] = reduction  # at the scales of the start
        self.init_weights()


def _like(conv: nn.Conv2d, make: Jets, subsampled: bool = False) -> nn.Module:
    """The N-Jet layer that takes a convolution's place."""
    placed: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    stride = conv.stride[0]
    return make(conv.in_channels, conv.out_channels, 3, stride, bias=False, subsampled=subsampled, **placed)


def _shrinking(block: BasicBlock, make: Jets, shortcut: str) -> ShrinkingBlock:
    """The block that takes the place of one with a stride."""
    weight, sizes = block.conv1.weight, (block.conv1.in_channels, block.conv1.out_channels)
    placed: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    made = ShrinkingBlock(*sizes, **placed)
    made.conv1, made.conv2 = _like(block.conv1, make, subsampled=True), _like(block.conv2, make)
    made.downsample = ResizedShortcut(*sizes, shortcut, made.conv1.subsample.mode, **placed)
    return made


def _cfg() -> dict[str, Any]:
    """For CIFAR."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,  # depends on the scales
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": None,  # timm cannot make weights of N-Jet layers fit other image channels
        "classifier": "fc",
        "paper_name": "Resolution Learning in Deep Convolutional Networks Using Scale-Space Theory",
        "paper_ids": "arXiv:2106.03412",
    }


default_cfgs = generate_default_cfgs({"njet_resnet32": _cfg(), "njet_resnet110": {**_cfg(), "pool_size": (8, 8)}})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(NJetResNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def njet_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 with N-Jet layers of order 3 and safe subsampling: 515,433 parameters with 10 classes."""
    return _create("njet_resnet32", pretrained, **dict({"depth": 32}, **kwargs))


@register_model
def njet_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 with N-Jet layers of order 2 and strides: 1,154,999 parameters with 10 classes."""
    return _create("njet_resnet110", pretrained, **dict({"depth": 110, "order": 2, "subsample": "stride"}, **kwargs))
