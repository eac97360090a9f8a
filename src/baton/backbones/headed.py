"""The head of our own networks: pooling, dropout and a linear classifier, as timm's protocol wants them."""

import re
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import create_classifier
from torch import Tensor, nn

from baton.layers.dirac import scale_names


class MapPool(nn.Module):
    """Average a map down to `grid` x `grid` cells and flatten it, so that a classifier sees where things are.

    Args:
        grid: cells a side.
    """

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid, self.pool_type = grid, f"map{grid}"

    def feat_mult(self) -> int:
        """Features a channel."""
        return self.grid**2

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Pool and flatten, channel by channel."""
        return nn.functional.adaptive_avg_pool2d(x, self.grid).flatten(1)


class HeadedNetwork(nn.Module):
    """Base of our networks: what follows the features. A subclass computes those in `forward_features`.

    Pooling is one of timm's types, or `map12`: the map of 12 x 12 cells, flattened (any number for 12).
    """

    num_features: int
    head_drop_rate: float = 0.0

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        """Make the pooling and the classifier where, and of the type that, the other weights are."""
        if num_classes > 0 and not global_pool:
            raise ValueError(
                f"Expected num_classes=0 with global_pool='', because the linear classifier cannot take a map, but got "
                f"num_classes={num_classes}."
            )
        self.num_classes = num_classes
        weight = next(self.parameters())
        placed: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if cells := re.fullmatch(r"map([1-9]\d*)", global_pool):
            self.global_pool: Any = MapPool(int(cells[1]))
            features = self.num_features * self.global_pool.feat_mult()
            self.fc: nn.Module = nn.Linear(features, num_classes, **placed) if num_classes else nn.Identity()
        else:
            self.global_pool, self.fc = create_classifier(
                self.num_features, num_classes, pool_type=global_pool, **placed
            )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(self.head_drop_rate)
        for module in (self.global_pool, self.head_drop, self.fc):
            module.train(self.training)

    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw the weights of a classifier."""
        raise NotImplementedError

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must spare beyond biases and norms: the scales of Dirac layers."""
        return scale_names(self)

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
            self.init_classifier(self.fc)

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features out_height out_width"]:
        """The last map."""
        raise NotImplementedError

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
