"""Networks with other layers, by name: what is replaced, what the hand-over rebuilds, what is refused."""

import pytest
import timm
import torch
from torch import nn

from baton.backbones import create_backbone
from baton.handover import read_source, write_model
from baton.layers import DiracConv2d
from baton.layers.njet import njet_layers

SMALL = {"base": "test_resnet", "num_classes": 4}


def test_the_base_with_other_layers():
    network = create_backbone("converted", base="resnet18", layer_kwargs={"order": 2, "sigma": 1.5}, num_classes=10)
    assert type(network) is type(timm.create_model("resnet18"))
    assert len(njet_layers(network)) == 17
    assert all(layer.order == 2 and layer.sigma.item() == pytest.approx(1.5) for _, layer in njet_layers(network))
    assert network.pretrained_cfg["mean"] == timm.create_model("resnet18").pretrained_cfg["mean"]
    assert network(torch.randn(2, 3, 40, 56)).shape == (2, 10)


def test_where_and_dirac_layers():
    network = create_backbone("converted", base="resnet18", layer="dirac", where="layer1.*", num_classes=2)
    names = [name for name, module in network.named_modules() if isinstance(module, DiracConv2d)]
    assert names == [f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]


def test_the_hand_over_rebuilds_it_and_the_scale_travels(tmp_path):
    torch.manual_seed(0)
    kwargs = {**SMALL, "layer_kwargs": {"order": 1}}
    network = create_backbone("converted", **kwargs)
    with torch.no_grad():
        for _, layer in njet_layers(network):
            layer.log2_sigma.fill_(1.3)
    folder = str(tmp_path / "model")
    write_model(folder, network, backbone_kwargs=kwargs, config={}, metrics={}, parent=None)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True)
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(other.eval()(x), network.eval()(x))
    assert {layer.kernel_size for _, layer in njet_layers(other)} == {11}  # σ = 2^1.3 = 2.46
    assert read_source(folder).architecture == "converted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "ncj"}, "Expected layer 'njet' or 'dirac', but got 'ncj'"),
        ({"base": "resnet81"}, "Expected the name of a backbone, but got 'resnet81'"),
        ({"where": "layer9.*"}, "matches none of them"),
        (
            {"layer_kwargs": {"ordr": 2}},
            "Expected layer_kwargs that a layer 'njet' takes, but it has no 'ordr'; the nearest is order.",
        ),
        ({"layer_kwargs": {"order": -1}}, "Expected an order of 0 or more"),
        ({"base_kwargs": {"num_classes": 3}}, "Expected num_classes beside base_kwargs"),
        ({"base": "test_vit"}, "Expected a network with spatial convolutions"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("converted", **{**SMALL, **options})


def test_a_converted_network_learns():
    network = create_backbone("converted", **SMALL).train()
    network(torch.randn(4, 3, 48, 48)).square().sum().backward()
    assert all(
        layer.log2_sigma.grad is not None for _, layer in njet_layers(network)
    )  # some start at zero behind a norm
    assert not any(isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 for module in network.modules())
