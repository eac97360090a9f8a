"""The N-Jet paper's network in network and its plain twin: counts, sides by scale, and a naive construction."""

import math

import jaxtyping
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.backbones import create_backbone
from baton.layers.njet import njet_layers
from jet_by_hand import convolved, normed, shrunk

LAYOUT = [(5, 192), (1, 160), (1, 96), (5, 192), (1, 192), (1, 192), (3, 192), (1, 192)]  # kernel, channels


def by_hand(classes, order=None, published=False):
    """Parameters; `published` counts BatchNorm on the class scores instead of a bias, as the code has it."""
    channels, total = 3, 0
    for kernel, width in LAYOUT:
        basis = (order + 1) * (order + 2) // 2 if order is not None and kernel > 1 else kernel**2
        total += basis * channels * width + 2 * width + (order is not None and kernel > 1)
        channels = width
    return total + channels * classes + classes * (2 if published else 1)


def count(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


@pytest.mark.parametrize(
    ("order", "classes", "code", "ours"),
    [
        (None, 10, 968_404, 968_394),
        (None, 100, 985_864, 985_764),
        (2, 10, 496_663, 496_653),
        (3, 10, 720_151, 720_141),
        (4, 10, 999_511, 999_501),
        (2, 100, 514_123, 514_023),
    ],
)
def test_parameters_are_those_of_the_code_without_batchnorm_on_the_scores(order, classes, code, ours):
    assert by_hand(classes, order, published=True) == code
    name, kwargs = ("njet_nin_plain", {}) if order is None else ("njet_nin", {"order": order})
    assert count(name, num_classes=classes, **kwargs) == by_hand(classes, order) == ours == code - classes


def sides(model, side=32):
    maps = model.eval().forward_intermediates(torch.zeros(1, 3, side, side), intermediates_only=True)
    return [m.shape[2] for m in maps]


@pytest.mark.parametrize(
    ("sigma", "r", "expected"),
    [
        # 32, then thrice times (1/2)^(σ / r), rounded each time
        (0.5, 4.0, [29, 27, 25]),
        (1.0, 4.0, [27, 23, 19]),
        (2.0, 4.0, [23, 16, 11]),
        (1.0, 2.0, [23, 16, 11]),
        (1.0, 6.0, [29, 26, 23]),
        (4.0, 4.0, [16, 8, 4]),
        ([1.0, 2.0, 0.5], 4.0, [27, 19, 17]),
    ],
)
def test_sides_follow_from_the_scales(sigma, r, expected):
    model = timm.create_model("njet_nin", width=0.05, sigma=sigma, r=r)
    assert sides(model) == expected
    for info, side in zip(model.feature_info, expected, strict=True):
        assert 32 / info["reduction"] == pytest.approx(side, abs=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"subsample": "none"}, [32, 32, 32]),
        ({"subsample": "pool"}, [32, 16, 8]),
        ({"rule": "code"}, [32, 32, 32]),  # up to σ = 2, where 2^σ / 4 reaches 1
        ({"rule": "code", "sigma": 3.0}, [16, 8, 4]),
    ],
)
def test_other_ways_to_subsample(options, expected):
    model = timm.create_model("njet_nin", width=0.05, **options)
    assert sides(model) == expected
    assert [info["reduction"] for info in model.feature_info] == pytest.approx([32 / side for side in expected])


@pytest.mark.parametrize(("subsample", "expected"), [("pool", [32, 16, 8]), ("none", [32, 32, 32])])
def test_sides_of_the_twin(subsample, expected):
    assert sides(timm.create_model("njet_nin_plain", width=0.05, subsample=subsample)) == expected


def test_sides_follow_scales_that_were_learned_and_loaded():
    model = timm.create_model("njet_nin", width=0.05)
    layers = [layer for _, layer in njet_layers(model)]
    with torch.no_grad():
        for layer, sigma in zip(layers, (2.0, 0.5, 1.0), strict=True):
            layer.log2_sigma.fill_(math.log2(sigma))
    assert sides(model) == [23, 21, 18]
    other = timm.create_model("njet_nin", width=0.05)
    assert sides(other) == [27, 23, 19]
    other.load_state_dict(model.state_dict(), strict=True)
    assert sides(other) == [23, 21, 18]
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_scales_learn_unless_they_are_fixed():
    x = torch.rand(4, 3, 20, 20)
    model = timm.create_model("njet_nin", width=0.05)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    assert all(layer.log2_sigma.grad.item() != 0 for _, layer in njet_layers(model))
    fixed = timm.create_model("njet_nin", width=0.05, learn_sigma=False, sigma=2.0)
    F.cross_entropy(fixed(x), torch.arange(4)).backward()
    assert all(layer.log2_sigma.grad is None for _, layer in njet_layers(fixed))
    assert count("njet_nin") == count("njet_nin", learn_sigma=False)


@pytest.mark.parametrize("subsample", ["safe", "pool", "none"])
@pytest.mark.parametrize("name", ["njet_nin", "njet_nin_plain"])
def test_it_equals_the_naive_network(name, subsample):
    """In float64 and training: BatchNorm takes the batch's own statistics; gradients of every parameter, too."""
    torch.manual_seed(0)
    options = {"subsample": subsample, "width": 0.04, "drop_rate": 0.0, "num_classes": 5}
    plain = name == "njet_nin_plain"
    if plain and subsample == "safe":
        with pytest.raises(ValueError, match="Expected subsample 'pool', 'none', but got 'safe'"):
            timm.create_model(name, **options)
        return
    options |= {} if plain else {"order": 2, "sigma": [0.8, 1.3, 1.0]}
    model = timm.create_model(name, **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, 18, 21, dtype=torch.float64)
    scores = model(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, y = iter(copies), x
    for number, (kernel, _) in enumerate(LAYOUT):
        if subsample == "pool" and number == 3:
            y = F.pad(y, [1] * 4, value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
        if subsample == "pool" and number == 6:
            y = F.pad(y, [1] * 4).unfold(2, 3, 2).unfold(3, 3, 2).mean((4, 5))  # zeros at the border count
        if kernel == 1 or plain:
            y = F.conv2d(y, next(left), padding=kernel // 2)
        else:
            alpha, log2_sigma = next(left), next(left)
            y = convolved(y, alpha, log2_sigma, order=2)
            if subsample == "safe":
                height, width = (round(side * 0.5 ** (2 ** log2_sigma.item() / 4)) for side in y.shape[2:])
                y = shrunk(y, height, width)
        y = normed(y, next(left), next(left)).clamp(min=0)
    expected = F.linear(y.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    scores.square().sum().backward()
    expected.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-6, atol=1e-8)


def test_weights_keep_their_names_without_poolings():
    for name in ("njet_nin_plain", "njet_nin"):
        pooled, whole = (timm.create_model(name, width=0.05, subsample=kind) for kind in ("pool", "none"))
        whole.load_state_dict(pooled.state_dict(), strict=True)


def test_dropout_stands_before_the_second_and_the_third_group():
    for name in ("njet_nin_plain", "njet_nin"):
        model = timm.create_model(name, width=0.05)
        rates = {place: m.p for place, m in model.named_modules() if isinstance(m, nn.Dropout)}
        assert rates == {"group2.1": 0.5, "group3.1": 0.5, "head_drop": 0.0}


def test_kernels_of_the_twin_are_options():
    model = timm.create_model("njet_nin_plain", width=0.05, kernel_sizes=[3, 7, 9])
    kernels = [m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert kernels == [3, 7, 9]
    for sizes in ([5, 5], [5, 4, 3]):
        with pytest.raises(ValueError, match=r"Expected three odd kernel_sizes, such as \[5, 5, 3\], but got"):
            timm.create_model("njet_nin_plain", kernel_sizes=sizes)


def test_weights_are_drawn_as_the_code_draws_them():
    torch.manual_seed(0)
    model = timm.create_model("njet_nin")
    for _, layer in njet_layers(model):
        assert layer.weight.std().item() == pytest.approx(1, rel=0.05)
        assert layer.sigma.item() == 1
        assert layer.bias is None
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.95 * bound < layer.weight.abs().max() <= bound
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert not torch.equal(model.group1[0].conv.weight, before["group1.0.conv.weight"])


def test_unknown_options_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would hide who refuses, but only in tests
    with pytest.raises(
        ValueError, match="njet_nin' takes, but it has no 'sigmas'; the nearest is sigma or sigma_groups"
    ):
        create_backbone("njet_nin", sigmas=[1.0])
    with pytest.raises(ValueError, match="a list of 3 for the N-Jet layers"):
        create_backbone("njet_nin", sigma=[1.0])
