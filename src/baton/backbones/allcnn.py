"""All-CNN-C, a network for small images without pooling: `allcnn`.

Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for Simplicity: The All Convolutional Net", ICLR 2015 workshop
(arXiv:1412.6806), table 1. Convolutions have biases and are followed by a ReLU; two of stride 2 stand where the base
network pools, and a stage starts with one:

    stage1  dropout 0.2; 3×3 to 96, twice                                            full resolution
    stage2  3×3 to 96 with stride 2, dropout 0.5; 3×3 to 192, twice                  half
    stage3  3×3 to 192 with stride 2, dropout 0.5; 3×3 to 192 unpadded, 1×1 to 192   a quarter, less 2 cells (8 - 2 = 6)

Dropout only acts in training, where it is part of the published network.

The published network goes on with a 1×1 convolution to a channel a class, and averages its 6 × 6 cells. A 1×1
convolution is the same linear map at every cell, so that it may change places with the average: here the average of
stage3's map comes first (timm's `global_pool`) and the linear classifier `fc` (timm's `get_classifier`) second, with
the same weights, the same scores and the same 1,369,738 parameters. What cannot change places with an average is a
ReLU: the table lists one after this last convolution too, on the class scores. It is left out, because it would keep
scores from being negative and `fc` from being a classifier of pooled features. To load published weights, give `fc`
those of the 1×1 convolution without the last two dimensions.

The paper does not give the initialisation. Here all layers are Kaiming normal over the fan-in, with zero biases.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD


class AllCNN(PlainNetwork):
    """All-CNN-C: (B, C, H, W) to (B, 192, H / 4 - 2, W / 4 - 2), H / 4 rounded up (layout: see the module).

    Args:
        norm: BatchNorm after every convolution, which then has no bias; the paper has none.
        width: multiplier of all widths.
        input_drop_rate: dropout of the image's values.
        drop_rate: dropout after each convolution of stride 2, not before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map6`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        norm: bool = False,
        width: float = 1.0,
        input_drop_rate: float = 0.2,
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        if not 0 <= input_drop_rate < 1:
            raise ValueError(f"Expected input_drop_rate in [0, 1), but got {input_drop_rate}.")
        # dropouts of rate 0 stay, so that weights keep their names whatever the rates
        stages: Stages = {
            "stage1": [nn.Dropout(input_drop_rate), Conv(96), Conv(96)],
            "stage2": [Conv(96, stride=2), nn.Dropout(drop_rate), Conv(192), Conv(192)],
            "stage3": [Conv(192, stride=2), nn.Dropout(drop_rate), Conv(192, padding=0), Conv(192, 1)],
        }
        channels = self._add_stages(stages, in_chans, width, norm, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As the other convolutions: Kaiming normal over the fan-in, biases zero."""
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)


default_cfgs = generate_default_cfgs(
    {
        "allcnn": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (6, 6),
            "fixed_input_size": False,
            "min_input_size": (3, 9, 9),
            "crop_pct": 1.0,
            "mean": CIFAR_MEAN,  # the paper whitens images instead
            "std": CIFAR_STD,
            "first_conv": "stage1.1",
            "classifier": "fc",
            "paper_name": "Striving for Simplicity: The All Convolutional Net",
            "paper_ids": "arXiv:1412.6806",
        }
    }
)


@register_model
def allcnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """All-CNN-C: 1,369,738 parameters with 10 classes, 1,387,108 with 100."""
    return build_model_with_cfg(AllCNN, "allcnn", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)
