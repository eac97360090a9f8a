"""Losses of reconstructions against loops, in float64, with gradients."""

import pytest
import torch

from baton.losses.reconstruction import euclidean, relative


def naive_relative(output, target):
    ratios = []
    for one, other in zip(output.double(), target.double(), strict=True):
        ratios.append((one - other).square().mean() / (other.square().mean() + 1e-8))
    return sum(ratios) / len(ratios)


def naive_euclidean(output, target):
    total = 0.0
    for one, other in zip(output.double().flatten(), target.double().flatten(), strict=True):
        total = total + (one - other) ** 2
    return total / (2 * len(output))


@pytest.mark.parametrize(("loss", "naive"), [(relative, naive_relative), (euclidean, naive_euclidean)])
def test_losses_equal_loops_with_gradients(loss, naive):
    generator = torch.Generator().manual_seed(2)
    output, target = (torch.randn(3, 2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    output.requires_grad_()
    torch.testing.assert_close(loss(output, target), naive(output, target))
    torch.testing.assert_close(
        *(torch.autograd.grad(function(output, target), output) for function in (loss, naive)), atol=1e-9, rtol=1e-7
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, target), output)
    assert loss(target, target) == 0
    if loss is relative:
        assert loss(torch.zeros_like(target), target).item() == pytest.approx(1)
        torch.testing.assert_close(loss(7 * output, 7 * target), loss(output, target))
        assert loss(output, torch.zeros_like(target)).isfinite()
