"""The N-Jet paper's network in network, and its plain twin: `njet_nin` and `njet_nin_plain`.

Pintea, Tomen, Goes, Loog and van Gemert, "Resolution learning in deep convolutional networks using scale-space theory"
(IEEE Transactions on Image Processing 30, 2021; arXiv:2106.03412), section IV-A, and its public code. The baseline is
that of Lin, Chen and Yan (arXiv:1312.4400) with a BatchNorm behind every convolution, which has no bias:

    group1  5×5 to 192, 1×1 to 160, 1×1 to 96                                                  full resolution
    group2  maximum of 3×3, stride 2, dropout 0.5, then 5×5 to 192, 1×1 to 192, 1×1 to 192     half
    group3  average of 3×3, stride 2, dropout 0.5, then 3×3 to 192, 1×1 to 192                 a quarter

(`nin` is another one: the Wide ResNets' code has no dropout and a convolution more.) N-Jet layers replace the three
spatial convolutions, and how maps become smaller is `subsample`:

    "safe"  the paper's: no poolings; every N-Jet layer subsamples as far as its scale allows
    "pool"  the baseline's poolings, of table I
    "none"  neither: maps keep the image's side, as in the released code, and in experiment 1.1 of the baseline

Where paper and code disagree beside, they are options: filter sizes (`size_rule`) and safe subsampling (`rule`). The
code switches the latter off; we follow the paper.

The network goes on with a 1×1 convolution to a channel a class, with BatchNorm and a ReLU in the code, and averages the
map. A 1×1 convolution may change places with the average: here, as in `allcnn`, timm's pooling comes first and the
linear classifier `fc` second. What may not change places is left out: BatchNorm and ReLU on the class scores, which
would keep them from being negative and `fc` from being a classifier of pooled features. So there is a bias instead of
BatchNorm's two vectors, and one parameter a class less than in the code: with 10 classes 968,394 of the baseline
instead of 968,404 (with 100 classes 985,764 instead of 985,864), and of the N-Jet network of order 2 496,653 instead of
496,663, of order 3 720,141, of order 4 999,501 (with 100 classes 17,370 more).

Initialisation is the code's: PyTorch's own for convolutions and the classifier, N(0, 1) for the weights α of N-Jet
layers, whose scales start at 1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.jets import Jets, check_subsample
from baton.backbones.plain import Conv, Make, PlainNetwork, Stages
from baton.backbones.staged import check_options
from baton.layers.njet import NJetConv2d

#: As the code normalises CIFAR's images.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class _BaselineNIN(PlainNetwork):
    """The layout that both networks share."""

    def _build(
        self, kernels: Sequence[int], pooled: bool, width: float, drop_rate: float, make: Make | None, **rest: Any
    ) -> None:
        """Build stages and head.

        Args:
            kernels: of the spatial convolutions.
            pooled: whether there are poolings; without them something stands in their place, so that weights keep
                their names.
            width: multiplier of all widths.
            drop_rate: dropout before the second and the third group.
            make: what stands for spatial convolutions.
            **rest: `num_classes`, `in_chans`, `global_pool`, `device` and `dtype`.
        """
        check_options(width, drop_rate)
        poolings = [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)] if pooled else [nn.Identity(), nn.Identity()]
        first, second, third = kernels
        stages: Stages = {
            "group1": [Conv(192, first), Conv(160, 1), Conv(96, 1)],
            "group2": [poolings[0], nn.Dropout(drop_rate), Conv(192, second), Conv(192, 1), Conv(192, 1)],
            "group3": [poolings[1], nn.Dropout(drop_rate), Conv(192, third), Conv(192, 1)],
        }
        placed = {"device": rest["device"], "dtype": rest["dtype"]}
        channels = self._add_stages(stages, rest["in_chans"], width, True, make, **placed)
        self._finish(channels, rest["num_classes"], rest["global_pool"])

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as the code does (see the module)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | NJetConv2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                self.init_classifier(module)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """As PyTorch does: uniform up to one over the square root of the fan-in."""
        linear.reset_parameters()


class NJetNIN(_BaselineNIN):
    """Network in network with N-Jet layers: (B, C, H, W) to (B, 192, H', W') (layout: see the module).

    Args:
        subsample: `safe`, `pool` or `none`.
        width: multiplier of all widths.
        drop_rate: dropout before the second and the third group, not before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.
        **jets: options of the three N-Jet layers, see `Jets`; their `init_std` is 1 unless it is given.

    Raises:
        ValueError: for what cannot be built.
    """

    def __init__(
        self,
        subsample: str = "safe",
        width: float = 1.0,
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **jets: Any,
    ) -> None:
        super().__init__()
        check_subsample(subsample, ("safe", "pool", "none"))
        make = partial(Jets(3, **{"init_std": 1.0, **jets}), subsampled=subsample == "safe")
        rest = {"num_classes": num_classes, "in_chans": in_chans, "global_pool": global_pool}
        self._build((5, 5, 3), subsample == "pool", width, drop_rate, make, device=device, dtype=dtype, **rest)


class BaselineNIN(_BaselineNIN):
    """The paper's baseline: (B, C, H, W) to (B, 192, H / 4, W / 4), rounded up (layout: see the module).

    Args:
        kernel_sizes: of the three spatial convolutions, odd.
        subsample: `pool`, or `none`, which keeps the image's side.
        width: multiplier of all widths.
        drop_rate: dropout before the second and the third group, not before the classifier.
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
        kernel_sizes: Sequence[int] = (5, 5, 3),
        subsample: str = "pool",
        width: float = 1.0,
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_subsample(subsample, ("pool", "none"))
        if len(kernel_sizes) != 3 or not all(size > 0 and size % 2 for size in kernel_sizes):
            raise ValueError(f"Expected three odd kernel_sizes, such as [5, 5, 3], but got {list(kernel_sizes)}.")
        rest = {"num_classes": num_classes, "in_chans": in_chans, "global_pool": global_pool}
        self._build(kernel_sizes, subsample == "pool", width, drop_rate, None, device=device, dtype=dtype, **rest)


def _cfg(first_conv: str | None) -> dict[str, Any]:
    """For CIFAR, as the code has it."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": None,  # depends on the scales
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": MEAN,
        "std": STD,
        "first_conv": first_conv,  # timm cannot make weights of N-Jet layers fit other image channels
        "classifier": "fc",
        "paper_name": "Resolution Learning in Deep Convolutional Networks Using Scale-Space Theory",
        "paper_ids": "arXiv:2106.03412",
    }


default_cfgs = generate_default_cfgs(
    {"njet_nin": _cfg(None), "njet_nin_plain": {**_cfg("group1.0"), "pool_size": (8, 8)}}
)


@register_model
def njet_nin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The N-Jet paper's network in network: 496,653 parameters of order 2 with 10 classes."""
    return build_model_with_cfg(NJetNIN, "njet_nin", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def njet_nin_plain(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Its baseline, of ordinary convolutions: 968,394 parameters with 10 classes."""
    options: dict[str, Any] = {"feature_cfg": {"out_indices": (0, 1, 2)}, **kwargs}
    return build_model_with_cfg(BaselineNIN, "njet_nin_plain", pretrained, **options)
