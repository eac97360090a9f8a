"""Patches fitted by Gaussian derivatives: what the basis can show comes back, and what is left is orthogonal to it."""

import math
from itertools import pairwise

import pytest
import torch

from baton.layers import NJetConv2d
from baton.layers.gaussian_jet import orders
from baton.layers.patch_fit import draw_fits, fit_patch, patch_basis


def naive_basis(height, width, order, sigma):
    """Derivatives of a sampled Gaussian with sum one, times σ^m, one number at a time."""
    polynomials = [lambda u: 1.0, lambda u: u, lambda u: u * u - 1, lambda u: u**3 - 3 * u]
    polynomials.append(lambda u: u**4 - 6 * u * u + 3)

    def axis(side, m):
        points = [k - side // 2 for k in range(side)]
        gaussian = [math.exp(-x * x / (2 * sigma * sigma)) for x in points]
        return [
            (-1) ** m * polynomials[m](x / sigma) * g / sum(gaussian) for x, g in zip(points, gaussian, strict=True)
        ]

    return torch.tensor(
        [[[y * x for x in axis(width, j)] for y in axis(height, i)] for i, j in orders(order)], dtype=torch.float64
    )


@pytest.mark.parametrize(("order", "sigma"), [(0, 1.0), (2, 1.5), (3, 5.0), (4, 0.7)])
@pytest.mark.parametrize("size", [(11, 11), (7, 9)])
def test_what_is_in_the_span_comes_back(order, sigma, size):
    torch.manual_seed(0)
    basis = naive_basis(*size, order, sigma)
    torch.testing.assert_close(patch_basis(*size, order, sigma), basis, rtol=1e-12, atol=1e-12)
    alpha = torch.randn(3, len(basis), dtype=torch.float64)
    patch = torch.einsum("ck,khw->chw", alpha, basis)
    fit, found = fit_patch(patch, order, sigma)
    assert (fit - patch).abs().max() < 1e-10
    torch.testing.assert_close(found, alpha, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("order", "sigma"), [(0, 1.0), (3, 5.0), (4, 1.0)])
def test_what_is_left_is_orthogonal_to_the_basis(order, sigma):
    torch.manual_seed(0)
    patch = torch.rand(3, 11, 11, dtype=torch.float64)
    fit, alpha = fit_patch(patch, order, sigma)
    basis = naive_basis(11, 11, order, sigma)
    assert (
        torch.einsum("chw,khw->ck", patch - fit, basis / basis.flatten(1).norm(dim=1).view(-1, 1, 1)).abs().max()
        < 1e-10
    )
    torch.testing.assert_close(fit, torch.einsum("ck,khw->chw", alpha, basis))


def test_higher_orders_fit_better_until_nothing_is_left():
    torch.manual_seed(0)
    patch = torch.rand(1, 5, 3, dtype=torch.float64)
    errors = [(fit_patch(patch, order, 1.0)[0] - patch).square().sum().item() for order in range(8)]
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-15  # more basis filters than pixels


def test_it_is_the_basis_of_the_layer():
    torch.manual_seed(0)
    layer = NJetConv2d(3, 1, order=3, sigma=2.5, dtype=torch.float64)
    fit, alpha = fit_patch(layer.filters()[0], 3, 2.5)
    assert layer.kernel_size == 11
    torch.testing.assert_close(fit, layer.filters()[0].detach())
    torch.testing.assert_close(alpha, layer.weight[0].detach())


def test_single_precision_and_pictures():
    torch.manual_seed(0)
    patch = torch.rand(3, 7, 5)
    fit, alpha = fit_patch(patch, 2, 1.0)
    assert fit.dtype == alpha.dtype == torch.float32
    picture = draw_fits(patch, [0, 2], 1.0, zoom=2)
    assert picture.shape == (3, 14, 3 * 10 + 2 * 2)
    assert torch.equal(picture[:, ::2, :10:2], patch)
    assert (picture[:, :, 10:12] == 1).all()
    assert torch.equal(picture[:, 1::2, 25::2], fit.clamp(0, 1))


@pytest.mark.parametrize(
    ("shape", "order", "sigma", "message"),
    [
        ((1, 4, 5), 2, 1.0, "Expected a patch of odd sides, which has a centre, but got 4 x 5"),
        ((1, 5, 5), -1, 1.0, "Expected an order of 0 or more and a scale sigma above 0, but got -1 and 1.0"),
        ((1, 5, 5), 2, 0.0, "above 0, but got 2 and 0.0"),
    ],
)
def test_mistakes(shape, order, sigma, message):
    with pytest.raises(ValueError, match=message):
        fit_patch(torch.zeros(shape), order, sigma)
