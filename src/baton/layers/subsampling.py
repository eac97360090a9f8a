"""Safe subsampling: maps that a blur has left without fine detail lose the pixels that they no longer need."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

RULES = ("paper", "code")
MODES = ("nearest", "bilinear", "area")
#: A factor of 2^1000 is as good as any larger one, which a number might not hold.
_MOST_OCTAVES = 1000.0


class SafeSubsample(nn.Module):
    """Shrink a map as far as its scale allows: (B, C, H, W) to (B, C, H', W').

    Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412),
    section IV: a map of side s and scale σ gets the side

        paper    s (1/2)^(σ / r), rounded to the nearest number
        code     s / max(1, 2^σ / r), rounded down

    so that the code keeps maps whole up to σ = log2(r), and both halve them at σ = r = 4. The size has no gradient.

    Args:
        r: the scale, in pixels, at which the paper's rule halves a map.
        rule: `paper` or `code`.
        mode: of the interpolation; the code's is `nearest`, the paper does not say.
        min_side: no side becomes shorter than this, so that deep networks keep a map; shorter ones stay.

    Raises:
        ValueError: for r of 0 or less, another rule or mode, a shortest side below 1, or a scale of 0 or less.
    """

    def __init__(self, r: float = 4.0, rule: str = "paper", mode: str = "nearest", min_side: int = 4) -> None:
        super().__init__()
        if r <= 0:
            raise ValueError(f"Expected r above 0, the scale at which maps are halved, but got {r}.")
        if rule not in RULES:
            raise ValueError(f"Expected rule 'paper' or 'code', but got {rule!r}.")
        if mode not in MODES:
            raise ValueError(f"Expected mode {', '.join(map(repr, MODES))}, but got {mode!r}.")
        if min_side < 1:
            raise ValueError(f"Expected min_side of 1 or more, but got {min_side}.")
        self.r, self.rule, self.mode, self.min_side = r, rule, mode, min_side

    def factor(self, sigma: float) -> float:
        """How many times shorter a side becomes, before it is rounded.

        Args:
            sigma: the map's scale, in pixels.
        """
        if sigma <= 0:
            raise ValueError(f"Expected a scale sigma above 0 pixels, but got {sigma}.")
        if self.rule == "paper":
            return 2 ** min(sigma / self.r, _MOST_OCTAVES)
        return max(1.0, 2 ** min(sigma, _MOST_OCTAVES) / self.r)

    def side(self, side: int, sigma: float) -> int:
        """The side of a subsampled map.

        Args:
            side: of the map, in pixels.
            sigma: its scale, in pixels.
        """
        shorter = side / self.factor(sigma)
        return min(side, max(round(shorter) if self.rule == "paper" else int(shorter), self.min_side))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], sigma: float | Tensor
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        """Subsample.

        Args:
            x: map.
            sigma: its scale, in pixels; a tensor on an accelerator makes the host wait.
        """
        sigma = float(sigma)
        sides = [self.side(side, sigma) for side in x.shape[2:]]
        if sides == list(x.shape[2:]):
            return x
        return F.interpolate(x, sides, mode=self.mode)

    def extra_repr(self) -> str:
        """Its arguments, for the printed network."""
        return f"r={self.r:g}, rule={self.rule!r}, mode={self.mode!r}, min_side={self.min_side}"


class SubsampledNJet(nn.Module):
    """An N-Jet convolution whose own scale subsamples: the paper's rule its output, the code's its input.

    A compiled network is compiled anew where its scales have moved since the mode was last set, once an epoch at most;
    after `torch._dynamo.config.recompile_limit` times it goes on without compilation.

    Args:
        conv: the convolution, which keeps the side of maps.
        subsample: how.
        sigma: the scale, in pixels, of a convolution that does not know it, as a folded one; None for its own.
    """

    def __init__(self, conv: nn.Module, subsample: SafeSubsample, sigma: float | None = None) -> None:
        super().__init__()
        self.conv: Any = conv
        self.subsample, self.fixed_sigma = subsample, sigma

    @property
    def sigma(self) -> float:
        """The scale that subsamples, as the host knows it, in pixels."""
        return self.conv.host_sigma if self.fixed_sigma is None else self.fixed_sigma

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Convolve and subsample, or the other way round."""
        if self.subsample.rule == "code":
            return self.conv(self.subsample(x, self.sigma))
        y = self.conv(x)
        return self.subsample(y, self.sigma)
