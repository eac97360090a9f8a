"""The convolutions of AlexNet with BatchNorm: `alexnet_bn`.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012, in the
layout of Caffe's AlexNet, which takes 227 pixels. A stage each; the pooling that ends three of them is a maximum of
3 × 3 with stride 2 that rounds up, as Caffe's does:

    conv1  11×11 with stride 4, unpadded, to 96, pooling      227 pixels become 55, then 27
    conv2  5×5 to 256, pooling                                                        13
    conv3  3×3 to 384                                                                 13
    conv4  3×3 to 384                                                                 13
    conv5  3×3 to 256, pooling                                                         6

What differs from the original: BatchNorm and a ReLU follow every convolution, which has no bias; there is no local
response normalisation, and no convolution is split into groups; the two fully connected layers of 4096 (fc6 and fc7)
are left out, so that images of any size fit: global pooling and a linear classifier follow conv5 (`global_pool: map6`
lets the classifier see the map of 6 × 6 that fc6 sees). Convolutions are Kaiming normal over the fan-out instead of
Gaussian with standard deviation 0.01, a scale that BatchNorm would cancel.

torchvision's AlexNet (64, 192, 384, 256, 256 channels, padding 2) is Krizhevsky's later one-column network.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


class AlexNetBN(PlainNetwork):
    """AlexNet's convolutions with BatchNorm: (B, C, 227, 227) to (B, 256, 6, 6) (layout: see the module).

    Args:
        width: multiplier of all widths.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map6`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images below 39 pixels.
    """

    fan = "fan_out"

    def __init__(
        self,
        width: float = 1.0,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        stages: Stages = {
            "conv1": [Conv(96, 11, stride=4, padding=0), _pool()],
            "conv2": [Conv(256, 5), _pool()],
            "conv3": [Conv(384)],
            "conv4": [Conv(384)],
            "conv5": [Conv(256), _pool()],
        }
        channels = self._add_stages(stages, in_chans, width, norm=True, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool, drop_rate)


default_cfgs = generate_default_cfgs(
    {
        "alexnet_bn": {
            "num_classes": 1000,
            "input_size": (3, 227, 227),
            "pool_size": (6, 6),
            "fixed_input_size": False,
            "min_input_size": (3, 39, 39),
            "crop_pct": 0.887,  # 227 of 256
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1.0",
            "classifier": "fc",
            "paper_name": "ImageNet Classification with Deep Convolutional Neural Networks",
        }
    }
)


@register_model
def alexnet_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AlexNet's convolutions with BatchNorm: 4,005,576 parameters with 1000 classes."""
    indices = tuple(range(5))
    return build_model_with_cfg(AlexNetBN, "alexnet_bn", pretrained, feature_cfg={"out_indices": indices}, **kwargs)
