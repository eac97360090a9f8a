"""Deformable convolutions: what they start as, and what an offset does."""

import pytest
import torch
import torch.nn.functional as F

from baton.layers.deformable import DeformableConv2d


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_it_starts_as_a_plain_convolution(stride, groups):
    torch.manual_seed(0)
    layer = DeformableConv2d(4, 6, 3, stride, 1, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, stride, 1, 1, groups))


def test_an_offset_moves_all_taps():
    torch.manual_seed(0)
    layer = DeformableConv2d(1, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.offset.bias[1::2] = 2.0  # x of every tap; y stays
    x = torch.randn(1, 1, 6, 9, dtype=torch.float64)
    moved = F.conv2d(F.pad(x, (1, 3, 1, 1)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), moved[..., 2:])


def test_offsets_learn():
    torch.manual_seed(0)
    layer = DeformableConv2d(2, 2)
    layer(torch.randn(1, 2, 5, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="Expected an odd kernel_size, which has a centre, but got 4"):
        DeformableConv2d(1, 1, 4)
