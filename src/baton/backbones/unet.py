"""U-Nets: `unet`, and `njet_unet` with layers whose scale is learned; their last map has the image's size.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (MICCAI 2015), in the
form of Pintea, Tomen, Goes, Loog and van Gemert, "Resolution learning in deep convolutional networks using scale-space
theory" (IEEE TIP 2021), section IV-B: two convolutions of 3 x 3 a level, each followed by a ReLU, 64 channels at the
first level and twice as many behind every pooling of 2 x 2, "same" padding, no norm. With three levels:

    down1   conv, conv              64   full resolution
    down2   pool, conv, conv       128   half
    down3   pool, conv, conv       256   a quarter
    up2     conv, conv             128   half, of down2 and the enlarged down3
    up1     conv, conv              64   full resolution, of down1 and the enlarged up2

so that 3, 4 and 5 levels have 10, 14 and 18 convolutions, the paper's numbers: maps are enlarged by bilinear
interpolation, without a convolution of its own, to the size of the map they are concatenated with. Poolings round down,
and images may have any size of at least 2^(levels - 1) pixels a side.

The convolution of one pixel that scores the classes is the classifier `fc` here: over the pooled map, as timm has it,
or at every pixel (`Segmentation`).

Initialisation is Ronneberger's, section 3: Gaussian of standard deviation sqrt(2 / fan-in), which keeps the variance of
maps where there is no norm; PyTorch's own would shrink it sixfold with every layer. (N-Jet layers are drawn by their
own rule, for the same purpose.) Biases are zero. Images are pixels in [0, 1], without mean and standard deviation.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureInfo, feature_take_indices
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from baton.backbones.staged import StagedNetwork, check_options, draw_kaiming
from baton.layers import NJetConv2d, spatial_conv


class UpAndDown(FeatureInfo):
    """timm's description of maps, without its rule that none may be larger than those before it.

    Args:
        info: an entry a map.
        out_indices: which maps are given, from 0; an integer for the last that many.
    """

    def __init__(self, info: list[dict[str, Any]], out_indices: int | Sequence[int]) -> None:
        self.info = [{**entry, "index": index} for index, entry in enumerate(info)]
        self.out_indices = tuple(range(-out_indices, 0) if isinstance(out_indices, int) else out_indices)

    def from_other(self, out_indices: int | Sequence[int]) -> "UpAndDown":
        """The same for other maps."""
        return UpAndDown(copy.deepcopy(self.info), out_indices)


class UNet(StagedNetwork):
    """U-Net (layout: see the module): (B, C, H, W) to (B, width, H, W).

    `feature_info` lists the levels of the encoder on the way down and those of the decoder on the way up.

    Args:
        levels: of the encoder, which has one pooling less.
        width: channels of the first level.
        convs: convolutions a level.
        layer: kind of the convolutions: `conv`, `njet`, `atrous` or `deformable`, see `baton.layers.spatial_conv`.
        layer_kwargs: further options of the layers, such as `order` of `njet`.
        kernel_size: of the convolutions, in pixels; N-Jet layers have their own.
        norm: BatchNorm after every convolution, which then has no bias.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map8`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for what cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        levels: int = 3,
        width: int = 64,
        convs: int = 2,
        layer: str = "conv",
        layer_kwargs: dict[str, Any] | None = None,
        kernel_size: int = 3,
        norm: bool = False,
        drop_rate: float = 0.0,
        num_classes: int = 11,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        if min(levels, convs, kernel_size) < 1:
            raise ValueError(
                f"Expected levels, convs and kernel_size of at least 1, but got {levels}, {convs} and {kernel_size}."
            )
        self.levels = levels
        options = {"device": device, "dtype": dtype, **(layer_kwargs or {})}
        widths = [width << level for level in range(levels)]
        info: list[dict[str, Any]] = []

        def add(name: str, inside: int, level: int, row: list[nn.Module]) -> None:
            for channels in [inside] + [widths[level]] * (convs - 1):
                row.append(spatial_conv(layer, channels, widths[level], kernel_size, bias=not norm, **options))
                row += [nn.BatchNorm2d(widths[level], device=device, dtype=dtype)] if norm else []
                row.append(nn.ReLU())
            self.add_module(name, nn.Sequential(*row))
            info.append({"num_chs": widths[level], "reduction": 1 << level, "module": name})

        for level in range(levels):
            inside = widths[level - 1] if level else in_chans
            add(f"down{level + 1}", inside, level, [nn.MaxPool2d(2)] if level else [])
        for level in reversed(range(levels - 1)):
            add(f"up{level + 1}", widths[level] + widths[level + 1], level, [])
        self.feature_info = UpAndDown(info, tuple(range(len(info))))  # type: ignore[assignment]
        self.stage_names = tuple(entry["module"] for entry in info)
        self._finish(width, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh (see the module)."""
        draw_kaiming(self)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw a classifier that answers all classes nearly alike at first."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Refuse images of which the poolings leave nothing."""
        if min(x.shape[2:]) < 1 << (self.levels - 1):
            raise ValueError(
                f"Expected images of at least {1 << (self.levels - 1)} pixels a side for {self.levels} levels, but got "
                f"{x.shape[2]} x {x.shape[3]}; use larger ones, or fewer levels."
            )
        return x

    def receptive_field(self) -> int:
        """Pixels a side of the image that one cell at the end of the encoder depends on (figure 11 of the paper).

        It follows from the kernels, those of N-Jet layers being of their present scales and those of deformable ones
        without their offsets; the borders of the image are left out.
        """
        side, step = 1, 1
        for level in range(1, self.levels + 1):
            for module in self.get_submodule(f"down{level}"):  # type: ignore[attr-defined]
                if isinstance(module, nn.MaxPool2d):
                    side, step = side + step, 2 * step
                side += step * (_kernel(module) - 1)
        return side

    def _walk(self, x: Tensor, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield the maps of stages, in order."""
        x = self.begin(x)
        kept: dict[str, Tensor] = {}  # maps of the encoder that the decoder waits for
        for name in names:
            if name.startswith("up"):
                beside = kept.pop(name.removeprefix("up"))
                x = torch.cat([beside, F.interpolate(x, beside.shape[2:], mode="bilinear")], 1)
            x = self._run(name, x)
            if name.startswith("down"):
                kept[name.removeprefix("down")] = x
            yield x

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The last map: the image's size, unless the decoder was pruned away."""
        last = x
        for last in self._walk(x, self.stage_names):  # noqa: B007
            pass
        return last

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the levels, as `StagedNetwork.forward_intermediates` gives those of a row of stages."""
        if output_fmt != "NCHW":
            raise ValueError(f"Expected output_fmt 'NCHW', the only layout of this network, but got {output_fmt!r}.")
        taken, last = feature_take_indices(len(self.stage_names), indices)  # type: ignore[arg-type]
        names = self.stage_names[: last + 1] if stop_early else self.stage_names
        maps = list(self._walk(x, names))
        found = [maps[index] for index in taken]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the levels that the wanted maps do not need; see `StagedNetwork.prune_intermediate_layers`."""
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stage_names = self.stage_names[: max(taken) + 1]
        return taken


def _kernel(module: nn.Module) -> int:
    """Pixels a side that a layer looks at."""
    if isinstance(module, NJetConv2d):
        return module.kernel_size
    if isinstance(module, nn.Sequential):  # padded by hand, as even kernels are
        return _kernel(module[-1])
    if isinstance(module, nn.Conv2d | DeformConv2d):
        return module.dilation[0] * (module.kernel_size[0] - 1) + 1
    return 1


def _cfg(first_conv: str | None) -> dict[str, Any]:
    """For the paper's Multi-scale Fashion-MNIST of scale 1."""
    return {
        "num_classes": 11,
        "input_size": (3, 64, 64),
        "pool_size": (64, 64),
        "fixed_input_size": False,
        "min_input_size": (3, 16, 16),
        "crop_pct": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": first_conv,  # none where timm could not make weights fit other channels
        "classifier": "fc",
        "paper_name": "U-Net: Convolutional Networks for Biomedical Image Segmentation",
        "paper_ids": "arXiv:1505.04597",
    }


default_cfgs = generate_default_cfgs({"unet": _cfg("down1.0"), "njet_unet": _cfg(None)})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    count = 2 * kwargs.get("levels", 3) - 1
    features = {"out_indices": tuple(range(count)), "feature_cls": "getter"}
    return build_model_with_cfg(UNet, variant, pretrained, feature_cfg=features, **kwargs)


@register_model
def unet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """U-Net of three levels: 1,883,072 parameters without a classifier."""
    return _create("unet", pretrained, **kwargs)


@register_model
def njet_unet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The same with N-Jet layers of order 2, each with one learned scale: 1,255,818 parameters without a classifier."""
    options = {"layer": "njet", "layer_kwargs": {"order": 2}}
    return _create("njet_unet", pretrained, **{**options, **kwargs})
