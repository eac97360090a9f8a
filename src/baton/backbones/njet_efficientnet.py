"""EfficientNet-B0 with N-Jet layers: `njet_efficientnet_b0`.

Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412), section
IV-A, experiment 3.2: timm's `efficientnet_b0` (Tan and Le, 2019) with N-Jet layers of order 2 in place of its spatial
convolutions: the first one and the depthwise ones, of 3×3 and 5×5 pixels. Strides are kept, because safe subsampling
"is reducing the feature map sizes too much". The code is not published; N-Jet weights start so that no map grows (see
`NJetConv2d`), and everything else is as in timm.

With 1000 classes there are 5,160,021 parameters of order 2 and 5,196,245 of order 3, and 5,288,548 in the original.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.converted import convert_backbone

#: Options of the N-Jet layers; all others are timm's.
JETS = ("order", "sigma", "learn_sigma", "extent", "size_rule", "evaluation", "init_std")


def _build(**kwargs: Any) -> nn.Module:
    jets = {"order": 2, **{name: kwargs.pop(name) for name in JETS if name in kwargs}}
    return convert_backbone("efficientnet_b0", "njet", layer_kwargs=jets, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "njet_efficientnet_b0": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": None,  # timm cannot make weights of N-Jet layers fit other image channels
            "classifier": "classifier",
            "paper_name": "Resolution Learning in Deep Convolutional Networks Using Scale-Space Theory",
            "paper_ids": "arXiv:2106.03412",
        }
    }
)


@register_model
def njet_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientNet-B0 with N-Jet layers of order 2: 5,160,021 parameters with 1000 classes."""
    options: dict[str, Any] = {"feature_cfg": {"feature_cls": "getter", "out_indices": None}, **kwargs}
    return build_model_with_cfg(_build, "njet_efficientnet_b0", pretrained, **options)
