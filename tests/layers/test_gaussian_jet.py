"""The sampled basis against the paper's equations with its own Hermite recursion, in plain Python numbers."""

import math

import pytest
import torch

from baton.layers.gaussian_jet import check_size_rule, gaussian_jet, gaussian_jet_filters, half_sizes, orders


def hermite(m, x):
    """The paper's H: H_i(x) = 2x H_i-1(x) - 2(i - 1) H_i-2(x), H_0 = 1, H_1 = 2x."""
    if m == 0:
        return 1.0
    return 2 * x if m == 1 else 2 * x * hermite(m - 1, x) - 2 * (m - 1) * hermite(m - 2, x)


def reference(sigma, order, half):
    """σ^m d^m G / dx^m = (-1 / √2)^m H_m(x / (√2 σ)) g, with g sampled and divided by its sum."""
    g = [math.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)) for x in range(-half, half + 1)]
    total = sum(g)
    return [
        [
            (-1 / math.sqrt(2)) ** m * hermite(m, x / (math.sqrt(2) * sigma)) * value / total
            for x, value in zip(range(-half, half + 1), g, strict=True)
        ]
        for m in range(order + 1)
    ]


def basis(sigma, order, extent=2.0, rule="paper", room=0):
    scales = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
    half = half_sizes(scales, extent, rule)
    reach = int(half.max()) + room
    return gaussian_jet(scales, order, reach, half)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 0.77, 1.0, 1.5, 2.0, 3.3, 5.0])
@pytest.mark.parametrize("extent", [1.0, 2.0, 3.0])
def test_basis_equals_the_papers_equations(sigma, extent):
    half = math.ceil(extent * sigma - 1e-9)
    expected = torch.tensor(reference(sigma, 4, half), dtype=torch.float64)
    torch.testing.assert_close(basis(sigma, 4, extent)[0], expected, rtol=1e-12, atol=1e-14)


def test_basis_has_the_codes_values():
    # σ = 1, k = 2, the code's grid of 7 pixels
    found = basis(1.0, 4, rule="code")[0]
    stored = [
        [0.00443, 0.05401, 0.24204, 0.39905, 0.24204, 0.05401, 0.00443],
        [0.0133, 0.10801, 0.24204, 0.0, -0.24204, -0.10801, -0.0133],
        [0.03546, 0.16202, 0.0, -0.39905, 0.0, 0.16202, 0.03546],
    ]
    torch.testing.assert_close(found[:3], torch.tensor(stored, dtype=torch.float64), rtol=0, atol=6e-6)
    lengths = torch.tensor([0.531, 0.375, 0.463, 0.710, 1.443], dtype=torch.float64)
    torch.testing.assert_close(found.norm(dim=1), lengths, rtol=0, atol=6e-4)
    # truncated even orders do not sum to zero
    torch.testing.assert_close(found.sum(1)[[2, 4]], torch.tensor([-0.004, -0.045]).double(), rtol=0, atol=6e-4)
    narrow = basis(0.5, 4, rule="code")[0]
    assert abs(float(narrow[4].sum()) - 1.38) < 6e-3


def test_basis_is_a_derivative_of_the_one_before_where_it_is_not_cut_off():
    # σ d/dx b_m = b_m+1, by central differences of the continuous function
    sigma, step = 2.0, 1e-4

    def value(m, x):
        return (-1 / math.sqrt(2)) ** m * hermite(m, x / (math.sqrt(2) * sigma)) * math.exp(-(x**2) / (2 * sigma**2))

    wide = basis(sigma, 4, extent=6.0)[0]
    centre = wide.shape[1] // 2
    for m in range(4):
        for x in (-3, 0, 1, 4):
            slope = sigma * (value(m, x + step) - value(m, x - step)) / (2 * step)
            assert abs(float(wide[m + 1, centre + x]) / float(wide[0, centre]) - slope) < 1e-6


def test_gradient_of_sigma_is_that_of_finite_differences():
    def taps(sigma):
        return gaussian_jet(sigma, 4, 5, torch.full_like(sigma, 5.0).detach())

    sigma = torch.tensor([0.4, 1.0, 1.9, 2.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(taps, sigma)
    assert torch.autograd.gradgradcheck(taps, sigma)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_samples_anywhere_are_those_of_the_taps(order):
    sigma = torch.tensor([0.5, 1.7], dtype=torch.float64, requires_grad=True)
    half = half_sizes(sigma, 2.0)
    offsets = torch.tensor([[0, -4, 2], [9, 1, -1]])  # beyond the filter, too, and not all of its taps
    found = gaussian_jet(sigma, order, 5, half, offsets)
    taps = torch.cat([gaussian_jet(sigma, order, 5, half), torch.zeros(2, order + 1, 5)], 2)
    assert found.shape == (2, order + 1, 2, 3)
    torch.testing.assert_close(found, taps[:, :, offsets + 5], rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: gaussian_jet(s, order, 5, half, offsets), sigma)
    assert torch.autograd.gradgradcheck(lambda s: gaussian_jet(s, order, 5, half, offsets), sigma)


def test_filters_are_products_of_the_taps():
    sigma = torch.tensor([0.5, 1.1], dtype=torch.float64, requires_grad=True)
    half = half_sizes(sigma, 2.0)
    taps = gaussian_jet(sigma, 3, 3, half)
    expected = torch.stack([taps[:, i, :, None] * taps[:, j, None] for i, j in orders(3)], 1)
    torch.testing.assert_close(gaussian_jet_filters(sigma, 3, 3, half), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: gaussian_jet_filters(s, 3, 3, half), sigma)
    assert torch.autograd.gradgradcheck(lambda s: gaussian_jet_filters(s, 3, 3, half), sigma)


def test_scales_that_stay_have_no_gradient():
    sigma = torch.tensor([1.0])
    assert not gaussian_jet(sigma, 2, 2, half_sizes(sigma, 2.0)).requires_grad


def test_taps_beyond_the_half_are_zero_and_change_nothing():
    found = basis([0.5, 1.5], 3, room=2)
    assert found.shape == (2, 4, 2 * (3 + 2) + 1)
    for row, sigma in zip(found, (0.5, 1.5), strict=True):
        alone = basis(sigma, 3)[0]
        beyond = (found.shape[2] - alone.shape[1]) // 2
        assert torch.equal(row[:, beyond:-beyond], alone)
        assert not row[:, :beyond].any()
        assert not row[:, -beyond:].any()


def test_a_scale_at_any_distance_from_zero_gives_finite_values_and_gradients():
    sigma = torch.tensor([1e-3, 60.0], requires_grad=True)
    found = gaussian_jet(sigma, 4, 120, half_sizes(sigma, 2.0))
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(sigma.grad).all()
    assert torch.equal(found[0, 0], (torch.arange(-120, 121) == 0).float())  # a tiny scale lets one pixel through


@pytest.mark.parametrize(
    ("sigma", "extent", "rule", "half"),
    [
        (0.5, 2, "paper", 1), (1, 2, "paper", 2), (2, 2, "paper", 4), (3, 2, "paper", 6), (1.01, 2, "paper", 3),
        (0.5, 2, "code", 2), (1, 2, "code", 3), (2, 2, "code", 5), (3, 2, "code", 7), (1.2, 3, "code", 5),
    ],
)  # fmt: skip
def test_half_sizes_follow_the_rules(sigma, extent, rule, half):
    assert half_sizes(torch.tensor([float(sigma)]), extent, rule).tolist() == [half]
    assert half_sizes(torch.tensor(math.log2(sigma)).exp2()[None], extent, rule).tolist() == [half]  # rounded


def test_half_sizes_have_no_gradient():
    assert not half_sizes(torch.tensor([1.3], requires_grad=True), 2.0).requires_grad


@pytest.mark.parametrize(("order", "count"), [(0, 1), (1, 3), (2, 6), (3, 10), (4, 15)])
def test_orders_are_all_up_to_the_largest_sum(order, count):
    found = orders(order)
    assert len(found) == len(set(found)) == count
    assert all(i >= 0 and j >= 0 and i + j <= order for i, j in found)


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match="Expected size_rule 'paper' or 'code', but got 'papr'"):
        check_size_rule("papr")
