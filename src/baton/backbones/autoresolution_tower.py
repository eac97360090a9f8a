"""What the two towers of autoresolution networks share: timm's protocol for a row of stages.

Pereyra and Szegedy, "Deep autoresolution networks" (2016), section 2. No code of the paper exists.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import create_classifier
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Tower(nn.Module):
    """Base of the towers: a row of named stages that ends in an embedding map; obeys timm's protocol for models.

    A subclass builds its stages as attributes, lists them in `stage_names` and in `feature_info`, and calls `_finish`.
    """

    stage_names: tuple[str, ...]
    feature_info: list[dict[str, Any]]

    def _finish(self, num_features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Make the head and draw all weights."""
        self.num_features, self.drop_rate = num_features, drop_rate
        self.grad_checkpointing = False
        self._set_head(num_classes, global_pool)
        self.init_weights()

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"Expected num_classes=0 with global_pool='', because the linear classifier cannot take a map, but got "
                f"num_classes={num_classes}."
            )
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(self.drop_rate)
        for module in (self.global_pool, self.head_drop, self.fc):
            module.train(self.training)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh: Kaiming normal over the fan-in for ReLU (the paper is silent), biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                _init_classifier(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must spare beyond biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates.

        Args:
            coarse: one layer for a whole stage instead of one for each of its modules.
        """
        module = r"\." if coarse else r"\.(\d+)"
        return {name: rf"^{name}{module}" for name in self.stage_names}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity where `num_classes` is 0."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: size of its output; 0 leaves it out.
            global_pool: new pooling type; None keeps the present one.
        """
        self._set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        if isinstance(self.fc, nn.Linear):
            _init_classifier(self.fc)

    def _run(self, name: str, x: Tensor) -> Tensor:
        stage: Callable[[Tensor], Tensor] = getattr(self, name)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(stage, x)
        return stage(x)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch channels height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, each after its last ReLU.

        Args:
            x: normalised images.
            indices: which stages, from 0; an integer takes the last that many, None all.
            norm: changes nothing: no norm follows the last stage.
            stop_early: skip the stages after the last one wanted; the features are then that stage's output.
            output_fmt: only `"NCHW"`.
            intermediates_only: return the list alone.

        Returns:
            What `forward_features` returns, and the list of (batch, channels, height, width) maps; or only the list.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"Expected output_fmt 'NCHW', the only layout of this network, but got {output_fmt!r}.")
        taken, last = feature_take_indices(len(self.stage_names), indices)  # type: ignore[arg-type]
        intermediates = []
        for index, name in enumerate(self.stage_names[: last + 1] if stop_early else self.stage_names):
            x = self._run(name, x)
            if index in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages that the wanted intermediates do not need.

        Args:
            indices: wanted stages, as in `forward_intermediates`.
            prune_norm: changes nothing: no norm follows the last stage.
            prune_head: drop the pooling and classifier too.

        Returns:
            The wanted indices, counted from 0.
        """
        taken, last = feature_take_indices(len(self.stage_names), indices)  # type: ignore[arg-type]
        for name in self.stage_names[last + 1 :]:
            setattr(self, name, nn.Sequential())
        if last < len(self.stage_names) - 1:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.stage_names) - 1:
            self.reset_classifier(0, "")
        return taken

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The embedding map: the last stage's output."""
        for name in self.stage_names:
            x = self._run(name, x)
        return x

    def forward_head(
        self, x: Float[Tensor, "batch features height width"], pre_logits: bool = False
    ) -> Float[Tensor, "batch ..."]:
        """Pool and classify a map from `forward_features`.

        Args:
            x: the map.
            pre_logits: stop before the classifier.
        """
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch ..."]:
        """Class scores of normalised images (or pooled features where there is no classifier)."""
        return self.forward_head(self.forward_features(x))


def scaled_width(channels: int, width: float) -> int:
    """Channels times a width multiplier, at least 4."""
    return max(round(channels * width), 4)


def check_tower(width: float, drop_rate: float) -> None:
    """Refuse what cannot be built.

    Raises:
        ValueError: for a width of 0 or less, or a drop rate outside [0, 1).
    """
    if width <= 0:
        raise ValueError(f"Expected a width multiplier above 0, but got {width}.")
    if not 0 <= drop_rate < 1:
        raise ValueError(f"Expected drop_rate in [0, 1), but got {drop_rate}.")


def _init_classifier(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
