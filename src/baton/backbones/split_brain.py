"""Split-brain networks: two disjoint halves, one for a colour space's first channel, one for the other two.

Zhang, Isola, Efros, "Split-Brain Autoencoders" (CVPR 2017); the poster of the same name by Iyengar, Casabuena and
Budhkar. The half `first` sees L (or red) and learns to predict a and b (or green and blue), the half `rest` the other
way round. Together they are one backbone: it converts RGB itself, and its maps are the halves' maps, concatenated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from baton.backbones.factory import create_backbone
from baton.backbones.headed import HeadedNetwork
from baton.layers.color_space import Space, from_rgb, to_unit

HALVES = ("first", "rest")
DEFAULT_BASE = "fc_resnet18"
#: Bases whose last map holds the logits of every cell, as many as `out_chans` says.
PREDICTORS = ("simplenet", "fc_alexnet", "fc_resnet18")


class SplitBrain(HeadedNetwork):
    """Two networks that share nothing and look at different channels of the same image.

    Args:
        base: name of a backbone with spatial maps, of which both halves are built.
        base_kwargs: further arguments of both.
        space: `lab` (scaled to [0, 1]) or `rgb`.
        out_chans: channels of the last map of the first and the second half, for bases that have `out_chans`
            (`simplenet`, `fc_alexnet`, `fc_resnet18`): the first half's are the classes of the other two channels.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: only 3: the network converts RGB itself.
        global_pool: timm's pooling type, or `map12`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a base without spatial maps, another space, or images that are not RGB.
    """

    def __init__(
        self,
        base: str = DEFAULT_BASE,
        base_kwargs: dict[str, Any] | None = None,
        space: Space = "lab",
        out_chans: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_chans != 3:
            raise ValueError(f"split_brain converts RGB images itself, so in_chans must be 3, got {in_chans}.")
        if space not in ("lab", "rgb"):
            raise ValueError(f"Expected space 'lab' or 'rgb', but got {space!r}.")
        self.space: Space = space
        self.predicts_cells = base in PREDICTORS
        for index, (name, channels) in enumerate(zip(HALVES, (1, 2), strict=True)):
            kwargs = {**(base_kwargs or {}), "in_chans": channels, "num_classes": 0}
            if out_chans is not None:
                kwargs["out_chans"] = out_chans[index]
            half: Any = create_backbone(base, **kwargs)
            if not hasattr(half, "forward_intermediates"):
                raise ValueError(f"Expected a base with spatial maps, but {base!r} has none.")
            half.prune_intermediate_layers(1, prune_norm=False, prune_head=True)  # no weight that no map depends on
            self.add_module(name, half.to(device=device, dtype=dtype))
        infos = [list(half.feature_info) for half in self._halves()]
        self.feature_info = [
            {**one, "num_chs": one["num_chs"] + other["num_chs"], "module": f"{HALVES[0]}.{one['module']}"}
            for one, other in zip(*infos, strict=True)
        ]
        #: channels of the halves in the last map
        self.half_features = (infos[0][-1]["num_chs"], infos[1][-1]["num_chs"])
        self.num_features, self.head_drop_rate = sum(self.half_features), drop_rate
        self._set_head(num_classes, global_pool)
        if isinstance(self.fc, nn.Linear):
            self.init_classifier(self.fc)

    def _halves(self) -> list[Any]:
        return [getattr(self, name) for name in HALVES]

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw the classifier as PyTorch does."""
        linear.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the halves' bases name."""
        named = {name: getattr(self, name) for name in HALVES}
        spared = {
            half: module.no_weight_decay() for half, module in named.items() if hasattr(module, "no_weight_decay")
        }
        return {f"{half}.{parameter}" for half, parameters in spared.items() for parameter in parameters}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The base's patterns, each for both halves: the same layer of both has one learning rate.

        Args:
            coarse: as the base has it.
        """
        return {name: _for_both(pattern) for name, pattern in self._halves()[0].group_matcher(coarse=coarse).items()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them, in both halves."""
        for half in self._halves():
            half.set_grad_checkpointing(enable)

    def see(self, x: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        """What the halves see of RGB images in [0, 1]: one channel, and two."""
        channels = to_unit(from_rgb(x, self.space), self.space).to(x.dtype)
        return channels[:, :1], channels[:, 1:]

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch 3 height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the base's stages, the halves' channels concatenated.

        Args:
            x: RGB images in [0, 1].
            indices: which stages, from 0; an integer takes the last that many, None all.
            norm: apply the base's final norm to the last map.
            stop_early: skip the stages after the last one wanted.
            output_fmt: only `"NCHW"`.
            intermediates_only: return the list alone.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Expected output_fmt 'NCHW', the only layout of this network, but got {output_fmt!r}.")
        feature_take_indices(len(self.feature_info), indices)  # type: ignore[arg-type]  # refuses what there is not
        options: dict[str, Any] = {"indices": indices, "stop_early": stop_early, "output_fmt": "NCHW"}
        parts = [
            half.forward_intermediates(seen, norm=norm, intermediates_only=True, **options)
            for half, seen in zip(self._halves(), self.see(x), strict=True)
        ]
        maps = [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]
        # A base's own features need not be a map, so they are not asked for.
        return maps if intermediates_only else (self.forward_features(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers of both halves that the wanted maps do not need; see the base."""
        taken = [half.prune_intermediate_layers(indices, prune_norm, prune_head) for half in self._halves()]
        if prune_head:
            self.reset_classifier(0, "")
        return taken[0]

    def forward_features(
        self, x: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The last maps of both halves, the base's final norm applied; the first half's channels come first."""
        options: dict[str, Any] = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        seen = zip(self._halves(), self.see(x), strict=True)
        return torch.cat([half.forward_intermediates(channels, **options)[-1] for half, channels in seen], dim=1)


def _for_both(pattern: Any) -> Any:
    """A pattern of a half's parameter names as one of both halves', at whatever depth timm nests it."""
    if isinstance(pattern, str):
        return rf"^(?:{'|'.join(HALVES)})\." + pattern.removeprefix("^")
    if isinstance(pattern, tuple):  # (pattern, position)
        return (_for_both(pattern[0]), *pattern[1:])
    return [_for_both(part) for part in pattern]


default_cfgs = generate_default_cfgs(
    {
        "split_brain": {
            "num_classes": 1000,
            "input_size": (3, 96, 96),
            "pool_size": (24, 24),
            "fixed_input_size": False,
            "crop_pct": 1.0,
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "first_conv": None,
            "classifier": "fc",
            "paper_name": "Split-Brain Autoencoders",
            "paper_ids": "arXiv:1611.09842",
        }
    }
)


@register_model
def split_brain(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two disjoint halves of any base; 6,610,160 parameters without a classifier with `fc_resnet18`."""
    return build_model_with_cfg(SplitBrain, "split_brain", pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs)
