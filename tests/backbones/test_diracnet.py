"""DiracNets: parameter counts, a naive reference, initialisation, folding, weight decay, what is refused."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from baton.backbones import create_backbone, list_backbones
from baton.backbones.diracnet import LARGE_GROUPS, SIZES, DiracNet, layers_per_group
from baton.layers import DiracConv2d, fold
from baton.optim import Optimizer

NAMES = [f"diracnet_{size}" for size in SIZES] + [f"diracnet{depth}" for depth in LARGE_GROUPS]


def count(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


def trained(name, dtype=torch.float64, **kwargs):
    """A network in evaluation mode with statistics, scales and shifts as after training, and outputs of size one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, DiracConv2d):
            nn.init.normal_(module.a, 1, 0.3)
            nn.init.normal_(module.b, 0.5, 0.1)
    with torch.no_grad():
        for _ in range(2):  # statistics of what really enters each BatchNorm
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.9
            model.train()(torch.randn(8, 3, 64, 64) if "group4" in model.stage_names else torch.randn(8, 3, 16, 16))
    return model.to(dtype).eval()


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("diracnet_10_1", 10, 75_738),
        ("diracnet_16_1", 10, 173_402),
        ("diracnet_28_1", 10, 368_730),
        ("diracnet_34_1", 10, 466_394),
        ("diracnet_34_2", 10, 1_854_378),
        ("diracnet_52_1", 10, 759_386),
        ("diracnet_100_1", 10, 1_540_698),
        ("diracnet_28_5", 10, 9_124_250),
        ("diracnet_28_5", 100, 9_153_140),
        ("diracnet_28_10", 10, 36_450_090),
        ("diracnet_28_10", 100, 36_507_780),
        ("diracnet", 10, 36_450_090),
    ],
)
def test_parameters_are_those_of_the_code(name, classes, parameters):
    assert count(name, num_classes=classes) == parameters


@pytest.mark.parametrize(("name", "projections"), [("diracnet18", 172_032), ("diracnet34", 172_032)])
def test_large_networks_are_resnets_without_projections_and_with_scales(name, projections):
    """Table 5.11 gives DiracNets and ResNets the same 11.7M and 21.8M, which are the ResNets'."""
    with torch.device("meta"):
        model = timm.create_model(name)
        resnet = timm.create_model(name.replace("diracnet", "resnet"))
    scales = sum(p.numel() for n, p in model.named_parameters() if n.endswith((".a", ".b")))
    of_resnet = {n: p.numel() for n, p in resnet.named_parameters()}
    assert sum(of_resnet[n] for n in of_resnet if n.endswith("downsample.0.weight")) == projections
    extra = sum(of_resnet[n] for n in of_resnet if "downsample" in n)
    assert count(name) == sum(of_resnet.values()) - extra + scales
    assert round(sum(of_resnet.values()) / 1e6, 1) == {"diracnet18": 11.7, "diracnet34": 21.8}[name]


def test_groups_have_six_n_convolutions():
    """And large ones all but the stem's and the classifier's, as a name of a ResNet counts."""
    for size in SIZES:
        depth = int(size.split("_")[0])
        assert sum(layers_per_group(depth)) == depth - 4
    for depth in LARGE_GROUPS:
        assert sum(layers_per_group(depth, "large")) == depth - 2


def test_generic_entry_point_builds_the_named_networks():
    with torch.device("meta"):
        for name, kwargs in (
            ("diracnet_34_2", {"depth": 34, "width": 2}),
            ("plain_16_1", {"depth": 16, "width": 1, "dirac": False}),
            ("diracnet18", {"depth": 18, "width": 1, "images": "large", "num_classes": 1000}),
        ):
            named, generic = timm.create_model(name), timm.create_model("diracnet", **kwargs)
            assert {k: v.shape for k, v in named.state_dict().items()} == {
                k: v.shape for k, v in generic.state_dict().items()
            }


# ---------------------------------------------------------------- what it computes


def delta(weight):
    """Ones at the centre from channel i to channel i, in the dense form of the definition."""
    return nn.init.dirac_(torch.empty_like(weight))


def reference(weights, x, groups, large, normalize, counts):
    """The network as the code describes it (its small stem ends with a ReLU), over a dictionary of tensors."""

    def get(key):
        counts[key] = counts.get(key, 0) + 1
        return weights[key]

    def batch_norm(t, prefix):
        mean, variance = t.mean((0, 2, 3), keepdim=True), t.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (get(f"{prefix}.{kind}").view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return (t - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    if large:
        x = F.max_pool2d(batch_norm(F.conv2d(x, get("stem.0.weight"), stride=2, padding=3), "stem.1"), 3, 2, 1)
    else:
        x = F.relu(batch_norm(F.conv2d(x, get("stem.0.weight"), padding=1), "stem.1"))
    maps = []
    for group, layers in enumerate(groups, start=1):
        x = F.max_pool2d(x, 2) if group > 1 else x
        for layer in range(layers):
            prefix = f"group{group}.{layer}"
            weight, a = get(f"{prefix}.conv.weight"), get(f"{prefix}.conv.a").view(-1, 1, 1, 1)
            if normalize:
                b = get(f"{prefix}.conv.b").view(-1, 1, 1, 1)
                weight = a * delta(weight) + b * F.normalize(weight.flatten(1)).view_as(weight)
            else:
                weight = a * delta(weight) + weight
            x = batch_norm(F.conv2d(F.relu(x), weight, padding=1), f"{prefix}.norm")
        maps.append(x)
    return F.relu(x).mean((2, 3)) @ get("fc.weight").T + get("fc.bias"), maps


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({"depth": 16}, (32, 32)),
        ({"depth": 10}, (13, 7)),
        ({"depth": 10, "normalize": False}, (9, 8)),
        ({"depth": 18, "images": "large", "width": 1 / 16}, (64, 75)),
    ],
)
def test_equals_the_reference_with_gradients(kwargs, size):
    torch.manual_seed(0)
    model = timm.create_model("diracnet", **{"width": 1, "num_classes": 5, **kwargs}, dtype=torch.float64).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            nn.init.normal_(module.bias)
        elif isinstance(module, DiracConv2d):
            nn.init.normal_(module.a)
            if module.b is not None:
                nn.init.normal_(module.b)
    large, counts = kwargs.get("images") == "large", {}
    x = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    other_x = x.detach().clone().requires_grad_()
    groups = layers_per_group(kwargs["depth"], kwargs.get("images", "small"))
    expected, expected_maps = reference(weights, other_x, groups, large, kwargs.get("normalize", True), counts)
    final, maps = model.forward_intermediates(x)
    scores = model.forward_head(final)
    assert counts == dict.fromkeys(weights, 1), "the reference and the model have other tensors"
    for found, wanted in zip([scores, *maps], [expected, *expected_maps], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert all(m.min() < 0 for m in maps), "the groups' outputs are not those before the ReLU"
    assert final.min() >= 0
    direction = torch.randn_like(scores)
    scores.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-7, atol=1e-9)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-7, atol=1e-9)


def test_with_the_identity_alone_images_reach_the_head():
    """b = 0 and BatchNorms that do nothing: the first channels of the stem come out pooled, whatever the depth."""
    model = timm.create_model("diracnet_100_1").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, math.sqrt(1 + module.eps))
        elif isinstance(module, DiracConv2d):
            nn.init.zeros_(module.b)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = model.forward_features(x)
        expected = F.max_pool2d(F.relu(model.stem(x)), 4)
    torch.testing.assert_close(found[:, :16], expected)
    assert not found[:, 16:].any()


def test_groups_of_large_images():
    with torch.device("meta"):
        model = timm.create_model("diracnet34")
        maps = model.forward_intermediates(torch.empty(1, 3, 224, 224), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    convs = [
        len([m for m in getattr(model, name).modules() if isinstance(m, DiracConv2d)]) for name in model.stage_names
    ]
    assert convs == [6, 8, 12, 6]
    first = [m for m in model.stem if not isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in first] == [nn.Conv2d, nn.MaxPool2d], "there is no ReLU before the first pooling"


# ---------------------------------------------------------------- initialisation, weight decay


def test_initial_weights_follow_the_code():
    torch.manual_seed(0)
    model = timm.create_model("diracnet_16_1", width=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
        if isinstance(module, DiracConv2d):
            assert module.a.unique().tolist() == [1]
            assert module.b.unique().tolist() == [pytest.approx(0.1)]
        elif isinstance(module, nn.BatchNorm2d):
            assert 0 <= module.weight.min() < 0.1
            assert 0.9 < module.weight.max() <= 1
            assert not module.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert not model.fc.bias.any()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    model.init_weights()
    assert not any(torch.equal(p, torch.full_like(p, 7)) for p in model.parameters())
    spread = before["group1.0.conv.weight"].std().item()
    assert model.group1[0].conv.weight.std().item() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("dirac", [True, False])
@pytest.mark.parametrize("std", [1e-8, 1.0])
def test_the_standard_deviation_of_the_groups_can_be_chosen(dirac, std):
    model = timm.create_model("diracnet", depth=10, width=2, dirac=dirac, init_std=std)
    convs = [module.conv for name in model.stage_names for module in getattr(model, name) if hasattr(module, "conv")]
    assert len(convs) == 6
    for conv in convs:
        assert isinstance(conv, DiracConv2d) == dirac
        assert conv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.stem[0].weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.15)


def test_weight_decay_spares_scales_biases_and_norms():
    model = timm.create_model("diracnet_10_1")
    scales = {f"group{g}.{i}.conv.{s}" for g in (1, 2, 3) for i in range(2) for s in "ab"}
    assert model.no_weight_decay() == scales
    groups = Optimizer(weight_decay=5e-4).build(model, model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim > 1}
    assert timm.create_model("plain_10_1").no_weight_decay() == set()


def test_a_layer_is_a_convolution_with_its_batchnorm():
    model = timm.create_model("diracnet_10_1")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["stem.0.weight"] == layers["stem.1.weight"] == 0
    assert layers["group1.0.conv.weight"] == layers["group1.0.conv.a"] == layers["group1.0.norm.bias"] == 1
    assert layers["group3.1.conv.b"] == 6
    assert layers["fc.weight"] == 7
    assert max(group_parameters(model, model.group_matcher(coarse=True))) == 4


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n[9:] == "28_10" else ()) for n in NAMES])
def test_folded_networks_are_plain_and_equal(name, dtype):
    model = trained(name, dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = timm.create_model(name.replace("diracnet", "plain"), norm=False, dtype=dtype).eval()
    folded = fold(model)
    kinds = [[(n, type(m)) for n, m in network.named_modules()] for network in (folded, plain)]
    assert kinds[0] == kinds[1]
    assert {type(m) for m in folded.stem} <= {nn.Conv2d, nn.MaxPool2d}
    assert plain.load_state_dict(folded.state_dict()) == ([], [])
    assert folded.no_weight_decay() == set()
    x = torch.randn(2, 3, *((64, 64) if "group4" in model.stage_names else (32, 32)), dtype=dtype)
    # what many layers of float32 round away in either network depends on the processor
    single = 1e-5 if name in ("diracnet_10_1", "diracnet_16_1") else 5e-5
    tolerance = 1e-12 if dtype == torch.float64 else single
    with torch.no_grad():
        expected, maps = model.forward_intermediates(x)
        scores = model(x)
        assert scores.abs().max() > 0.1
        for network in (folded, plain):
            features, found = network.forward_intermediates(x)
            pairs = [(features, expected), *zip(found, maps, strict=True), (network(x), scores)]
            pairs += [(network.forward_features(x), expected), (network.forward_head(expected), scores)]
            for ours, theirs in pairs:
                assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_folded_network_is_a_backbone_still():
    folded = fold(trained("diracnet_10_1", torch.float32))
    x = torch.randn(2, 3, 16, 16)
    folded.reset_classifier(7)
    assert folded(x).shape == (2, 7)
    assert [m.shape[1] for m in folded.forward_intermediates(x, intermediates_only=True)] == [16, 32, 64]
    folded(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    layers = group_parameters(folded, folded.group_matcher())
    assert sum(map(len, layers.values())) == len(list(folded.parameters()))


# ---------------------------------------------------------------- names and errors


def test_every_name_of_the_design_is_there():
    assert set(list_backbones(["diracnet*", "plain_*"], baton_only=True)) == {
        "diracnet",
        *NAMES,
        *(name.replace("diracnet_", "plain_") for name in NAMES if "_" in name),
    }


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"depth": 27}, r"6n \+ 4 .* got 27; the nearest valid depths are 22 and 28"),
        ({"images": "large", "depth": 50}, "18 or 34 for large images, but got 50"),
        ({"width": 0}, "width multiplier above 0"),
        ({"norm": False}, "dirac=False with norm=False, the form of a folded network"),
        ({"init_std": 0}, "init_std above 0"),
        ({"init_std": -1, "dirac": False}, "init_std of 0 or more, but got -1"),
        ({"global_pool": ""}, "num_classes=0"),
    ],
)
def test_arguments_that_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said):
        create_backbone("diracnet", **{"depth": 10, "width": 1, **kwargs})


@pytest.mark.parametrize(("name", "side"), [("diracnet_10_1", 4), ("diracnet18", 29)])
def test_images_that_are_too_small_are_refused(name, side):
    model = timm.create_model(name, width=1 / 8).eval()
    assert model.forward_features(torch.rand(1, 3, side, side + 1)).shape[2:] == (1, 1)
    with pytest.raises(ValueError, match=f"at least {side} pixels a side, but got {side - 1} x 40; use larger ones"):
        model(torch.rand(1, 3, side - 1, 40))
    assert model.pretrained_cfg["min_input_size"] == (3, side, side)


def test_timms_own_layout_on_disk_brings_the_network_back(tmp_path):
    torch.manual_seed(0)
    arguments = {"depth": 10, "width": 1, "normalize": False}
    model = timm.create_model("diracnet", num_classes=4, **arguments).eval()
    assert isinstance(model, DiracNet)
    timm.models.save_for_hf(model, tmp_path, model_args=arguments)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
