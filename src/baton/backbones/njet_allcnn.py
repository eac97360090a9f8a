"""All-CNN-C with N-Jet layers: `njet_allcnn`.

Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412), section
IV-A, experiment 3.2: N-Jet layers in place of the seven 3×3 convolutions of `allcnn`, without its strides, and safe
subsampling after every one. As these layers need it, BatchNorm stands behind every convolution, which has no bias:

    stage1  dropout 0.2; N-Jet to 96, twice
    stage2  N-Jet to 96, dropout 0.5; N-Jet to 192, twice
    stage3  N-Jet to 192, dropout 0.5; N-Jet to 192, 1×1 to 192

The code is not published. Ours are: that the layer which is unpadded in the original keeps the map's side; dropout,
which stays where the original has it; the initialisation, N(0, 1) for N-Jet weights as in the published code of
`njet_nin`, Kaiming normal over the fan-in for the others; and a classifier like that of `allcnn`, a linear one after
the average. With BatchNorm in place of its bias there would be a parameter a class more: 927,771 of order 2.
"""

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.jets import Jets, check_subsample
from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD


class NJetAllCNN(PlainNetwork):
    """All-CNN-C with N-Jet layers: (B, C, H, W) to (B, 192, H', W') (layout: see the module).

    Args:
        subsample: `safe`, after every N-Jet layer; `stride`, the original's two strides; `none`.
        width: multiplier of all widths.
        input_drop_rate: dropout of the image's values.
        drop_rate: dropout in stage 2 and 3, not before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map6`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.
        **jets: options of the seven N-Jet layers, see `Jets`; their order is 3 and `init_std` is 1 unless they are
            given.

    Raises:
        ValueError: for what cannot be built.
    """

    def __init__(
        self,
        subsample: str = "safe",
        width: float = 1.0,
        input_drop_rate: float = 0.2,
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **jets: Any,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        check_subsample(subsample, ("safe", "stride", "none"))
        if not 0 <= input_drop_rate < 1:
            raise ValueError(f"Expected input_drop_rate in [0, 1), but got {input_drop_rate}.")
        stride = 2 if subsample == "stride" else 1
        stages: Stages = {
            "stage1": [nn.Dropout(input_drop_rate), Conv(96), Conv(96)],
            "stage2": [Conv(96, stride=stride), nn.Dropout(drop_rate), Conv(192), Conv(192)],
            "stage3": [Conv(192, stride=stride), nn.Dropout(drop_rate), Conv(192), Conv(192, 1)],
        }
        make = partial(Jets(7, **{"order": 3, "init_std": 1.0, **jets}), subsampled=subsample == "safe")
        channels = self._add_stages(stages, in_chans, width, True, make, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As the 1×1 convolution: Kaiming normal over the fan-in, biases zero."""
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)


default_cfgs = generate_default_cfgs(
    {
        "njet_allcnn": {
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
    }
)


@register_model
def njet_allcnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """All-CNN-C with N-Jet layers: 1,518,737 parameters of order 3 with 10 classes, 927,761 of order 2."""
    return build_model_with_cfg(NJetAllCNN, "njet_allcnn", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)
