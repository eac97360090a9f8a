"""A convolution with its BatchNorm and ReLU."""

from typing import Any

import torch
from torch import nn


class ConvReLU(nn.Sequential):
    """Convolution, BatchNorm unless `norm` is off (a bias then takes its place), ReLU.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        kernel_size: odd.
        stride: of the convolution.
        padding: `None` keeps the size at stride 1.
        norm: whether there is a BatchNorm.
        device: where the parameters are made.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        norm: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=not norm, **placed)
        if norm:
            self.norm = nn.BatchNorm2d(out_channels, **placed)
        self.act = nn.ReLU()
