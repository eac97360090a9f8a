"""Convolution by Toeplitz matrices against a plain convolution with filters made in a loop."""

import pytest
import torch
import torch.nn.functional as F

from baton.layers.gaussian_jet import orders
from baton.layers.jet_convolution import jet_convolution, toeplitz_offsets


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def reference(x, alpha, taps, stride, padding, groups):
    """Make every filter, and convolve."""
    pairs = orders(len(taps) - 1)
    weight = sum(
        alpha[k][:, :, None, None] * torch.outer(taps[i], taps[j])[None, None] for k, (i, j) in enumerate(pairs)
    )
    return F.conv2d(x, weight, None, stride, padding, 1, groups)


def toeplitz(taps, side, out, stride, first):
    """Matrices of rows of taps, zeros beyond them."""
    reach = taps.shape[1] // 2
    offsets = toeplitz_offsets(side, out, stride, first)
    return taps[:, (offsets + reach).clamp(0, 2 * reach)] * (offsets.abs() <= reach)


def ours(x, alpha, taps, stride, padding, groups):
    reach = taps.shape[1] // 2
    sides = [(side + 2 * padding - 2 * reach - 1) // stride + 1 for side in x.shape[2:]]
    first = reach - padding
    columns, rows = (toeplitz(taps, side, out, stride, first) for side, out in zip(x.shape[2:], sides, strict=True))
    return jet_convolution(x, alpha, columns, rows, groups)


@pytest.mark.parametrize(("stride", "padding"), [(1, 2), (1, 0), (2, 2), (3, 1), (2, 7)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("order", [0, 2, 3])
def test_values_and_gradients_equal_a_convolution(stride, padding, groups, order):
    inputs = [draw(2, 4, 7, 9), draw(len(orders(order)), 6, 4 // groups, seed=1), draw(order + 1, 5, seed=2)]
    found, expected = (f(*inputs, stride, padding, groups) for f in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    grad = draw(*expected.shape, seed=3)
    for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_of_gradients():
    inputs = (draw(1, 2, 3, 4), draw(3, 2, 1, seed=1), draw(2, 3, seed=2))
    function = lambda x, alpha, taps: ours(x, alpha, taps, 1, 1, 2)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = [draw(1, 3, 5, 5), draw(6, 2, 3, seed=1), draw(3, 3, seed=2)]
    for index in frozen:
        inputs[index].requires_grad_(False)
    ours(*inputs, 1, 1, 1).square().sum().backward()
    assert [value.grad is None for value in inputs] == [index in frozen for index in range(3)]


def test_only_the_arguments_are_kept_for_the_backward_pass():
    kept = []
    inputs = [draw(2, 20, 9, 9), draw(6, 20, 20, seed=1), draw(3, 5, seed=2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ours(*inputs, 1, 2, 1)
    assert sum(kept) <= inputs[0].numel() + inputs[1].numel() + 4 * 3 * 9 * 9


def test_maps_that_are_transposed_in_memory():
    inputs = [draw(2, 4, 7, 9).detach().to(memory_format=torch.channels_last), draw(3, 6, 4), draw(2, 5)]
    torch.testing.assert_close(ours(*inputs, 1, 2, 1), reference(*inputs, 1, 2, 1))


def test_toeplitz_of_taps_longer_than_the_map():
    taps = torch.arange(1.0, 10.0)[None]  # centre 5
    assert toeplitz(taps, 2, 2, 1, 0).tolist() == [[[5, 6], [4, 5]]]
    assert toeplitz(taps[:, 3:6], 4, 2, 2, 0).tolist() == [[[5, 6, 0, 0], [0, 4, 5, 6]]]
    assert toeplitz(taps[:, 3:6], 4, 2, 1, 1).tolist() == [[[4, 5, 6, 0], [0, 4, 5, 6]]]
