"""VGG-16 and VGG-19 for images of 32 pixels: `vgg16_small` and `vgg19_small`.

Both are from Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015
(arXiv:1409.1556). All convolutions are 3 × 3 with padding 1, each followed by BatchNorm (the paper has none) and a
ReLU. A stage ends with its pooling, a maximum of 2 × 2 with stride 2. `vgg16_small` has the 13 of configuration D:

    stage1  2 convolutions to  64 channels, pooling      32 pixels become 16
    stage2  2 convolutions to 128 channels, pooling                        8
    stage3  3 convolutions to 256 channels, pooling                        4
    stage4  3 convolutions to 512 channels, pooling                        2
    stage5  3 convolutions to 512 channels, pooling                        1

Global pooling and one linear classifier take the place of the paper's three fully connected layers. This small VGG-16
is ours, and so is its initialisation: Kaiming normal over the fan-out for convolutions, a standard deviation of 0.01
for the classifier, as torchvision draws its VGGs. timm's own `vgg16` and `vgg16_bn` are the full-size networks.

`vgg19_small` has the 16 of configuration E, four in each of stages 3, 4 and 5, as the public code of "Wide Residual
Networks" (Zagoruyko and Komodakis, 2016) has them, where it is a baseline. There, BatchNorm adds 1e-3 to the variance,
convolutions have no bias, poolings round up, and the last one is an average (a window that hangs over the edge averages
what it sees). Initialisation is that code's: convolutions Gaussian with standard deviation sqrt(2 / fan-in), BatchNorm
scales uniform in (0, 1) and shifts zero, the classifier's weights and biases uniform in ±1 / sqrt(fan-in).
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD

#: Channels of the convolutions of each stage.
VGG16 = {
    "stage1": (64, 64),
    "stage2": (128, 128),
    "stage3": (256, 256, 256),
    "stage4": (512, 512, 512),
    "stage5": (512, 512, 512),
}
VGG19 = {
    "stage1": (64, 64),
    "stage2": (128, 128),
    "stage3": (256, 256, 256, 256),
    "stage4": (512, 512, 512, 512),
    "stage5": (512, 512, 512, 512),
}


class VGGSmall(PlainNetwork):
    """VGG-16 with a single linear classifier: (B, C, H, W) to (B, 512, H // 32, W // 32) (layout: see the module).

    Args:
        norm: BatchNorm after every convolution, which then has no bias.
        width: multiplier of all widths.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map2`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images below 32 pixels.
    """

    fan = "fan_out"

    def __init__(
        self,
        norm: bool = True,
        width: float = 1.0,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        stages: Stages = {name: [*map(Conv, widths), nn.MaxPool2d(2, 2)] for name, widths in VGG16.items()}
        channels = self._add_stages(stages, in_chans, width, norm, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool, drop_rate)


class VGG19Small(PlainNetwork):
    """VGG-19 with a single linear classifier: (B, C, H, W) to (B, 512, H / 32, W / 32), rounded up (see the module).

    Args:
        norm: BatchNorm after every convolution; without it, convolutions have biases, which start at zero.
        width: multiplier of all widths.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map2`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built.
    """

    norm_eps = 1e-3

    def __init__(
        self,
        norm: bool = True,
        width: float = 1.0,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        stages: Stages = {
            name: [*map(Conv, widths), (nn.AvgPool2d if name == "stage5" else nn.MaxPool2d)(2, 2, ceil_mode=True)]
            for name, widths in VGG19.items()
        }
        channels = self._add_stages(stages, in_chans, width, norm, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as the code does (see the module)."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As PyTorch does, which is what the code does: uniform up to one over the square root of the fan-in."""
        linear.reset_parameters()


def _cfg(min_side: int) -> dict[str, Any]:
    """For CIFAR."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (1, 1),
        "fixed_input_size": False,
        "min_input_size": (3, min_side, min_side),
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "stage1.0",
        "classifier": "fc",
        "paper_name": "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        "paper_ids": "arXiv:1409.1556",
    }


default_cfgs = generate_default_cfgs({"vgg16_small": _cfg(32), "vgg19_small": _cfg(1)})


def _create(network: type[PlainNetwork], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(network, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3, 4)}, **kwargs)


@register_model
def vgg16_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 for 32 pixels: 14,724,042 parameters with 10 classes, 14,719,818 without BatchNorm."""
    return _create(VGGSmall, "vgg16_small", pretrained, **kwargs)


@register_model
def vgg19_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-19 of the Wide ResNets' code: 20,035,018 parameters with 10 classes."""
    return _create(VGG19Small, "vgg19_small", pretrained, **kwargs)
