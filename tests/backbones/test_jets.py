"""How a network's N-Jet layers are built: scales in turn, what is handed on, what is refused."""

import pytest
import torch

from baton.backbones.jets import Jets, check_subsample
from baton.layers import NJetConv2d, SubsampledNJet


def test_layers_take_the_scales_of_a_list_in_turn():
    make = Jets(3, sigma=[0.5, 1.0, 2.0], order=3)
    sigmas = [make(4, 6).sigma.item() for _ in range(3)]
    assert sigmas == pytest.approx([0.5, 1, 2])
    same = Jets(2, sigma=1.5)
    assert [same(4, 6).sigma.item() for _ in range(2)] == pytest.approx([1.5, 1.5])
    with pytest.raises(ValueError, match="a list of 3 for the N-Jet layers of the network, but got 2"):
        Jets(3, sigma=[1.0, 2.0])


def test_every_option_reaches_the_layer():
    options = {"order": 4, "extent": 3.0, "size_rule": "code", "evaluation": "separable", "sigma_groups": 2}
    made = Jets(1, learn_sigma=False, init_std=0.25, **options)(8, 400, 5, 2, bias=False, dtype=torch.float64)
    assert isinstance(made, NJetConv2d)
    assert {name: getattr(made, name) for name in options} == options
    assert made.weight.shape == (400, 8, 15)
    assert made.weight.dtype == torch.float64
    assert made.weight.std().item() == pytest.approx(0.25, rel=0.02)
    assert made.stride == 2
    assert made.bias is None
    assert not made.log2_sigma.requires_grad


def test_without_a_number_weights_are_drawn_as_layers_draw_them():
    torch.manual_seed(0)
    made, other = Jets(1)(64, 64), NJetConv2d(64, 64, 2)
    assert made.weight.std().item() == pytest.approx(other.weight.std().item(), rel=0.02)


def test_a_subsampling_layer_has_no_stride():
    make = Jets(2, sigma=2.0, r=2.0, rule="code", mode="area")
    made = make(4, 6, stride=2, subsampled=True)
    assert isinstance(made, SubsampledNJet)
    assert (made.conv.stride, made.subsample.r, made.subsample.rule, made.subsample.mode) == (1, 2.0, "code", "area")
    assert made(torch.rand(1, 4, 12, 12)).shape == (1, 6, 6, 6)  # 12 / max(1, 2² / 2)
    assert make(4, 6, subsampled=True).subsample is not made.subsample


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_std": "small"}, "Expected init_std 'auto', or a number of 0 or more, but got 'small'"),
        ({"init_std": -1.0}, "Expected init_std 'auto', or a number of 0 or more, but got -1.0"),
        ({"r": 0.0}, "Expected r above 0"),
        ({"rule": "papr"}, "Expected rule 'paper' or 'code'"),
        ({"order": -1}, "Expected an order of 0 or more"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Jets(1, **options)(4, 6)


def test_another_way_to_subsample_is_refused():
    check_subsample("none", ("safe", "none"))
    with pytest.raises(ValueError, match="Expected subsample 'safe', 'none', but got 'pool'"):
        check_subsample("pool", ("safe", "none"))
