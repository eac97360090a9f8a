"""Three networks that predict a class for every cell: `simplenet`, `fc_alexnet` and `fc_resnet18`.

They are the halves of the split-brain poster (Iyengar, Casabuena, Budhkar) in the layout of its public code: 96 pixels
become a map of 12 x 12 cells (`fc_resnet18`: 24 x 24, which the poster averages to 12 x 12) with `out_chans` channels,
the logits. A stage each:

    simplenet    conv 4/2 to 12 · conv 4/2 to 24 · conv 5 to 48 · conv 5 to 96 (each BatchNorm, ReLU) · conv 5
    fc_alexnet   conv 10/2 to 96 · pool, conv 5 to 256 · pool, conv 3 to 384 · conv 3 to 384 · conv 3 to 256 ·
                 pool, conv 7 dilated to 4096 · conv 1 to 4096 (each BatchNorm, ReLU) · conv 1
    fc_resnet18  conv 7/2, pool · two basic blocks each of 64, 128, 256 and `out_chans` channels, all at one resolution;
                 the last block's ReLU makes its logits non-negative, as in the code

Convolutions of the first two have biases and PyTorch's initialisation, those of the third Kaiming's over the fan-out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from baton.backbones.staged import StagedNetwork, check_options, scaled_width


class FullyConvolutional(StagedNetwork):
    """Base: the last stage's map holds the logits; a classifier on top of it is drawn as PyTorch draws it."""

    def _end(
        self, names: tuple[str, ...], info: list[tuple[int, int, int]], num_classes: int, pool: str, drop: float
    ) -> None:
        """Describe the stages (channels, reduction, cells that missing padding costs) and make the head."""
        self.stage_names = names
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "border": border, "module": name}
            for name, (channels, reduction, border) in zip(names, info, strict=True)
        ]
        self._finish(info[-1][0], num_classes, pool, drop)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw the classifier as PyTorch does."""
        linear.reset_parameters()


@dataclass(frozen=True)
class Row:
    """One convolution of a `ConvNet`.

    Attributes:
        width: channels; 0 is the last convolution's, which has neither BatchNorm nor ReLU.
        kernel: side in pixels.
        reduction: how much smaller than the image its map is.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
        pool: stride of a 3 × 3 maximum before it; 0: none.
        border: cells the map lacks because of missing padding.
    """

    width: int
    kernel: int
    reduction: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    pool: int = 0
    border: int = 0


SIMPLENET = (
    Row(12, 4, 2, stride=2, padding=1),
    Row(24, 4, 4, stride=2, padding=1),
    Row(48, 5, 4, border=4),
    Row(96, 5, 4, border=8),
    Row(0, 5, 4, border=12),
)
FC_ALEXNET = (
    Row(96, 10, 2, stride=2, padding=1, border=3),
    Row(256, 5, 4, padding=2, pool=2, border=1),
    Row(384, 3, 8, padding=1, pool=2),
    Row(384, 3, 8, padding=1),
    Row(256, 3, 8, padding=1),
    Row(4096, 7, 8, padding=6, dilation=2, pool=1),
    Row(4096, 1, 8),
    Row(0, 1, 8),
)


class ConvNet(FullyConvolutional):
    """A row of convolutions (layout: see the module).

    Args:
        rows: the convolutions.
        width: multiplier of all widths but the last.
        out_chans: channels of the last map.
        padded: pad what the rows leave unpadded, for small images.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map12`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        rows: tuple[Row, ...],
        width: float = 1.0,
        out_chans: int = 100,
        padded: bool = False,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        info, channels = [], in_chans
        for number, row in enumerate(rows, start=1):
            fill = padded and not row.padding
            padding = row.kernel // 2 if fill else row.padding
            out = scaled_width(row.width, width) if row.width else out_chans
            layers: list[nn.Module] = [nn.MaxPool2d(3, row.pool, 1)] if row.pool else []
            layers.append(nn.Conv2d(channels, out, row.kernel, row.stride, padding, row.dilation, **placed))
            if row.width:
                layers += [nn.BatchNorm2d(out, **placed), nn.ReLU()]
            self.add_module(f"conv{number}", nn.Sequential(*layers))
            info.append((out, row.reduction, 0 if fill else row.border))
            channels = out
        names = tuple(f"conv{number}" for number in range(1, len(rows) + 1))
        self._end(names, info, num_classes, global_pool, drop_rate)

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Refuse images of which the unpadded convolutions leave nothing."""
        last = self.feature_info[-1]
        needed = last["reduction"] * (last["border"] + 1)
        if min(x.shape[2:]) < needed:
            raise ValueError(
                f"Expected images of at least {needed} pixels a side, but got {x.shape[2]} x {x.shape[3]}; use larger "
                "ones, or padded=true."
            )
        return x


class FCResNet18(FullyConvolutional):
    """ResNet-18 whose stages all keep the stem's resolution, 3.3 M parameters (layout: see the module).

    Args:
        width: multiplier of all widths but the last.
        out_chans: channels of the last stage.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map12`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        width: float = 1.0,
        out_chans: int = 100,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        widths = [scaled_width(channels, width) for channels in (64, 128, 256)] + [out_chans]
        channels = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        info = [(channels, 4, 0)]
        for number, out in enumerate(widths, start=1):
            shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))
            first = BasicBlock(channels, out, downsample=shortcut if channels != out else None)
            self.add_module(f"stage{number}", nn.Sequential(first, BasicBlock(out, out)))
            info.append((out, 4, 0))
            channels = out
        self._end(("stem", "stage1", "stage2", "stage3", "stage4"), info, num_classes, global_pool, drop_rate)
        self.to(device=device, dtype=dtype)  # torchvision's blocks do not take these

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh: Kaiming normal over the fan-out for convolutions."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _cfg(first_conv: str) -> dict[str, Any]:
    """Pixels in [0, 1], as the code has them."""
    return {
        "num_classes": 1000,
        "input_size": (3, 96, 96),
        "pool_size": (12, 12),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": first_conv,
        "classifier": "fc",
        "paper_name": "Split-Brain Autoencoders (poster)",
    }


default_cfgs = generate_default_cfgs(
    {"simplenet": _cfg("conv1.0"), "fc_alexnet": _cfg("conv1.0"), "fc_resnet18": _cfg("stem.0")}
)


def _create(cls: type[FullyConvolutional], variant: str, pretrained: bool, stages: int, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg={"out_indices": tuple(range(stages))}, **kwargs)


@register_model
def simplenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Five convolutions of the split-brain poster: 389,440 parameters without a classifier for one input channel."""
    return _create(ConvNet, "simplenet", pretrained, len(SIMPLENET), rows=SIMPLENET, **kwargs)


@register_model
def fc_alexnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AlexNet without fully connected layers and groups, of the same poster: 72,316,420 parameters."""
    return _create(ConvNet, "fc_alexnet", pretrained, len(FC_ALEXNET), rows=FC_ALEXNET, **kwargs)


@register_model
def fc_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 at one resolution, of the same poster: 3,303,512 parameters."""
    return _create(FCResNet18, "fc_resnet18", pretrained, 5, **kwargs)
