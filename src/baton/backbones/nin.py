"""Networks in networks for small images: `nin` and `nin_thin`.

Lin, Chen and Yan, "Network In Network" (arXiv:1312.4400), in the layout of the public code of "Wide Residual Networks"
(Zagoruyko and Komodakis, 2016), which adds BatchNorm, drops dropout and ends with global pooling and a linear
classifier. Every convolution is followed by BatchNorm and a ReLU and has no bias:

    group1  5×5 to 192, 1×1 to 160, 1×1 to 96                                      full resolution
    group2  maximum of 3×3, stride 2, then 5×5 to 192, 1×1 to 192, 1×1 to 192      half
    group3  average of 3×3, stride 2, then 3×3 to 192, 1×1 to 192, 1×1 to 192      a quarter

Poolings round up (32, 16 and 8 cells of 32 pixels); a window that hangs over the edge averages what it sees. A pooling
opens its group, so that the three entries of `feature_info` are what precedes a reduction, the maps that attention
transfer compares (chapter 6 of Zagoruyko's thesis: "last pre-downsampling activation maps").

The thesis distils a NIN-wide of 1 M parameters, which most probably is `nin`, into a NIN-thin of 0.2 M, whose widths it
does not give. `nin_thin` is our choice: `nin` with all widths halved, 0.26 M. The thesis's students of input gradients
have no BatchNorm, and "no ReLU activations before pooling layers, which leads to better performance without batch
normalization, and worse with" (section 6.4.1.3): `relu_before_pool=False`. We count the global pooling at the end among
them, so that every group then ends with its last convolution (and BatchNorm), and attention compares signed maps.

Initialisation is the code's: convolutions Gaussian with standard deviation sqrt(2 / fan-in), BatchNorm scales uniform
in (0, 1) and shifts zero, the classifier's weights and biases uniform in ±1 / sqrt(fan-in).
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.backbones.wide_resnet import CIFAR_MEAN, CIFAR_STD


class NIN(PlainNetwork):
    """Network in network: (B, C, H, W) to (B, 192, H / 4, W / 4), rounded up (layout: see the module).

    Args:
        norm: BatchNorm after every convolution; without it, convolutions have biases, which start at zero.
        relu_before_pool: a ReLU also after the last convolution of each group, which a pooling follows.
        width: multiplier of all widths.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        norm: bool = True,
        relu_before_pool: bool = True,
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
        maximum, average = nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True)
        relu = relu_before_pool
        stages: Stages = {
            "group1": [Conv(192, 5), Conv(160, 1), Conv(96, 1, relu=relu)],
            "group2": [maximum, Conv(192, 5), Conv(192, 1), Conv(192, 1, relu=relu)],
            "group3": [average, Conv(192, 3), Conv(192, 1), Conv(192, 1, relu=relu)],
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


def _cfg() -> dict[str, Any]:
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
        "first_conv": "group1.0",
        "classifier": "fc",
        "paper_name": "Network In Network",
        "paper_ids": "arXiv:1312.4400",
    }


default_cfgs = generate_default_cfgs({"nin": _cfg(), "nin_thin": _cfg()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(NIN, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def nin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network in network of the Wide ResNets' code: 1,005,642 parameters with 10 classes."""
    return _create("nin", pretrained, **kwargs)


@register_model
def nin_thin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The same with all widths halved: 256,298 parameters with 10 classes."""
    return _create("nin_thin", pretrained, **dict({"width": 0.5}, **kwargs))
