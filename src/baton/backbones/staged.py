"""Networks that are a row of named stages: timm's protocol for models, written once for all of our own."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from baton.backbones.headed import HeadedNetwork
from baton.layers.deformable import DeformableConv2d
from baton.layers.njet import NJetConv2d


class StagedNetwork(HeadedNetwork):
    """Base of networks whose features are those of a row of stages, followed by pooling and a linear classifier `fc`.

    A subclass builds its stages as attributes, names them in `stage_names`, describes them in `feature_info`, says how
    weights are drawn in `init_weights` and `init_classifier`, and ends its constructor with `_finish`. Where a norm and
    an activation follow the last stage, they are its `norm` and `act`; what precedes the first stage is `begin`.
    """

    stage_names: tuple[str, ...]
    feature_info: list[dict[str, Any]]
    norm: nn.Module
    act: nn.Module

    def _finish(self, num_features: int, num_classes: int, global_pool: str, head_drop_rate: float = 0.0) -> None:
        """Make the head and draw all weights."""
        self.num_features, self.head_drop_rate = num_features, head_drop_rate
        self.grad_checkpointing = False
        for name in ("norm", "act"):
            if not hasattr(self, name):
                self.add_module(name, nn.Identity())
        self._set_head(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights afresh."""
        raise NotImplementedError

    def begin(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch in_channels in_height in_width"]:
        """What comes before the first stage: nothing, unless a subclass says otherwise."""
        return x

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
        """Recompute stages in the backward pass instead of keeping their activations.

        BatchNorm then updates its running statistics twice a step, as with any of timm's models.
        """
        self.grad_checkpointing = enable

    def _run(
        self, name: str, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        stage = getattr(self, name)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
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
        """Outputs of the stages, before the norm and activation that may follow the last one.

        Args:
            x: normalised images.
            indices: which stages, from 0; an integer takes the last that many, None all.
            norm: apply the final norm and activation to the last stage's output.
            stop_early: skip the stages after the last one wanted; the features are then that stage's raw output.
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
        final = len(self.stage_names) - 1
        intermediates = []
        x = self.begin(x)
        for index, name in enumerate(self.stage_names[: last + 1] if stop_early else self.stage_names):
            x = self._run(name, x)
            if index in taken:
                intermediates.append(self.act(self.norm(x)) if norm and index == final else x)
        if intermediates_only:
            return intermediates
        if not stop_early or last == final:
            x = self.act(self.norm(x))
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages that the wanted intermediates do not need.

        Args:
            indices: wanted stages, as in `forward_intermediates`.
            prune_norm: drop the final norm and activation too.
            prune_head: drop the pooling and classifier too.

        Returns:
            The wanted indices, counted from 0.
        """
        taken, last = feature_take_indices(len(self.stage_names), indices)  # type: ignore[arg-type]
        shortened = last < len(self.stage_names) - 1
        for name in self.stage_names[last + 1 :]:
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
        """The last stage's map, after the final norm and activation where there are any."""
        x = self.begin(x)
        for name in self.stage_names:
            x = self._run(name, x)
        return self.act(self.norm(x))


def scaled_width(channels: int, width: float) -> int:
    """Channels times a width multiplier, at least 4."""
    return max(round(channels * width), 4)


def check_options(width: float, drop_rate: float) -> None:
    """Refuse what cannot be built.

    Raises:
        ValueError: for a width of 0 or less, or a drop rate outside [0, 1).
    """
    if width <= 0:
        raise ValueError(f"Expected a width multiplier above 0, but got {width}.")
    if not 0 <= drop_rate < 1:
        raise ValueError(f"Expected drop_rate in [0, 1), but got {drop_rate}.")


def draw_kaiming(network: StagedNetwork, mode: Literal["fan_in", "fan_out"] = "fan_in") -> None:
    """Draw all weights afresh: convolutions Kaiming normal, biases zero, norms one, the classifier by its own rule.

    N-Jet layers have their own rule, too, and the offsets of deformable convolutions begin at zero.

    Args:
        network: whose weights are drawn, in place.
        mode: what a convolution's variance is two over: the fan-in or the fan-out.
    """
    offsets = {module.offset for module in network.modules() if isinstance(module, DeformableConv2d)}
    for module in network.modules():
        if module in offsets:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, NJetConv2d):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | DeformableConv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            network.init_classifier(module)
