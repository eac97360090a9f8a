"""EfficientNet-B0 with N-Jet layers: which were replaced, and how many parameters there are."""

import pytest
import timm
import torch
from torch import nn

import baton  # noqa: F401
from baton.layers import NJetConv2d
from baton.layers.njet import njet_layers


@pytest.mark.parametrize(("order", "count"), [(2, 5_160_021), (3, 5_196_245)])
def test_parameters(order, count):
    with torch.device("meta"):
        network = timm.create_model("njet_efficientnet_b0", order=order)
    assert sum(p.numel() for p in network.parameters()) == count


def test_every_spatial_convolution_and_its_stride():
    with torch.device("meta"):
        network, plain = (timm.create_model(name) for name in ("njet_efficientnet_b0", "efficientnet_b0"))
    spatial = {
        name: conv for name, conv in plain.named_modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size > (1, 1)
    }
    found = dict(njet_layers(network))
    assert found.keys() == spatial.keys()
    assert {name: layer.stride for name, layer in found.items()} == {n: conv.stride[0] for n, conv in spatial.items()}
    assert {name: layer.groups for name, layer in found.items()} == {n: conv.groups for n, conv in spatial.items()}
    x = torch.empty(1, 3, 64, 96, device="meta")
    assert network.forward_features(x).shape == plain.forward_features(x).shape


def test_options_reach_the_layers():
    with torch.device("meta"):
        network = timm.create_model("njet_efficientnet_b0", sigma=1.5, learn_sigma=False, num_classes=3)
    layers = [layer for _, layer in njet_layers(network)]
    assert all(isinstance(layer, NJetConv2d) and not layer.log2_sigma.requires_grad for layer in layers)
    assert network.num_classes == 3
