"""Plain twins of the DiracNets: the same networks with ordinary convolutions, `plain_10_1` to `plain_100_1`.

The baselines of Zagoruyko's thesis, section 5.3.3 ("Plain networks with Dirac parameterization", figure 5.5): layers of
ReLU, 3×3 convolution and BatchNorm without any skip-connection, explicit or implicit. Those of more than about 34
layers are meant to train badly. `plain18` and `plain34` are for ImageNet, where the thesis has none. With `norm=False`
they are what `baton.layers.fold` makes of a trained DiracNet. The network itself is in `diracnet.py`.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from baton.backbones.diracnet import LARGE_GROUPS, SIZES, create_diracnet, large_config, small_config

default_cfgs = generate_default_cfgs(
    {
        **{f"plain_{size}": small_config() for size in SIZES},
        **{f"plain{depth}": large_config() for depth in LARGE_GROUPS},
    }
)


@register_model
def plain_10_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-10-1: 75,290 parameters with 10 classes."""
    return create_diracnet("plain_10_1", pretrained, kwargs, depth=10, width=1, dirac=False)


@register_model
def plain_16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-16-1: 172,506 parameters with 10 classes."""
    return create_diracnet("plain_16_1", pretrained, kwargs, depth=16, width=1, dirac=False)


@register_model
def plain_28_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-28-1: 366,938 parameters with 10 classes."""
    return create_diracnet("plain_28_1", pretrained, kwargs, depth=28, width=1, dirac=False)


@register_model
def plain_28_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-28-5: 9,115,290 parameters with 10 classes."""
    return create_diracnet("plain_28_5", pretrained, kwargs, depth=28, width=5, dirac=False)


@register_model
def plain_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-28-10: 36,432,170 parameters with 10 classes."""
    return create_diracnet("plain_28_10", pretrained, kwargs, depth=28, width=10, dirac=False)


@register_model
def plain_34_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-34-1: 464,154 parameters with 10 classes."""
    return create_diracnet("plain_34_1", pretrained, kwargs, depth=34, width=1, dirac=False)


@register_model
def plain_34_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-34-2: 1,849,898 parameters with 10 classes."""
    return create_diracnet("plain_34_2", pretrained, kwargs, depth=34, width=2, dirac=False)


@register_model
def plain_52_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-52-1: 755,802 parameters with 10 classes."""
    return create_diracnet("plain_52_1", pretrained, kwargs, depth=52, width=1, dirac=False)


@register_model
def plain_100_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-100-1: 1,533,530 parameters with 10 classes."""
    return create_diracnet("plain_100_1", pretrained, kwargs, depth=100, width=1, dirac=False)


@register_model
def plain18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-18 for ImageNet: 11,515,688 parameters with 1000 classes."""
    return create_diracnet(
        "plain18", pretrained, kwargs, depth=18, width=1, images="large", num_classes=1000, dirac=False
    )


@register_model
def plain34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of DiracNet-34 for ImageNet: 21,623,848 parameters with 1000 classes."""
    return create_diracnet(
        "plain34", pretrained, kwargs, depth=34, width=1, images="large", num_classes=1000, dirac=False
    )
