"""Dirac-ResNets: every convolution's form, what the blocks compute, initialisation, weight decay."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from baton.backbones import create_backbone
from baton.backbones.wide_resnet_blocks import WideBlock, convolution
from baton.layers import DiracConv2d

FORMS = ["identity", "scaled", "normalized"]


def dense(conv):
    """The weight of the thesis's equations, with a dense delta."""
    weight = conv.weight / conv.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if conv.b is not None else conv.weight
    b = 1 if conv.b is None else conv.b.view(-1, 1, 1, 1)
    a = 1 if conv.a is None else conv.a.view(-1, 1, 1, 1)
    return a * nn.init.dirac_(torch.empty_like(weight)) + b * weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("in_channels", "stride"), [(6, 1), (4, 1), (4, 2)])
def test_a_block_with_dirac_convolutions(form, in_channels, stride):
    torch.manual_seed(0)
    block = WideBlock(in_channels, 6, (3, 3), stride, dirac=form, dtype=torch.float64).train()
    for name, parameter in block.named_parameters():
        if name.endswith((".a", ".b")):
            nn.init.normal_(parameter)
    x = torch.randn(2, in_channels, 9, 7, dtype=torch.float64)

    def activate(t):
        return F.relu(F.batch_norm(t, None, None, training=True))

    first = activate(x)
    y = F.conv2d(first, dense(block.convs[0]), stride=stride, padding=1)
    y = F.conv2d(activate(y), dense(block.convs[1]), padding=1)
    shortcut = x if block.projection is None else F.conv2d(first, dense(block.projection), stride=stride)
    torch.testing.assert_close(block(x), y + shortcut, rtol=1e-11, atol=1e-11)
    assert (block.projection is None) == (in_channels == 6)


@pytest.mark.parametrize(("form", "scales"), [("identity", 0), ("scaled", 1), ("normalized", 2)])
def test_every_convolution_of_the_network_has_the_form(form, scales):
    model = timm.create_model("wide_resnet", depth=28, width=1, dirac=form)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 1 + 24 + 2
    assert all(isinstance(conv, DiracConv2d) and len(list(conv.parameters())) == 1 + scales for conv in convs)
    plain = timm.create_model("wide_resnet", depth=28, width=1)
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, plain)]
    assert counts[0] - counts[1] == scales * sum(conv.out_channels for conv in convs)
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if n.endswith((".a", ".b"))}
    assert set(plain.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize("form", [None, "identity", "scaled"])
@pytest.mark.parametrize("std", [0.0, 1e-8, 1.0])
def test_all_weights_are_drawn_with_one_standard_deviation(form, std):
    model = timm.create_model("wide_resnet", depth=10, width=4, dirac=form, init_std=std)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(std, rel=0.15)
    assert model.fc.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.1)


def test_nearly_zero_weights_train_only_with_the_identity():
    """The study's point: with weights of 1e-8, images reach the classifier of I + W alone."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    spread = {}
    for form in (None, "identity"):
        model = timm.create_model("wide_resnet", depth=28, width=1, dirac=form, init_std=1e-8).train()
        with torch.no_grad():
            spread[form] = model(x).std(0).mean().item()
    assert spread["identity"] > 0.1
    assert spread[None] < 1e-3


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"dirac": "normalized", "init_std": 0.0}, "init_std above 0"),
        ({"init_std": -1.0}, "init_std of 0 or more, but got -1"),
    ],
)
def test_what_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said):
        create_backbone("wide_resnet", depth=10, width=1, **kwargs)


def test_ordinary_convolutions_keep_the_side():
    for kernel in (1, 3):
        conv = convolution(3, 5, kernel)
        assert type(conv) is nn.Conv2d
        assert conv.bias is None
        assert conv(torch.randn(1, 3, 6, 7)).shape == (1, 5, 6, 7)
        assert convolution(3, 5, kernel, 2)(torch.randn(1, 3, 6, 7)).shape == (1, 5, 3, 4)
