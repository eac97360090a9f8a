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

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torchvision.models.resnet import BasicBlock

from baton.backbones.autoresolution_tower import check_tower, scaled_width
from baton.backbones.staged import StagedNetwork

#: The networks whose last map holds the logits of every cell.
PREDICTORS = ("simplenet", "fc_alexnet", "fc_resnet18")


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


class SimpleNet(FullyConvolutional):
    """Five convolutions, 389,440 parameters without a classifier for one input channel (layout: see the module).

    Args:
        width: multiplier of all widths but the last.
        out_chans: channels of the last map.
        padded: keep the map's size in the 5 × 5 convolutions, for images of fewer than 64 pixels.
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
        padded: bool = False,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_tower(width, drop_rate)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [scaled_width(channels, width) for channels in (12, 24, 48, 96)] + [out_chans]
        names, info, channels = tuple(f"conv{number}" for number in range(1, 6)), [], in_chans
        for index, (name, out) in enumerate(zip(names, widths, strict=True)):
            kernel, stride, padding = (4, 2, 1) if index < 2 else (5, 1, 2 if padded else 0)
            layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, stride, padding, **placed)]
            if index < 4:
                layers += [nn.BatchNorm2d(out, **placed), nn.ReLU()]
            self.add_module(name, nn.Sequential(*layers))
            info.append((out, 2 if index == 0 else 4, 0 if padded else 4 * max(index - 1, 0)))
            channels = out
        self._end(names, info, num_classes, global_pool, drop_rate)


class FCAlexNet(FullyConvolutional):
    """AlexNet without fully connected layers and groups, 72 M parameters (layout: see the module).

    Args:
        width: multiplier of all widths but the last.
        out_chans: channels of the last map.
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
        check_tower(width, drop_rate)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        # width, kernel, stride, padding, dilation; stride of the pooling before it (0: none); reduction, border
        rows = [
            (96, 10, 2, 1, 1, 0, 2, 3),
            (256, 5, 1, 2, 1, 2, 4, 1),
            (384, 3, 1, 1, 1, 2, 8, 0),
            (384, 3, 1, 1, 1, 0, 8, 0),
            (256, 3, 1, 1, 1, 0, 8, 0),
            (4096, 7, 1, 6, 2, 1, 8, 0),
            (4096, 1, 1, 0, 1, 0, 8, 0),
            (0, 1, 1, 0, 1, 0, 8, 0),
        ]
        names, info, channels = tuple(f"conv{number}" for number in range(1, 9)), [], in_chans
        for name, (wide, kernel, stride, padding, dilation, pool, reduction, border) in zip(names, rows, strict=True):
            out = scaled_width(wide, width) if wide else out_chans
            layers: list[nn.Module] = [nn.MaxPool2d(3, pool, 1)] if pool else []
            layers.append(nn.Conv2d(channels, out, kernel, stride, padding, dilation, **placed))
            if wide:
                layers += [nn.BatchNorm2d(out, **placed), nn.ReLU()]
            self.add_module(name, nn.Sequential(*layers))
            info.append((out, reduction, border))
            channels = out
        self._end(names, info, num_classes, global_pool, drop_rate)


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
        check_tower(width, drop_rate)
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


def _create(cls: type[FullyConvolutional], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    stages = {"simplenet": 5, "fc_alexnet": 8, "fc_resnet18": 5}[variant]
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg={"out_indices": tuple(range(stages))}, **kwargs)


@register_model
def simplenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Five convolutions of the split-brain poster."""
    return _create(SimpleNet, "simplenet", pretrained, **kwargs)


@register_model
def fc_alexnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Fully convolutional AlexNet of the split-brain poster."""
    return _create(FCAlexNet, "fc_alexnet", pretrained, **kwargs)


@register_model
def fc_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Fully convolutional ResNet-18 of the split-brain poster."""
    return _create(FCResNet18, "fc_resnet18", pretrained, **kwargs)
