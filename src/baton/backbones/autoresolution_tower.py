"""What the two towers of autoresolution networks share: initialisation.

Pereyra and Szegedy, "Deep autoresolution networks" (2016), section 2. No code of the paper exists.
"""

import torch
from torch import nn

from baton.backbones.staged import StagedNetwork, draw_kaiming


class Tower(StagedNetwork):
    """Base of the towers: every convolution is followed by a ReLU, so that features are the last stage's output."""

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh: Kaiming normal over the fan-in for ReLU (the paper is silent), biases zero."""
        draw_kaiming(self)

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw a softmax layer that answers all classes alike at first."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
