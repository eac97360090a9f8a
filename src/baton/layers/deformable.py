"""Deformable convolutions, as a rival of N-Jet layers: torchvision's, with the layer that gives its offsets."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import DeformConv2d


class DeformableConv2d(DeformConv2d):
    """Convolution whose taps are moved by learned offsets: (B, in, H, W) to (B, out, H', W').

    Dai et al., "Deformable Convolutional Networks" (ICCV 2017, arXiv:1703.06211): a plain convolution of the same
    kernel, stride and padding gives two offsets for each tap and place; it starts at zero, so that the layer starts as
    the convolution of its weights.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        kernel_size: odd, in pixels.
        stride: step in pixels.
        padding: zeros at each border.
        groups: as in `nn.Conv2d`; the offsets are the same for all.
        bias: whether there is one.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for an even kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"Expected an odd kernel_size, which has a centre, but got {kernel_size}.")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride, padding)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        self.to(device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Convolve at the offsets that the map itself gives."""
        return super().forward(x, self.offset(x))
