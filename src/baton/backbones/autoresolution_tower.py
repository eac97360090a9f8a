"""What the two towers of autoresolution networks share: widths, initialisation, dropout before the classifier.

Pereyra and Szegedy, "Deep autoresolution networks" (2016), section 2. No code of the paper exists.
"""

import torch
from torch import nn

from baton.backbones.staged import StagedNetwork


class Tower(StagedNetwork):
    """Base of the towers: every convolution is followed by a ReLU, so that features are the last stage's output."""

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
                self.init_classifier(module)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw a softmax layer that answers all classes alike at first."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)


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
