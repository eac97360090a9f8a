"""Safe subsampling against the two rules, by hand."""

import pytest
import torch

from baton.layers.njet import NJetConv2d
from baton.layers.subsampling import SafeSubsample, SubsampledNJet


@pytest.mark.parametrize(
    ("rule", "sigma", "side"),
    [
        # divisors at σ = 1, 2, 3, 4: paper 1.19, 1.41, 1.68, 2.0; code 1, 1, 2, 4
        ("paper", 1, 27), ("paper", 2, 23), ("paper", 3, 19), ("paper", 4, 16), ("paper", 0.5, 29),
        ("code", 1, 32), ("code", 2, 32), ("code", 3, 16), ("code", 4, 8), ("code", 2.5, 22),
    ],
)  # fmt: skip
def test_sides_follow_the_rules(rule, sigma, side):
    x = torch.arange(2 * 32 * 32.0).view(1, 2, 32, 32)
    found = SafeSubsample(4.0, rule)(x, sigma)
    assert found.shape == (1, 2, side, side)
    at = [int(i * 32 / side) for i in range(side)]  # the nearest pixel, as the code takes it
    assert torch.equal(found, x[:, :, at][:, :, :, at])


def test_larger_r_keeps_more():
    sides = [SafeSubsample(r).side(32, 1.0) for r in (2.0, 4.0, 6.0)]
    assert sides == [23, 27, 29]


def test_axes_are_halved_each_on_its_own_and_tensors_are_read():
    assert SafeSubsample()(torch.zeros(1, 1, 40, 21), torch.tensor(4.0)).shape == (1, 1, 20, 10)


def test_maps_do_not_vanish():
    subsample = SafeSubsample(min_side=4)
    side = 32
    for _ in range(100):
        side = subsample.side(side, 5.0)
    assert side == 4
    assert subsample(torch.zeros(1, 1, 3, 64), 50.0).shape == (1, 1, 3, 4)  # what is shorter stays
    assert SafeSubsample(min_side=1, rule="code").side(9, 50.0) == 1
    for rule in ("paper", "code"):
        assert SafeSubsample(0.5, rule).side(32, 1e6) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0.0}, "Expected r above 0"),
        ({"rule": "papr"}, "Expected rule 'paper' or 'code', but got 'papr'"),
        ({"mode": "cubic"}, "Expected mode 'nearest', 'bilinear', 'area', but got 'cubic'"),
        ({"min_side": 0}, "Expected min_side of 1 or more, but got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SafeSubsample(**options)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="Expected a scale sigma above 0"):
        SafeSubsample()(torch.zeros(1, 1, 8, 8), 0.0)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_subsampled_layers_do_so_where_the_rule_says(rule):
    torch.manual_seed(0)
    conv = NJetConv2d(2, 3, order=2, sigma=3.0)
    layer, x = SubsampledNJet(conv, SafeSubsample(rule=rule)), torch.randn(1, 2, 32, 24)
    expected = conv(layer.subsample(x, 3.0)) if rule == "code" else layer.subsample(conv(x), 3.0)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        conv.log2_sigma.fill_(2.0)  # σ = 4 at once
    assert layer(x).shape[2:] == {"paper": (16, 12), "code": (8, 6)}[rule]


def test_a_convolution_that_knows_no_scale_is_told_one():
    x = torch.randn(1, 2, 32, 24)
    layer = SubsampledNJet(torch.nn.Conv2d(2, 3, 3, padding=1), SafeSubsample(), sigma=4.0)
    assert layer(x).shape[2:] == (16, 12)
    assert layer.sigma == 4.0
