"""Folding gives plain networks that compute the same, leaves the original alone, and refuses what it cannot fold."""

import copy

import pytest
import timm
import torch
from torch import nn

import baton  # noqa: F401
from baton.layers import (
    DiracConv2d,
    NJetConv2d,
    SafeSubsample,
    SubsampledNJet,
    convert,
    fold,
    plain_convolutions,
)
from tiny import same, state


def trained(network, dtype=torch.float64):
    """A network in evaluation mode whose statistics, scales and biases are those of no fresh one."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
        elif isinstance(module, DiracConv2d):
            for scale in (module.a, module.b):
                if scale is not None:
                    nn.init.normal_(scale)
    return network.to(dtype).eval()


def assert_equal_outputs(found, expected):
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-5
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def row(conv, norm=None):
    return nn.Sequential(nn.ReLU(), conv, norm or nn.BatchNorm2d(6), nn.ReLU())


ROWS = {
    "plain": row(nn.Conv2d(3, 6, 3, bias=False)),
    "bias": row(nn.Conv2d(3, 6, 3)),
    "geometry": row(nn.Conv2d(3, 6, 3, 2, 3, 2, groups=3, padding_mode="reflect")),
    "dirac": row(DiracConv2d(3, 6, 3, padding=1)),
    "dirac without b": row(DiracConv2d(3, 6, 3, stride=2, normalize=False)),
    "dirac without a": row(DiracConv2d(3, 6, (3, 1), scaled=False)),
    "eps": row(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1)),
    "no scale": row(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "sync": row(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)),
    "twice": nn.Sequential(*row(nn.Conv2d(3, 6, 3)), *row(nn.Conv2d(6, 6, 3))),
    "nested": nn.Sequential(row(nn.Conv2d(3, 6, 3)), nn.MaxPool2d(2), row(DiracConv2d(6, 6, 3))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ROWS)
def test_rows_fold(name, dtype):
    network = trained(copy.deepcopy(ROWS[name]), dtype)
    before, x = state(network), torch.randn(2, 3, 13, 11, dtype=dtype)
    folded = fold(network)
    kinds = [type(module) for module in folded.modules()]
    assert set(kinds) <= {nn.Sequential, nn.ReLU, nn.Conv2d, nn.MaxPool2d}
    assert kinds.count(nn.Conv2d) == sum(isinstance(module, nn.Conv2d) for module in network.modules())
    with torch.no_grad():
        assert_equal_outputs(folded(x), network(x))
    assert same(state(network), before)
    assert all(p.dtype == dtype and p.requires_grad for p in folded.parameters())
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in network.parameters()}


def test_layers_named_by_number_move_up_and_others_keep_their_names():
    numbered = fold(trained(row(nn.Conv2d(3, 6, 3))))
    assert [*numbered._modules] == ["0", "1", "2"]
    named = nn.Sequential()
    for name, layer in (("pool", nn.MaxPool2d(2)), ("conv", nn.Conv2d(3, 6, 3)), ("norm", nn.BatchNorm2d(6))):
        named.add_module(name, layer)
    assert [*fold(trained(named))._modules] == ["pool", "conv"]


def test_other_dimensions():
    for conv, norm, x in (
        (nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), torch.randn(2, 2, 7)),
        (nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), torch.randn(2, 2, 4, 5, 6)),
    ):
        network = trained(nn.Sequential(conv, norm))
        folded = fold(network)
        assert [type(layer) for layer in folded] == [type(conv)]
        assert_equal_outputs(folded(x.double()), network(x.double()))


def test_a_dirac_convolution_without_batchnorm():
    layer = trained(DiracConv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for network in (layer, nn.Sequential(layer, nn.ReLU()), nn.ModuleDict({"one": layer, "other": layer})):
        folded = fold(network)
        assert DiracConv2d not in {type(module) for module in folded.modules()}
        if not isinstance(network, nn.ModuleDict):
            assert torch.equal(folded(x), network(x))
    assert torch.equal(folded["other"](x), layer(x))
    assert folded["one"].bias is None


def test_a_layer_that_acts_twice():
    conv, norm, act = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
    network = trained(nn.Sequential(conv, norm, act, conv, norm, act))
    folded = fold(network)
    assert [type(layer) for layer in folded] == [nn.Conv2d, nn.ReLU] * 2
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    assert_equal_outputs(folded(x), network(x))


def test_frozen_weights_stay_frozen_and_the_mode_stays():
    network = trained(row(nn.Conv2d(3, 6, 3)))
    network[1].weight.requires_grad_(False)
    folded = fold(network)
    assert not any(p.requires_grad for p in folded.parameters())
    assert not folded.training
    assert not folded[1].training
    assert fold(network.train())[1].training


def test_training_mode_does_not_matter_for_the_folded_network():
    network = trained(row(DiracConv2d(3, 6, 3)))
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = network(x)
    assert_equal_outputs(fold(network.train())(x), expected)


@pytest.mark.parametrize("name", ["nin", "vgg16_small", "allcnn"])
def test_other_networks_become_their_own_plain_form(name):
    kwargs = {"width": 1 / 16, "num_classes": 5}
    network = trained(timm.create_model(name, norm=True, **kwargs))
    plain = timm.create_model(name, norm=False, **kwargs).double().eval()
    folded = fold(network)
    assert plain.load_state_dict(folded.state_dict()) == ([], [])
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for one in (folded, plain):
            assert_equal_outputs(one(x), network(x))


class Functional(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class Normed(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), r"but 2 \(BatchNorm2d\) is not: it cannot"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)), r"but 0 \(BatchNorm2d\)"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)), r"but 1 \(BatchNorm2d\)"),
        (row(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), "with running statistics, but 2"),
        (row(nn.ConvTranspose2d(3, 6, 3)), r"but 2 \(BatchNorm2d\)"),
        (row(nn.Conv2d(3, 6, 3), Normed(6)), r"but 2 \(Normed\)"),
        (nn.ModuleList([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)]), "but 1"),
        (nn.ModuleDict({"part": Functional(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))}), r"but part\.1"),
        (nn.BatchNorm2d(6), "but the network itself"),
    ],
)
def test_what_cannot_be_folded(network, said):
    with pytest.raises(ValueError, match=said) as raised:
        fold(network)
    assert "\n" not in str(raised.value)


def test_residual_networks_cannot_be_folded():
    with pytest.raises(ValueError, match=r"but group1\.0\.norms\.0 "):
        fold(timm.create_model("wrn_16_1"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2, "bias": False}, {"padding": "valid"}])
def test_njet_layers_become_convolutions_of_their_present_size(dtype, options):
    network = trained(row(NJetConv2d(4, 6, 3, **options)), dtype)
    with torch.no_grad():
        network[1].log2_sigma.fill_(0.7)
    folded, x = fold(network), torch.randn(2, 4, 15, 17, dtype=dtype)
    assert [type(layer) for layer in folded] == [nn.ReLU, nn.Conv2d, nn.ReLU]
    assert folded[1].kernel_size == (9, 9)  # σ = 2^0.7 = 1.62
    assert_equal_outputs(folded(x), network(x))
    alone = fold(network[1])
    assert type(alone) is nn.Conv2d
    assert_equal_outputs(alone(x), network[1](x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "area"])
def test_safe_subsampling_stays_as_it_is(dtype, rule, mode):
    layer = SubsampledNJet(NJetConv2d(4, 6, 2, 2.6), SafeSubsample(rule=rule, mode=mode))
    network = trained(
        nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), SubsampledNJet(NJetConv2d(6, 3), layer.subsample))
    )
    network = network.to(dtype)
    folded, x = fold(network), torch.randn(2, 4, 17, 22, dtype=dtype)
    assert [type(module) for module in folded] == [SubsampledNJet, nn.ReLU, SubsampledNJet]
    assert_equal_outputs(folded(x), network(x))
    assert not any(isinstance(module, NJetConv2d | nn.BatchNorm2d) for module in folded.modules())
    assert isinstance(network[0].conv, NJetConv2d)
    with torch.no_grad():
        network[0].conv.log2_sigma += 1
    assert folded(x).shape != network(x).shape  # it knows no scale any more


def test_only_the_parameterisation_goes():
    network = trained(
        nn.Sequential(
            row(DiracConv2d(3, 6, 3)), nn.Sequential(nn.BatchNorm2d(6), NJetConv2d(6, 6, 3)), nn.Conv2d(6, 4, 3)
        )
    )  # fmt: skip
    jet = network[1][1]
    before, plain, x = state(network), plain_convolutions(network), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert_equal_outputs(plain(x), network(x))
    kinds = [type(module) for module in plain.modules() if not isinstance(module, nn.Sequential)]
    assert kinds == [nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d, nn.Conv2d, nn.Conv2d]
    assert same(state(network), before)
    alone = plain_convolutions(jet)
    assert type(alone) is nn.Conv2d
    assert_equal_outputs(alone(torch.ones(1, 6, 9, 9).double()), jet(torch.ones(1, 6, 9, 9).double()))
    assert same(state(plain_convolutions(network[2])), state(network[2]))


def test_njet_networks_fold():
    network = trained(timm.create_model("njet_nin", width=0.05, num_classes=3, sigma=[1.0, 2.0, 1.5]))
    folded, x = fold(network), torch.randn(3, 3, 20, 24, dtype=torch.float64)
    assert_equal_outputs(folded(x), network(x))
    assert not any(isinstance(module, NJetConv2d | nn.BatchNorm2d) for module in folded.modules())
    assert (network(x).std(0) > 1e-4).all(), "all images look alike"


def test_a_converted_resnet_becomes_plain_again():
    network = trained(convert(timm.create_model("test_resnet", num_classes=3), NJetConv2d, order=2))
    with pytest.raises(ValueError, match=r"it cannot be folded; plain_convolutions leaves BatchNorms as they are\."):
        fold(network)
    plain, x = plain_convolutions(network), torch.randn(2, 3, 40, 36, dtype=torch.float64)
    assert_equal_outputs(plain(x), network(x))
    assert not any(isinstance(module, NJetConv2d) for module in plain.modules())
