"""Layers of another kind in place of the convolutions of any network."""

import pytest
import timm
import torch
from torch import nn

from baton.layers import DiracConv2d, NJetConv2d, convert


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10)


def layers(model, kind):
    return {name: module for name, module in model.named_modules() if type(module) is kind}


def test_every_spatial_convolution_is_replaced_and_the_rest_is_copied():
    before = resnet()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    after = convert(before, NJetConv2d, order=2, sigma=1.5)
    spatial = {name for name, conv in layers(before, nn.Conv2d).items() if max(conv.kernel_size) > 1}
    assert set(layers(after, NJetConv2d)) == spatial
    assert len(spatial) == 17
    assert all(conv.kernel_size == (1, 1) for conv in layers(after, nn.Conv2d).values())
    for name, layer in layers(after, NJetConv2d).items():
        old = before.get_submodule(name)
        assert (layer.in_channels, layer.out_channels, layer.stride) == (
            old.in_channels,
            old.out_channels,
            old.stride[0],
        )
        assert layer.order == 2
        assert layer.sigma.item() == pytest.approx(1.5)
        assert layer.bias is None
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())  # left as it was
    kept = after.state_dict().keys() & state.keys()
    assert all(
        torch.equal(after.state_dict()[name], state[name]) for name in kept if "weight" not in name or "bn" in name
    )
    x = torch.randn(2, 3, 64, 96)
    assert after.forward_features(x).shape == before.forward_features(x).shape


def test_depthwise_convolutions_and_tensorflows_padding():
    model = convert(timm.create_model("tf_efficientnet_b0", num_classes=3), NJetConv2d, order=2)
    assert {layer.groups for layer in layers(model, NJetConv2d).values()} >= {1, 32, 96}
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_where_chooses_by_pattern_or_function():
    chosen = layers(convert(resnet(), NJetConv2d, where=["layer1.*", "conv1"]), NJetConv2d)
    assert set(chosen) == {"conv1", *(f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2))}
    assert set(layers(convert(resnet(), NJetConv2d, where="layer2.0.conv2"), NJetConv2d)) == {"layer2.0.conv2"}
    large = layers(convert(resnet(), NJetConv2d, where=lambda _, conv: conv.kernel_size[0] > 3), NJetConv2d)
    assert set(large) == {"conv1"}


def test_dirac_layers_keep_kernel_and_padding():
    model = convert(resnet(), DiracConv2d, where="layer*")
    replaced = layers(model, DiracConv2d)
    assert len(replaced) == 16
    assert replaced["layer2.0.conv1"].stride == (2, 2)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    # what cannot be is left where nobody asked for it by name
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, groups=2, bias=False))
    assert [type(layer) for layer in convert(mixed, DiracConv2d)] == [DiracConv2d, nn.Conv2d]


def test_mode_type_and_place_are_the_old_ones():
    model = nn.Sequential(nn.Conv2d(2, 2, 5, padding=2)).double().eval()
    layer = convert(model, NJetConv2d)[0]
    assert layer.weight.dtype == torch.float64
    assert not layer.training
    assert layer.bias is not None
    shared = nn.Conv2d(2, 2, 3, padding=1, device="meta")
    assert convert(nn.Sequential(shared), NJetConv2d)[0].weight.is_meta


def test_a_convolution_that_acts_twice_stays_one():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = convert(nn.Sequential(conv, nn.ReLU(), conv), NJetConv2d)
    assert model[0] is model[2]
    assert isinstance(model[0], NJetConv2d)


@pytest.mark.parametrize(
    ("model", "layer", "where", "message"),
    [
        (resnet, nn.Linear, None, "Expected one of the layers NJetConv2d, DiracConv2d, but got Linear"),
        (resnet, NJetConv2d, "layer9.*", r"'layer9\.\*' matches none of them: conv1, layer1"),
        (resnet, NJetConv2d, "layer2.0.downsample.0", "matches none of them"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), NJetConv2d, None, "Expected a network with spatial convolutions"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3)), NJetConv2d, "0", "0 has padding .0, 0., not half"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, (1, 2), 1)), NJetConv2d, "0", "0 has the strides"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), NJetConv2d, "0", "padding_mode"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)),
            DiracConv2d,
            "0",
            "DiracConv2d can replace, but 0 has a bias",
        ),
    ],
)
def test_mistakes(model, layer, where, message):
    with pytest.raises(ValueError, match=message):
        convert(model(), layer, where)
