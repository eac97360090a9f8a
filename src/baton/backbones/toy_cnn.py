"""Toy networks to compare spatial layers by: `toy_cnn`, and `njet_toy`, which is one with N-Jet layers.

Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412): tables
of its experiment 4 compare "2 and 4-layer toy architectures containing only convolutional layers followed by ReLU
activations", of ordinary, deformable, atrous and N-Jet layers, and experiment 1.2 watches the scale that such a network
learns. Widths are not given, nor how a map becomes scores; ours are

    layer1 .. layer<depth>   a spatial layer to `width` channels and a ReLU, full resolution

and global pooling with a linear classifier `fc`. Without poolings and strides nothing but its layers decides how far a
network sees. Convolutions are Kaiming normal over the fan-in, N-Jet layers have their own initialisation.
"""

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.layers.spatial import spatial_conv

#: As images of digits are usually normalised: grey, repeated to RGB.
MNIST_MEAN, MNIST_STD = (0.1307,) * 3, (0.3081,) * 3


class ToyCNN(PlainNetwork):
    """A row of spatial layers and ReLUs: (B, C, H, W) to (B, width, H, W) (layout: see the module).

    Args:
        depth: how many layers.
        width: channels of each.
        layer: `conv`, `njet`, `atrous` or `deformable`, see `spatial_conv`.
        kernel_size: side in pixels; that of N-Jet layers follows from their scales.
        layer_kwargs: further options of the layers, such as `order`, `sigma` or `dilation`.
        norm: BatchNorm after every layer, which then has no bias.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for what cannot be built.
    """

    def __init__(
        self,
        depth: int = 2,
        width: int = 32,
        layer: str = "conv",
        kernel_size: int = 3,
        layer_kwargs: dict[str, Any] | None = None,
        norm: bool = False,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        if depth < 1 or kernel_size < 1:
            raise ValueError(f"Expected depth and kernel_size of 1 or more, but got {depth} and {kernel_size}.")
        make = partial(spatial_conv, layer, **layer_kwargs or {})
        kernel = kernel_size if layer != "njet" else 3  # any of more than one pixel stands for it
        stages: Stages = {f"layer{number}": [Conv(width, kernel)] for number in range(1, depth + 1)}
        channels = self._add_stages(stages, in_chans, 1.0, norm, make, device=device, dtype=dtype)
        self._finish(channels, num_classes, global_pool, drop_rate)


def _cfg(first_conv: str | None) -> dict[str, Any]:
    """For MNIST."""
    return {
        "num_classes": 10,
        "input_size": (3, 28, 28),
        "pool_size": (28, 28),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": MNIST_MEAN,
        "std": MNIST_STD,
        "first_conv": first_conv,
        "classifier": "fc",
        "paper_name": "Resolution Learning in Deep Convolutional Networks Using Scale-Space Theory",
        "paper_ids": "arXiv:2106.03412",
    }


# timm cannot make weights of N-Jet layers fit other image channels
default_cfgs = generate_default_cfgs({"toy_cnn": _cfg("layer1.0"), "njet_toy": _cfg(None)})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    indices = tuple(range(kwargs.get("depth", 2)))
    return build_model_with_cfg(ToyCNN, variant, pretrained, feature_cfg={"out_indices": indices}, **kwargs)


@register_model
def toy_cnn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A toy network of any spatial layers: two ordinary 3×3 convolutions, 10,474 parameters, if nothing is said."""
    return _create("toy_cnn", pretrained, **kwargs)


@register_model
def njet_toy(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The toy network with N-Jet layers: two of order 3, 11,596 parameters, if nothing is said."""
    return _create("njet_toy", pretrained, **dict({"layer": "njet"}, **kwargs))
