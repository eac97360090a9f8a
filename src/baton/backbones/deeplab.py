"""DeepLabv2: a residual network that keeps its resolution, and atrous spatial pyramid pooling (ASPP) on top of it.

Chen, Papandreou, Kokkinos, Murphy and Yuille, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets,
Atrous Convolution, and Fully Connected CRFs" (TPAMI 2018, arXiv:1606.00915). ASPP is a sum of four convolutions of
3 x 3 with dilations of 6, 12, 18 and 24. In its place Pintea, Tomen, Goes, Loog and van Gemert, "Resolution learning in
deep convolutional networks using scale-space theory" (IEEE TIP 2021), section IV-B, experiment 2, have four N-Jet
layers with scales of their own and the same weights. `aspp` chooses:

    "atrous"          four convolutions                                      4 · 9 · 2048 · 21 = 1,548,288 weights
    "atrous_shared"   the same weights at all four dilations                     9 · 2048 · 21 =   387,072
    "njet"            the same weights at four learned scales, order 3          10 · 2048 · 21 =   430,080 and 4 scales
                      (order 1: 3 · 2048 · 21 = 129,024)

for `resnet101` and 21 channels, beside 21 biases (four times 21 for "atrous") and the trunk's 42,500,160 parameters.

Where we differ:

- DeepLabv2's ASPP gives the scores of the classes. Here it gives `width` channels, the network's features, and timm's
  linear classifier `fc` makes scores of them. With `width` the number of classes, 21 for Pascal VOC, the two linear
  layers can say what the one can; they have 462 parameters more. `fc` starts orthogonal, so that scores and gradients
  begin as large as without it.
- The trunk is timm's, with strides in the 3 x 3 convolution of a bottleneck and, by default, for normalised RGB images.
- One scale of the image: DeepLabv2 trains and tests at three, and takes the maximum. No CRF.
- The paper does not say where its scales start. Here σ = rate / extent, so that N-Jet filters begin with the windows of
  the atrous ones, 2 · rate + 1 pixels.

Initialisation of the convolutions of ASPP is DeepLabv2's: Gaussian of standard deviation 0.01, biases zero; N-Jet
weights have the rule of their layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from baton.backbones.factory import create_backbone
from baton.backbones.headed import HeadedNetwork
from baton.layers import NJetPyramid2d

KINDS = ("atrous", "atrous_shared", "njet")
RATES = (6, 12, 18, 24)


class AtrousPyramid(nn.Module):
    """Sum of 3 x 3 convolutions with different dilations: (B, in, H, W) to (B, out, H, W).

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        rates: the dilations.
        shared: one weight, and one bias, for all of them.
        placed: `device` and `dtype` of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int], shared: bool, **placed: Any) -> None:
        super().__init__()
        self.rates, self.shared = tuple(rates), shared
        count = 1 if shared else len(rates)
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 3, **placed) for _ in range(count))

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h w"]:
        """Convolve with every dilation, and add."""
        parts = []
        for number, rate in enumerate(self.rates):
            conv: Any = self.branches[0 if self.shared else number]
            bias = None if self.shared and number else conv.bias  # once
            parts.append(F.conv2d(x, conv.weight, bias, padding=rate, dilation=rate))
        return torch.stack(parts).sum(0)

    def extra_repr(self) -> str:
        """Its arguments, for the printed network."""
        return f"rates={self.rates}, shared={self.shared}"


class DeepLab(HeadedNetwork):
    """DeepLabv2 (layout: see the module): (B, C, H, W) to (B, width, H / 8, W / 8), rounded up.

    `feature_info` lists the trunk's maps, its final norm applied to the last where there is one, and that of ASPP.

    Args:
        base: name of the trunk, a backbone of timm's that can keep its resolution, such as a ResNet.
        base_kwargs: further arguments of the trunk.
        output_stride: how much smaller than the image the trunk's map is, 8 or 16 (its later strides become
            dilations); 32 leaves the trunk as it is, whatever its reduction.
        aspp: `atrous`, `atrous_shared` or `njet`, see the module.
        width: channels that ASPP gives.
        order: of the derivatives of `njet`.
        sigmas: scales of `njet` at the start, in cells of the trunk's map; None: rates / extent.
        rates: dilations of the atrous kinds.
        extent: half side of an N-Jet filter, in scales.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for another kind of ASPP, a base without maps or output stride, or scales that cannot be.
    """

    def __init__(
        self,
        base: str = "resnet101",
        base_kwargs: dict[str, Any] | None = None,
        output_stride: int = 8,
        aspp: str = "atrous",
        width: int = 21,
        order: int = 3,
        sigmas: Sequence[float] | None = None,
        rates: Sequence[int] = RATES,
        extent: float = 2.0,
        drop_rate: float = 0.0,
        num_classes: int = 21,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(base_kwargs, output_stride, aspp, width, rates)
        if sigmas is not None and aspp != "njet":
            raise ValueError(f"Expected sigmas with aspp='njet' alone, but aspp is {aspp!r}: its dilations are rates.")
        stride = {} if output_stride == 32 else {"output_stride": output_stride}
        trunk: Any = create_backbone(base, **{**(base_kwargs or {}), **stride, "in_chans": in_chans, "num_classes": 0})
        if not hasattr(trunk, "forward_intermediates"):
            raise ValueError(f"Expected a base with spatial maps, but {base!r} has none.")
        trunk.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # no weight that no map depends on
        self.trunk = trunk.to(device=device, dtype=dtype)
        last = trunk.feature_info[-1]
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        if aspp == "njet":
            scales = [rate / extent for rate in rates] if sigmas is None else sigmas
            self.aspp: nn.Module = NJetPyramid2d(last["num_chs"], width, scales, order, extent, **placed)
        else:
            self.aspp = AtrousPyramid(last["num_chs"], width, rates, aspp == "atrous_shared", **placed)
            for conv in self.aspp.branches:
                nn.init.normal_(conv.weight, std=0.01)  # type: ignore[arg-type]
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.feature_info = [{**info, "module": f"trunk.{info['module']}"} for info in trunk.feature_info]
        self.feature_info.append({"num_chs": width, "reduction": last["reduction"], "module": "aspp"})
        self.num_features, self.head_drop_rate = width, drop_rate
        self._set_head(num_classes, global_pool)
        if isinstance(self.fc, nn.Linear):
            self.init_classifier(self.fc)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw a classifier that keeps the size of what it sees."""
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the trunk names."""
        names = self.trunk.no_weight_decay() if hasattr(self.trunk, "no_weight_decay") else ()
        return {f"trunk.{name}" for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The trunk's patterns, and one for ASPP.

        Args:
            coarse: as the trunk has it.
        """
        own = self.trunk.group_matcher(coarse=coarse)
        return {**{name: _of_trunk(pattern) for name, pattern in own.items()}, "aspp": r"^aspp"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in the backward pass instead of keeping them."""
        self.trunk.set_grad_checkpointing(enable)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the trunk, and that of ASPP.

        Args:
            x: normalised images.
            indices: which maps, from 0; an integer takes the last that many, None all.
            norm: nothing: the trunk's final norm is always applied.
            stop_early: skip what follows the last map that is wanted.
            output_fmt: only `"NCHW"`.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Expected output_fmt 'NCHW', the only layout of this network, but got {output_fmt!r}.")
        final = len(self.feature_info) - 1
        taken, last = feature_take_indices(final + 1, indices)  # type: ignore[arg-type]
        stop_early = stop_early and last < final
        wanted = list(range(last + 1)) if stop_early else None
        maps = self.trunk.forward_intermediates(
            x, indices=wanted, norm=True, stop_early=stop_early, output_fmt="NCHW", intermediates_only=True
        )
        maps = maps if stop_early else [*maps, self.aspp(maps[-1])]
        found = [maps[index] for index in taken]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the wanted maps do not need.

        Args:
            indices: wanted maps, as in `forward_intermediates`.
            prune_norm: as the trunk has it.
            prune_head: drop the pooling and classifier too.

        Returns:
            The wanted indices, counted from 0.
        """
        final = len(self.feature_info) - 1
        taken, last = feature_take_indices(final + 1, indices)  # type: ignore[arg-type]
        if last < final:
            self.trunk.prune_intermediate_layers([last], prune_norm, True)
            self.aspp = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
            self.feature_info = self.feature_info[: last + 1] + self.feature_info[last : last + 1]
        if last < final or prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The map of ASPP."""
        maps = self.trunk.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return self.aspp(maps[-1])


def _of_trunk(pattern: Any) -> Any:
    """A pattern of the trunk's parameter names as one of ours, at whatever depth timm nests it."""
    if isinstance(pattern, str):
        return rf"^trunk\.(?:{pattern.removeprefix('^')})"
    if isinstance(pattern, tuple):  # (pattern, position)
        return (_of_trunk(pattern[0]), *pattern[1:])
    return [_of_trunk(part) for part in pattern]


def _check(base_kwargs: dict[str, Any] | None, output_stride: int, aspp: str, width: int, rates: Sequence[int]) -> None:
    """Refuse what cannot be built."""
    if aspp not in KINDS:
        raise ValueError(f"Expected aspp {', '.join(map(repr, KINDS))}, but got {aspp!r}.")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"Expected output_stride 8, 16 or 32, but got {output_stride}.")
    if width < 1 or not rates or min(rates) < 1:
        raise ValueError(f"Expected width and rates of at least 1, but got {width} and {list(rates)}.")
    owned = {"output_stride", "in_chans", "num_classes"} & (base_kwargs or {}).keys()
    if owned:
        raise ValueError(f"Expected base_kwargs without {', '.join(sorted(owned))}: it is an option of deeplab itself.")


default_cfgs = generate_default_cfgs(
    {
        "deeplab": {
            "num_classes": 21,
            "input_size": (3, 321, 321),
            "pool_size": (41, 41),
            "fixed_input_size": False,
            "min_input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "trunk.conv1",
            "classifier": "fc",
            "paper_name": "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and "
            "Fully Connected CRFs",
            "paper_ids": "arXiv:1606.00915",
        }
    }
)


@register_model
def deeplab(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeepLabv2 of ResNet-101: 44,048,532 parameters without a classifier, 42,930,265 with `aspp="njet"`."""
    return build_model_with_cfg(DeepLab, "deeplab", pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs)
