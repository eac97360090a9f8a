"""Toy networks: rows of spatial layers and ReLUs alone, of any kind."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.layers import DeformableConv2d, NJetConv2d
from baton.layers.njet import njet_layers


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("layer", ["conv", "njet", "atrous", "deformable"])
def test_layers_and_relus_are_all_there_is(depth, layer):
    network = timm.create_model("toy_cnn", depth=depth, width=5, layer=layer)
    kind = {"njet": NJetConv2d, "deformable": DeformableConv2d}.get(layer, nn.Conv2d)
    rows = [[type(module) for module in getattr(network, f"layer{i + 1}")] for i in range(depth)]
    assert rows == [[kind, nn.ReLU]] * depth
    features = network.forward_features(torch.randn(2, 3, 13, 17))
    assert features.shape == (2, 5, 13, 17)


def test_it_computes_what_it_says():
    torch.manual_seed(0)
    network, x = (
        timm.create_model("toy_cnn", depth=2, width=4, kernel_size=5).double(),
        torch.randn(2, 3, 9, 9).double(),
    )
    y = x
    for row in (network.layer1, network.layer2):
        y = F.conv2d(y, row[0].weight, row[0].bias, padding=2).relu()
    expected = F.linear(y.mean((2, 3)), network.fc.weight, network.fc.bias)
    torch.testing.assert_close(network(x), expected)


def test_parameters_do_not_depend_on_the_scale():
    count = [sum(p.numel() for p in timm.create_model("njet_toy", width=8, layer_kwargs={"sigma": sigma}).parameters())
             for sigma in (0.5, 4.0)]  # fmt: skip
    assert count[0] == count[1]
    network = timm.create_model("njet_toy", depth=1, width=3, norm=True, layer_kwargs={"order": 3, "sigma": 1.5})
    ((_, layer),) = njet_layers(network)
    assert (layer.order, layer.kernel_size, layer.bias) == (3, 7, None)
    assert isinstance(network.layer1[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "Expected depth and kernel_size of 1 or more, but got 0 and 3"),
        ({"kernel_size": 0}, "Expected depth and kernel_size of 1 or more"),
        ({"layer": "njt"}, "Expected a layer of kind 'conv', 'njet'"),
        ({"layer_kwargs": {"order": 2}}, "Layers of kind 'conv' do not take these options"),
        ({"layer": "njet", "layer_kwargs": {"sigma": 0.0}}, "Expected a scale sigma above 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("toy_cnn", **options)
