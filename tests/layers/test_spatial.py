"""Spatial convolutions by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.layers import DeformableConv2d, NJetConv2d
from baton.layers.spatial import spatial_conv


@pytest.mark.parametrize("kind", ["conv", "njet", "atrous", "deformable"])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_kind_keeps_the_side_as_far_as_the_stride_does(kind, stride):
    layer = spatial_conv(kind, 4, 6, 3, stride, bias=False, groups=2, dtype=torch.float64)
    y = layer(torch.randn(2, 4, 9, 13, dtype=torch.float64))
    assert y.shape == (2, 6, -(-9 // stride), -(-13 // stride))
    assert not any(name == "bias" for name, _ in layer.named_parameters())


def test_names_stand_for_classes_and_options_reach_them():
    assert type(spatial_conv("conv", 1, 1)) is nn.Conv2d
    assert spatial_conv("atrous", 1, 1).dilation == (2, 2)
    assert spatial_conv("atrous", 1, 1, 5, dilation=3).padding == (6, 6)
    njet = spatial_conv("njet", 1, 1, 7, order=1, sigma=2.0)
    assert isinstance(njet, NJetConv2d)
    assert njet.order == 1
    assert njet.kernel_size == 9
    assert isinstance(spatial_conv("deformable", 1, 1), DeformableConv2d)


def test_an_even_kernel_pads_more_at_the_end():
    torch.manual_seed(0)
    layer, x = spatial_conv("conv", 2, 3, 4), torch.randn(1, 2, 6, 7)
    expected = F.conv2d(F.pad(x, (1, 2, 1, 2)), layer[1].weight, layer[1].bias)
    assert torch.equal(layer(x), expected)
    assert expected.shape[2:] == (6, 7)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("njt", {}, "Expected a layer of kind 'conv', 'njet', 'atrous', 'deformable', but got 'njt'"),
        ("conv", {"sigma": 1.0}, "Layers of kind 'conv' do not take these options: .*sigma"),
        ("njet", {"kernel": 3}, "Layers of kind 'njet' do not take these options: .*kernel"),
    ],
)
def test_mistakes(kind, options, message):
    with pytest.raises(ValueError, match=message):
        spatial_conv(kind, 1, 1, **options)
