"""The plain twins are the DiracNets with ordinary convolutions, and nothing else."""

import math

import pytest
import timm
import torch
from torch import nn

from baton.backbones.diracnet import LARGE_GROUPS, SIZES
from baton.layers import DiracConv2d

TWINS = [f"_{size}" for size in SIZES] + [str(depth) for depth in LARGE_GROUPS]


@pytest.mark.parametrize("twin", TWINS)
def test_only_the_convolutions_differ(twin):
    with torch.device("meta"):
        dirac, plain = timm.create_model(f"diracnet{twin}"), timm.create_model(f"plain{twin}")
    ours, theirs = ({n: p.shape for n, p in model.named_parameters()} for model in (plain, dirac))
    assert theirs.items() - ours.items() == {(n, s) for n, s in theirs.items() if n.endswith((".a", ".b"))}
    assert ours.items() <= theirs.items()
    for (name, own), (other_name, other) in zip(plain.named_modules(), dirac.named_modules(), strict=True):
        assert name == other_name
        if isinstance(other, DiracConv2d):
            assert type(own) is nn.Conv2d
            assert (own.stride, own.padding, own.bias) == (other.stride, other.padding, None)
        else:
            assert type(own) is type(other)
    config, other_config = plain.pretrained_cfg, dirac.pretrained_cfg
    assert {k: v for k, v in config.items() if k != "architecture"} == {
        k: v for k, v in other_config.items() if k != "architecture"
    }


def test_a_twin_computes_what_the_dirac_network_does_with_its_effective_weights():
    torch.manual_seed(0)
    dirac, plain = timm.create_model("diracnet_16_1"), timm.create_model("plain_16_1")
    weights = dirac.state_dict()
    for name, module in dirac.named_modules():
        if isinstance(module, DiracConv2d):
            weights[f"{name}.weight"] = module.effective_weight().detach()
    plain.load_state_dict({k: v for k, v in weights.items() if not k.endswith((".a", ".b"))})
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain.train()(x), dirac.train()(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_weights_are_drawn_as_the_code_draws_them(norm):
    torch.manual_seed(0)
    model = timm.create_model("plain_16_1", width=4, norm=norm)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / module.weight[0].numel()), rel=0.05)
            assert (module.bias is None) == norm
            assert norm or not module.bias.any()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (13 if norm else 0)
