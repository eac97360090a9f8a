"""Attention maps as one run compares, keeps and draws them: with height and width, so that sizes can be told apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from baton import losses


@dataclass(frozen=True)
class Attention:
    """How attention is measured, and how a student's is compared with its teacher's; see `baton.losses.attention`.

    Attributes:
        power: exponent of activations.
        reduce: over channels.
        form: of the distance.
    """

    power: float = 2.0
    reduce: Literal["sum", "max"] = "sum"
    form: Literal["code", "paper"] = "code"

    def maps(self, features: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return attention maps (B, H, W), each flattened one of L2 norm 1.

        Args:
            features: (B, C, H, W) each.
            others: maps (..., H', W') that they are to be compared with, and so averaged down to where these are
                smaller.
        """
        others = features if others is None else others
        return [self._map(own, other) for own, other in zip(features, others, strict=True)]

    def transfer(self, features: Sequence[Tensor], theirs: Sequence[Float[Tensor, "_ _ _"]]) -> Float[Tensor, ""]:
        """Return the distance of a student's attention from its teacher's, summed over the pairs.

        Args:
            features: of the student, (B, C, H, W) each.
            theirs: attention maps of the teacher, no larger than the features.
        """
        ours, theirs = ([each.flatten(1) for each in maps] for maps in (self.maps(features, theirs), theirs))
        return losses.attention_transfer(ours, theirs, self.form)

    def _map(self, features: Float[Tensor, "b c h w"], other: Tensor) -> Float[Tensor, "b _ _"]:
        height, width = (min(one, another) for one, another in zip(features.shape[2:], other.shape[-2:], strict=True))
        return losses.attention_map(features, self.power, self.reduce, (height, width)).unflatten(1, (height, width))
