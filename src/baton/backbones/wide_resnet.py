"""Wide residual networks for small images: `wrn_16_1` to `wrn_52_1`, and `wide_resnet` for any depth, width and block.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv:1605.07146); chapter 5.2 of Zagoruyko's thesis.
The wide ResNets for ImageNet are in `wide_resnet_imagenet.py`.

    stem    3×3 convolution to 16 channels, without BatchNorm or ReLU
    group1  n blocks, 16k channels, full resolution
    group2  n blocks, 32k channels, the first block halves the resolution
    group3  n blocks, 64k channels, the first block halves the resolution
    norm    BatchNorm, ReLU, then global pooling and a linear classifier `fc`

The outputs of `group1`, `group2` and `group3` are sums of residual blocks *before* the next BatchNorm and ReLU. They
are the maps that attention transfer compares (thesis, chapter 6) and the three entries of `feature_info`.

Initialisation follows the authors' PyTorch port: convolutions are Gaussian with standard deviation sqrt(2 / fan-in),
BatchNorm scales uniform in (0, 1) and shifts zero (the old Torch default), the classifier Kaiming normal over the
fan-in with gain sqrt(2) and zero bias (their Lua code draws it uniformly in ±1 / sqrt(fan-in) instead).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers import create_classifier
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from baton.backbones.wide_resnet_blocks import WideBlock, blocks_per_group, parse_block

STEM_CHANNELS = 16
GROUP_NAMES = ("group1", "group2", "group3")


class WideResNet(nn.Module):
    """Wide residual network WRN-depth-width for small images (layout and initialisation: see the module).

    It obeys timm's protocol for models. `drop_rate` is the dropout between the convolutions of a block (the paper takes
    0.3 on CIFAR and 0.4 on SVHN), not before the classifier.

    Args:
        depth: 6n + 4 for the usual block; see `blocks_per_group`.
        width: the widening factor k; the groups have 16k, 32k and 64k channels.
        block: kernel sizes of the convolutions in a block, see `parse_block`.
        drop_rate: dropout probability between the convolutions of a block.
        depth_rule: how blocks of mixed kernel sizes count, see `blocks_per_group`.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a depth, width, block, drop rate or pooling that cannot be built.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        block: str | Sequence[int] = (3, 3),
        drop_rate: float = 0.0,
        depth_rule: Literal["paper", "convolutions"] = "paper",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel_sizes = parse_block(block)
        n = blocks_per_group(depth, kernel_sizes, depth_rule)
        if width < 1:
            raise ValueError(f"Expected a widening factor width of 1 or more, but got {width}.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"Expected drop_rate in [0, 1), but got {drop_rate}.")
        if drop_rate > 0 and len(kernel_sizes) == 1:
            raise ValueError(
                f"Expected a block of two or more convolutions, because drop_rate={drop_rate} acts between them, "
                f"but got B({kernel_sizes[0]}); set drop_rate=0."
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        placed: dict[str, Any] = {"device": device, "dtype": dtype}

        self.stem = nn.Conv2d(in_chans, STEM_CHANNELS, 3, padding=1, bias=False, **placed)
        self.feature_info: list[dict[str, Any]] = []
        channels = STEM_CHANNELS
        for i, name in enumerate(GROUP_NAMES):
            wide, stride = 16 * 2**i * width, 1 if i == 0 else 2
            first = WideBlock(channels, wide, kernel_sizes, stride, drop_rate, **placed)
            rest = (WideBlock(wide, wide, kernel_sizes, 1, drop_rate, **placed) for _ in range(n - 1))
            self.add_module(name, nn.Sequential(first, *rest))
            self.feature_info.append({"num_chs": wide, "reduction": 2**i, "module": name})
            channels = wide
        self.norm: nn.Module = nn.BatchNorm2d(channels, **placed)
        self.act: nn.Module = nn.ReLU()

        self.num_features = channels
        self._set_head(num_classes, global_pool)
        self.init_weights()

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        """Makes the pooling and the classifier where, and of the type that, the other weights are."""
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"Expected num_classes=0 with global_pool='', because the linear classifier cannot take a map, but got "
                f"num_classes={num_classes}."
            )
        self.num_classes = num_classes
        weight = self.stem.weight
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights afresh, as the authors' PyTorch port does (see the module)."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                nn.init.uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                _init_classifier(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must spare: none, the paper decays BatchNorm and biases too."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates.

        Args:
            coarse: one layer for a whole group instead of one for each block.
        """
        blocks = r"^group(\d+)" if coarse else r"^group(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass instead of keeping their activations.

        BatchNorm then updates its running statistics twice a step, as with any of timm's models.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity where `num_classes` is 0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one.

        Args:
            num_classes: size of its output; 0 leaves it out.
            global_pool: new pooling type; None keeps the present one.
        """
        self._set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        if isinstance(self.fc, nn.Linear):
            _init_classifier(self.fc)

    def _run_group(
        self, name: str, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        group = getattr(self, name)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(group, x)
        return group(x)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the groups, before the BatchNorm and ReLU that follow them.

        Args:
            x: normalised images.
            indices: which groups, from 0; an integer takes the last that many, None all.
            norm: apply the final BatchNorm and ReLU to the last group's output.
            stop_early: skip the groups after the last one wanted; the features are then that group's raw output.
            output_fmt: only `"NCHW"`.
            intermediates_only: return the list alone.

        Returns:
            What `forward_features` returns, and the list of (batch, channels, height, width) maps; or only the list.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Expected output_fmt 'NCHW', the only layout of this network, but got {output_fmt!r}.")
        taken, last = feature_take_indices(len(GROUP_NAMES), indices)  # type: ignore[arg-type]
        intermediates = []
        x = self.stem(x)
        for i, name in enumerate(GROUP_NAMES[: last + 1] if stop_early else GROUP_NAMES):
            x = self._run_group(name, x)
            if i in taken:
                is_final = i == len(GROUP_NAMES) - 1
                intermediates.append(self.act(self.norm(x)) if norm and is_final else x)
        if intermediates_only:
            return intermediates
        if not stop_early or last == len(GROUP_NAMES) - 1:
            x = self.act(self.norm(x))
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empties the groups that the wanted intermediates do not need.

        Args:
            indices: wanted groups, as in `forward_intermediates`.
            prune_norm: drop the final BatchNorm and ReLU too.
            prune_head: drop the pooling and classifier too.

        Returns:
            The wanted indices, counted from 0.
        """
        taken, last = feature_take_indices(len(GROUP_NAMES), indices)  # type: ignore[arg-type]
        shortened = last < len(GROUP_NAMES) - 1
        for name in GROUP_NAMES[last + 1 :]:
            setattr(self, name, nn.Sequential())
        if shortened or prune_norm:
            self.norm, self.act = nn.Identity(), nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if shortened or prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The last group's map after the final BatchNorm and ReLU."""
        x = self.stem(x)
        for name in GROUP_NAMES:
            x = self._run_group(name, x)
        return self.act(self.norm(x))

    def forward_head(
        self, x: Float[Tensor, "batch features height width"], pre_logits: bool = False
    ) -> Float[Tensor, "batch ..."]:
        """Pools and classifies a map from `forward_features`.

        Args:
            x: the map.
            pre_logits: stop before the classifier.
        """
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch ..."]:
        """Class scores of normalised images (or pooled features where there is no classifier)."""
        return self.forward_head(self.forward_features(x))


def _init_classifier(linear: nn.Linear) -> None:
    """The authors' PyTorch port: Kaiming normal over the fan-in with gain sqrt(2), bias zero."""
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)


def _cfg() -> dict[str, Any]:
    """CIFAR's statistics as the authors' code has them, in units of [0, 1] pixels; they use them for CIFAR-100 too."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "fixed_input_size": False,
        "crop_pct": 1.0,
        "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255),
        "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
        "first_conv": "stem",
        "classifier": "fc",
        "paper_name": "Wide Residual Networks",
        "paper_ids": "arXiv:1605.07146",
    }


_SIZES = ("16_1", "16_2", "16_4", "16_8", "22_8", "28_10", "28_12", "40_1", "40_2", "40_4", "52_1")
default_cfgs = generate_default_cfgs({name: _cfg() for name in ("wide_resnet", *(f"wrn_{size}" for size in _SIZES))})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": tuple(range(len(GROUP_NAMES)))}
    return build_model_with_cfg(WideResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def wide_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Any WRN-depth-width-B(block): the arguments of `WideResNet`; WRN-28-10-B(3,3) if none are given."""
    return _create("wide_resnet", pretrained, **kwargs)


@register_model
def wrn_16_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-1: 175,066 parameters with 10 classes."""
    return _create("wrn_16_1", pretrained, **dict({"depth": 16, "width": 1}, **kwargs))


@register_model
def wrn_16_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-2: 691,674 parameters with 10 classes."""
    return _create("wrn_16_2", pretrained, **dict({"depth": 16, "width": 2}, **kwargs))


@register_model
def wrn_16_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-4: 2,748,890 parameters with 10 classes."""
    return _create("wrn_16_4", pretrained, **dict({"depth": 16, "width": 4}, **kwargs))


@register_model
def wrn_16_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16-8: 10,961,370 parameters with 10 classes."""
    return _create("wrn_16_8", pretrained, **dict({"depth": 16, "width": 8}, **kwargs))


@register_model
def wrn_22_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-22-8: 17,158,106 parameters with 10 classes."""
    return _create("wrn_22_8", pretrained, **dict({"depth": 22, "width": 8}, **kwargs))


@register_model
def wrn_28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-10: 36,479,194 parameters with 10 classes."""
    return _create("wrn_28_10", pretrained, **dict({"depth": 28, "width": 10}, **kwargs))


@register_model
def wrn_28_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-28-12: 52,517,850 parameters with 10 classes."""
    return _create("wrn_28_12", pretrained, **dict({"depth": 28, "width": 12}, **kwargs))


@register_model
def wrn_40_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-1: 563,930 parameters with 10 classes."""
    return _create("wrn_40_1", pretrained, **dict({"depth": 40, "width": 1}, **kwargs))


@register_model
def wrn_40_2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-2: 2,243,546 parameters with 10 classes."""
    return _create("wrn_40_2", pretrained, **dict({"depth": 40, "width": 2}, **kwargs))


@register_model
def wrn_40_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40-4: 8,949,210 parameters with 10 classes."""
    return _create("wrn_40_4", pretrained, **dict({"depth": 40, "width": 4}, **kwargs))


@register_model
def wrn_52_1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-52-1: 758,362 parameters with 10 classes."""
    return _create("wrn_52_1", pretrained, **dict({"depth": 52, "width": 1}, **kwargs))
