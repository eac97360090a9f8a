"""N-Jet layers against filters made one number at a time: values, gradients, sizes, and what is drawn and refused."""

import copy
import itertools
import math
import pickle

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.layers import NJetConv2d
from baton.layers.gaussian_jet import orders
from baton.layers.njet import njet_layers


def gaussian(sigma, order, half):
    """The basis of one axis, written with its own recursion for He."""
    points = torch.arange(-half, half + 1, dtype=sigma.dtype)
    g = torch.exp(-(points**2) / (2 * sigma**2))
    g = g / g.sum()
    u = points / sigma
    hermite = [torch.ones_like(u), u]
    for m in range(1, order):
        hermite.append(u * hermite[m] - m * hermite[m - 1])
    return [(-1) ** m * hermite[m] * g for m in range(order + 1)]


def naive(x, alpha, sigma, bias, order, extent, stride, padding, groups):
    """Eq. 5 of the paper: every filter as a sum over the basis, one scale for each group of filters."""
    rows = []
    per = len(alpha) // len(sigma)
    halves = [math.ceil(extent * float(s) - 1e-9) for s in sigma.detach()]
    for o, filters in enumerate(alpha):
        half = halves[o // per]
        axis = gaussian(sigma[o // per], order, half)
        made = sum(
            filters[:, k, None, None] * axis[i][:, None] * axis[j][None] for k, (i, j) in enumerate(orders(order))
        )
        rows.append(F.pad(made, [max(halves) - half] * 4))
    reach = max(halves) if padding == "same" else 0
    return F.conv2d(x, torch.stack(rows), bias, stride, reach, 1, groups)


def layer(*args, sigma=1.0, **options):
    torch.manual_seed(0)
    made = NJetConv2d(*args, sigma=sigma, dtype=torch.float64, **options)
    with torch.no_grad():
        if made.sigma_groups > 1:
            made.log2_sigma += torch.linspace(-0.5, 0.5, made.sigma_groups)
        if made.bias is not None:
            made.bias.normal_()
    return made


CASES = [
    *itertools.product([0, 1, 2, 3, 4], [0.3, 1.0, 2.3, 5.0], [(1, 1, 1)], ["same"]),
    *itertools.product([2], [0.5, 1.4], [(2, 1, 1), (1, 2, 1), (3, 2, 1), (1, 1, 3), (2, 1, 6)], ["same", "valid"]),
]


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
@pytest.mark.parametrize(("order", "sigma", "shape", "padding"), CASES)
def test_both_evaluations_equal_the_papers_filters(evaluation, order, sigma, shape, padding):
    stride, groups, scales = shape
    options = {"stride": stride, "groups": groups, "sigma_groups": scales, "padding": padding}
    ours = layer(4, 6, order, sigma=sigma, evaluation=evaluation, **options)
    x = torch.randn(2, 4, 9, 13, dtype=torch.float64, requires_grad=True)
    found = ours(x)
    parameters = [ours.weight, ours.log2_sigma, ours.bias]
    other_x, alpha, log, bias = (value.detach().clone().requires_grad_() for value in (x, *parameters))
    expected = naive(other_x, alpha, 2**log, bias, order, 2.0, stride, padding, groups)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(expected)
    others = torch.autograd.grad(expected, [other_x, alpha, log, bias], direction)
    for a, b in zip(torch.autograd.grad(found, [x, *parameters], direction), others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
@pytest.mark.parametrize("order", [0, 2, 4])
def test_gradients_are_those_of_finite_differences(evaluation, order):
    ours = layer(2, 2, order, sigma=1.3, evaluation=evaluation)  # 2 * 1.3 is far from a change of size

    def function(x, weight, log2_sigma):
        return torch.func.functional_call(ours, {"weight": weight, "log2_sigma": log2_sigma}, (x,))

    inputs = (torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True), ours.weight, ours.log2_sigma)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)  # in a random direction


@pytest.mark.parametrize(
    ("sigma", "rule", "side"),
    [(0.5, "paper", 3), (1, "paper", 5), (2, "paper", 9), (3, "paper", 13), (0.5, "code", 5), (3, "code", 15)],
)  # fmt: skip
def test_kernel_size_follows_the_scale(sigma, rule, side):
    ours = layer(1, 2, 2, sigma=float(sigma), size_rule=rule)
    assert ours.kernel_size == side
    assert ours.filters().shape == (2, 1, side, side)
    with torch.no_grad():
        ours.log2_sigma += 1
    assert ours.sigma.item() == pytest.approx(2 * sigma)
    assert ours.kernel_size == ours.filters().shape[2] == 2 * math.ceil(4 * sigma + (rule == "code") / 2 - 1e-9) + 1
    x = torch.randn(1, 1, 20, 20, dtype=torch.float64)
    expected = F.conv2d(x, ours.filters(), ours.bias, padding=ours.kernel_size // 2)
    torch.testing.assert_close(ours(x), expected)


def test_filters_made_with_room_are_the_same():
    # what an accelerator and compiled graphs do: the host does not know the scale exactly
    ours, x = layer(3, 4, 3, sigma=1.2), torch.randn(1, 3, 9, 9, dtype=torch.float64)
    exact, wide = ours._filters(3), ours._filters(5)
    torch.testing.assert_close(F.pad(exact, [2] * 4), wide)
    assert not wide[:, :, :2].any()
    with torch.no_grad():
        ours.log2_sigma += 0.2
    for reach in (3, 4, 6):
        torch.testing.assert_close(F.conv2d(x, ours._filters(reach), ours.bias, padding=reach), ours(x))
        torch.testing.assert_close(ours._separable(x, reach, reach) + ours.bias.view(-1, 1, 1), ours(x))
    assert ours._reach(exact=False) > ours._reach(exact=True)


def test_auto_takes_the_cheaper_and_gives_the_same():
    small, large = NJetConv2d(64, 64, 2, 0.5), NJetConv2d(64, 64, 2, 3.0)
    assert not small._is_separable(32, 32, small.kernel_size)
    assert large._is_separable(32, 32, large.kernel_size)
    depthwise = NJetConv2d(64, 64, 2, 1.0, groups=64)
    assert not depthwise._is_separable(32, 32, depthwise.kernel_size)
    # on a CPU filters of 15 pixels and more are slow for their size
    picked = {sigma: NJetConv2d(8, 8, 3, sigma)._is_separable(112, 112, 4 * math.ceil(sigma) + 1) for sigma in (3, 4)}
    assert picked == {3: False, 4: True}
    torch.manual_seed(0)
    auto = NJetConv2d(64, 64, 2, 3.0).double()
    other = NJetConv2d(64, 64, 2, 3.0, evaluation="filters").double()
    other.load_state_dict(auto.state_dict())
    x = torch.randn(1, 64, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(auto(x), other(x))


def test_the_scale_cannot_leave_what_is_above_zero():
    ours = NJetConv2d(1, 1, 2, sigma=0.05)
    optimizer = torch.optim.SGD(ours.parameters(), lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss = ours.sigma.sum() + ours(torch.ones(1, 1, 8, 8)).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
    assert 0 < ours.sigma.item() < math.inf
    assert torch.isfinite(ours(torch.ones(1, 1, 8, 8))).all()


@pytest.mark.parametrize("order", [0, 2, 4])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_the_larger_of_white_noise_and_a_constant_map_keeps_its_mean_square(order, sigma):
    torch.manual_seed(0)
    ours = NJetConv2d(32, 512, order, sigma)
    noise, constant = torch.randn(4, 32, 40, 40), torch.randn(32, 32, 1, 1).expand(-1, -1, 32, 32)
    with torch.no_grad():
        gains = [ours(x)[:, :, 14:-14, 14:-14].relu().square().mean().item() for x in (noise, constant)]
    assert max(gains) == pytest.approx(1.0, rel=0.15)


def test_what_is_drawn():
    torch.manual_seed(0)
    ours = NJetConv2d(64, 64, 3, sigma=1.7, init_std=1.0, sigma_groups=64)
    assert ours.weight.std().item() == pytest.approx(1.0, rel=0.02)  # the code's
    assert torch.allclose(ours.sigma, torch.tensor(1.7))
    assert not ours.bias.any()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1
    ours.reset_parameters()
    assert torch.allclose(ours.sigma, torch.tensor(1.7))
    assert not ours.bias.any()
    assert not NJetConv2d(1, 1, learn_sigma=False).log2_sigma.requires_grad
    assert NJetConv2d(1, 1, bias=False).bias is None


def test_the_number_of_parameters_does_not_depend_on_the_scale():
    count = [sum(p.numel() for p in NJetConv2d(8, 4, order, sigma, groups=2).parameters()) for order, sigma in
             ((2, 0.5), (2, 5.0), (4, 1.0))]  # fmt: skip
    assert count == [4 * 4 * 6 + 4 + 1, 4 * 4 * 6 + 4 + 1, 4 * 4 * 15 + 4 + 1]


def test_a_state_carries_the_scale():
    ours, other = layer(2, 4, sigma=2.5), NJetConv2d(2, 4, dtype=torch.float64)
    other.load_state_dict(ours.state_dict())
    assert other.host_sigma == pytest.approx(2.5)
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    assert torch.equal(other(x), ours(x))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x), ours(x))
        with torch.no_grad():
            copied.log2_sigma += 1
        assert ours.kernel_size == 11


def test_a_scale_set_by_hand_is_seen_at_once():
    ours = layer(1, 1, 2)
    with torch.no_grad():
        ours.log2_sigma.fill_(2.0)
    assert ours.host_sigma == 4.0
    assert "sigma=4" in repr(ours)


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_low_precision_makes_filters_in_full_precision(evaluation):
    torch.manual_seed(0)
    ours, x = NJetConv2d(20, 8, 4, 2.0, evaluation=evaluation), torch.randn(2, 20, 12, 12)
    expected = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(x)
    low = copy.deepcopy(ours).bfloat16()(x.bfloat16())
    for found in (mixed, low):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    mixed.float().sum().backward()
    assert ours.log2_sigma.grad.dtype == torch.float32
    assert torch.isfinite(ours.log2_sigma.grad).all()


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_channels_last(evaluation):
    torch.manual_seed(0)
    ours, x = NJetConv2d(20, 6, 2, evaluation=evaluation).double(), torch.randn(2, 20, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x.to(memory_format=torch.channels_last)), ours(x))


def test_shapes_without_values():
    ours = NJetConv2d(3, 6, 2, 1.0, stride=2, device="meta")
    assert ours(torch.empty(2, 3, 9, 12, device="meta")).shape == (2, 6, 5, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": -1}, "Expected an order of 0 or more, the largest of a derivative, but got -1"),
        ({"sigma": 0.0}, "Expected a scale sigma above 0 pixels, but got 0.0"),
        ({"sigma": -2.0}, "Expected a scale sigma above 0 pixels, but got -2.0"),
        ({"sigma": math.inf}, "Expected a scale sigma above 0"),
        ({"extent": 0.0}, "Expected an extent above 0"),
        ({"stride": 0}, "Expected channels, stride and groups of 1 or more"),
        ({"groups": 3}, "Expected channels that 3 groups divide, but got 4 and 6"),
        ({"sigma_groups": 4}, "Expected sigma_groups that divide the 6 filters"),
        ({"size_rule": "papr"}, "Expected size_rule 'paper' or 'code', but got 'papr'"),
        ({"evaluation": "fast"}, "Expected evaluation 'auto', 'filters' or 'separable', but got 'fast'"),
        ({"padding": "reflect"}, "Expected padding 'same' or 'valid'"),
        ({"evaluation": "separable", "groups": 2, "sigma_groups": 2}, "need evaluation='filters'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        NJetConv2d(4, 6, **options)


def test_maps_that_do_not_fit_are_refused(monkeypatch):
    ours = NJetConv2d(2, 2, 2, 2.0, padding="valid")
    assert ours(torch.zeros(1, 2, 9, 11)).shape == (1, 2, 1, 3)
    with pytest.raises(
        ValueError, match=r"Expected maps of at least 9 pixels a side, .* but got 8 x 11: use padding='same'"
    ):
        ours(torch.zeros(1, 2, 8, 11))
    with pytest.raises(ValueError, match="Expected 2 channels, but got a map of shape"):
        ours(torch.zeros(1, 3, 9, 9))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would say it first, but only in tests
    with pytest.raises(ValueError, match=r"Expected maps of real numbers, but got torch\.uint8: convert them"):
        ours(torch.zeros(1, 2, 9, 9, dtype=torch.uint8))


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"stride": 2, "padding": "valid"}, {"sigma_groups": 2}], ids=str
)
def test_an_empty_batch_is_convolved(evaluation, options):
    layer = NJetConv2d(4, 6, 2, evaluation=evaluation, **{"groups": 1, **options})
    x = torch.zeros(0, 4, 11, 12, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, *layer(torch.zeros(1, 4, 11, 12)).shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("diverged", [17.0, 5000.0, float("inf"), float("nan")])
def test_a_scale_that_diverged_is_an_error(diverged):
    layer = NJetConv2d(2, 3)
    with torch.no_grad():
        layer.log2_sigma.fill_(diverged)
    for use in (lambda: layer(torch.zeros(1, 2, 8, 8)), layer.eval, lambda: layer.host_sigma):
        with pytest.raises(
            ValueError, match=r"stay below 2\^16 pixels, but training has made it 2\^.*lower the learning"
        ):
            use()


def test_njet_layers_are_named_in_order():
    model = nn.Sequential(NJetConv2d(1, 1), nn.ReLU(), nn.Sequential(NJetConv2d(1, 2)))
    assert [name for name, _ in njet_layers(model)] == ["0", "2.0"]
