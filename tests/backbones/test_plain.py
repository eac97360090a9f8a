"""The arithmetic of sides: what convolutions and poolings leave of an image, compared with what they really do."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, _sides
from baton.layers import DeformableConv2d, NJetConv2d, SafeSubsample, SubsampledNJet, spatial_conv


class Example(PlainNetwork):
    def __init__(self, stages, norm=False, width=1.0, make=None):
        super().__init__()
        self._finish(self._add_stages(stages, 2, width, norm, make, dtype=torch.float64), 3, "avg")


LAYERS = [
    nn.Conv2d(1, 1, 3, padding=1),
    nn.Conv2d(1, 1, 11, stride=4),
    nn.Conv2d(1, 1, 4, stride=2, padding=1),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2),
    nn.MaxPool2d(3, 2, padding=1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(2, 2, padding=1, ceil_mode=True),
    nn.MaxPool2d(2, 3, ceil_mode=True),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.Conv2d(1, 1, 3, stride=2, padding=1, dilation=3),
    nn.ZeroPad2d((1, 2, 1, 2)),
    DeformableConv2d(1, 1, 5, stride=2),
    NJetConv2d(1, 1, stride=3),
    SubsampledNJet(NJetConv2d(1, 1, sigma=1.7), SafeSubsample(3.0)),
    SubsampledNJet(NJetConv2d(1, 1, sigma=3.1), SafeSubsample(3.0, "code")),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_sides_are_those_of_the_layer(layer):
    """Of every image from one pixel on: nothing is left exactly where the layer fails."""
    for side in range(1, 40):
        expected = _sides([layer], side)[-1]
        if expected > 0:
            assert layer(torch.rand(1, 1, side, side)).shape[2] == expected
        else:
            with pytest.raises(RuntimeError):
                layer(torch.rand(1, 1, side, side))


def test_description_of_the_stages():
    stages = {
        "first": [Conv(8, 5, padding=0), nn.MaxPool2d(3, 2, ceil_mode=True)],
        "second": [nn.Dropout(0.1), Conv(12, stride=2), Conv(4, 1)],
    }
    model = Example(stages, width=0.5)
    assert model.feature_info == [
        {"num_chs": 4, "reduction": 2, "border": 2, "module": "first"},
        {"num_chs": 4, "reduction": 4, "border": 1, "module": "second"},
    ]
    assert [type(m) for m in model.first] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(m) for m in model.second] == [nn.Dropout, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    assert model.min_side == 6
    assert model(torch.rand(2, 2, 6, 7, dtype=torch.float64)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 6 pixels a side, but got 5 x 7; use larger ones"):
        model(torch.rand(2, 2, 5, 7, dtype=torch.float64))


def test_maps_whose_scales_choose_the_side_are_described_by_the_scales_of_the_start():
    def make(channels, out, kernel, stride, bias, **placed):
        conv = NJetConv2d(channels, out, sigma=2.0, stride=stride, bias=bias, **placed)
        return SubsampledNJet(conv, SafeSubsample(4.0))

    model = Example({"first": [Conv(4)], "second": [Conv(6, stride=2), nn.MaxPool2d(2)]}, make=make)
    root = math.sqrt(2)
    assert [info["reduction"] for info in model.feature_info] == pytest.approx([root, 8])
    assert [info["border"] for info in model.feature_info] == [0, 0]
    maps = model.forward_intermediates(torch.rand(1, 2, 64, 64, dtype=torch.float64), intermediates_only=True)
    assert [m.shape[2] for m in maps] == [45, 8]  # 64 / 1.41; 45 -> 23 -> 16 -> 8
    assert model.min_side == 3  # 3 -> 2 -> 1: sides below four are not subsampled


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("kind", "kernel", "expected"),
    [
        ("conv", 3, [nn.Conv2d]),
        ("conv", 4, [nn.ZeroPad2d, nn.Conv2d]),
        ("njet", 3, [NJetConv2d]),
        ("deformable", 5, [DeformableConv2d]),
    ],
)
def test_other_layers_stand_for_spatial_convolutions_alone(kind, kernel, expected, norm):
    model = Example({"only": [Conv(6, kernel), Conv(4, 1)]}, norm=norm, make=partial(spatial_conv, kind))
    after = [nn.BatchNorm2d, nn.ReLU] if norm else [nn.ReLU]
    assert [type(m) for m in model.only] == [*expected, *after, nn.Conv2d, *after]
    convolution = model.only[len(expected) - 1]
    assert (convolution.bias is None) == norm
    assert convolution.weight.dtype == torch.float64
    info = {"num_chs": 4, "reduction": 1, "border": 0, "module": "only"}
    assert model.feature_info == [info]
    assert model.forward_features(torch.rand(2, 2, 9, 12, dtype=torch.float64)).shape == (2, 4, 9, 12)


def test_other_layers_are_drawn_by_their_own_rules():
    torch.manual_seed(0)
    model = Example({"only": [Conv(200, 5)]}, make=partial(spatial_conv, "deformable"))
    layer = model.only[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    model.init_weights()
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.05)
    assert not layer.bias.any()
    assert not any(parameter.any() for parameter in layer.offset.parameters())
    model = Example({"only": [Conv(200, 5)]}, make=partial(spatial_conv, "njet", init_std=0.5, sigma=2.0))
    with torch.no_grad():
        model.only[0].log2_sigma.fill_(3)
    model.init_weights()
    assert model.only[0].weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.only[0].sigma.item() == 2


@pytest.mark.parametrize("norm", [False, True])
def test_a_relu_may_be_left_out(norm):
    model = Example({"only": [Conv(6), Conv(6, relu=False), nn.MaxPool2d(2)]}, norm=norm)
    norms = [nn.BatchNorm2d] if norm else []
    expected = [nn.Conv2d, *norms, nn.ReLU, nn.Conv2d, *norms, nn.MaxPool2d]
    assert [type(m) for m in model.only] == expected


@pytest.mark.parametrize("norm", [False, True])
def test_biases_only_without_norm(norm):
    model = Example({"only": [Conv(6)]}, norm=norm)
    assert (model.only[0].bias is None) == norm
    assert isinstance(model.only[1], nn.BatchNorm2d if norm else nn.ReLU)
    assert model.fc.weight.dtype == torch.float64
