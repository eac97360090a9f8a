"""Convolution, norm and ReLU against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from baton.layers.conv_relu import ConvReLU


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 1, None), (5, 2, None), (3, 2, 0), (1, 1, None)])
@pytest.mark.parametrize("norm", [True, False])
def test_equals_convolution_batch_statistics_and_relu(kernel_size, stride, padding, norm):
    torch.manual_seed(0)
    layer = ConvReLU(3, 5, kernel_size, stride, padding, norm=norm).double()
    x = torch.randn(4, 3, 7, 9, dtype=torch.float64)
    y = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride, kernel_size // 2 if padding is None else padding)
    if norm:
        assert layer.conv.bias is None
        mean = y.mean((0, 2, 3), keepdim=True)
        y = (y - mean) / ((y - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    else:
        assert layer.conv.bias is not None
    assert torch.allclose(layer(x), y.clamp_min(0), atol=1e-12)
