"""ResNets of He et al. for CIFAR: parameter counts, an independent reference forward, shortcuts, errors."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from baton.backbones import create_backbone, list_backbones
from baton.backbones.resnet_cifar import PaddedShortcut

READINGS = [("basic", "A"), ("basic", "B"), ("bottleneck", "B"), ("bottleneck", "A")]


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def count(name, **kwargs):
    return sum(p.numel() for p in meta(name, **kwargs).parameters())


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "kwargs", "parameters"),
    [
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet32", {"shortcut": "B"}, 466_906),
        ("resnet110", {}, 1_727_962),
        ("resnet110", {"shortcut": "B"}, 1_730_714),
        ("resnet110", {"block": "bottleneck", "shortcut": "B"}, 1_704_154),
    ],
)
def test_published_parameter_counts(name, kwargs, parameters):
    assert count(name, **kwargs) == parameters


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7"), (1202, "19.4")]
)
def test_table_6_of_the_paper(depth, millions):
    assert f"{count('resnet_cifar', depth=depth) / 1e6:.{len(millions.split('.')[1])}f}" == millions


@pytest.mark.parametrize(
    ("options", "blocks", "layers"), [({}, 18, 110), ({"block": "bottleneck", "shortcut": "B"}, 18, 164)]
)
def test_resnet_110_has_as_many_layers_as_its_reading_says(options, blocks, layers):
    model = meta("resnet110", **options)
    assert [len(getattr(model, name)) for name in model.stage_names] == [blocks] * 3
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(weighted) == layers
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_the_generic_entry_point_builds_the_named_networks():
    for name, depth in (("resnet20", 20), ("resnet32", 32), ("resnet110", 110)):
        named, generic = (m.state_dict() for m in (meta(name), meta("resnet_cifar", depth=depth)))
        assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in generic.items()}


# ---------------------------------------------------------------- what it computes


def reference(weights, x, blocks, block, counts):
    """The network from the paper's description, written over a dictionary of tensors.

    `counts` collects how often each tensor is read. Which shortcut there is, the tensors tell.
    """

    def get(key):
        counts[key] = counts.get(key, 0) + 1
        return weights[key]

    def normed(t, prefix):
        centred = t - t.mean((0, 2, 3), keepdim=True)
        t = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return t * get(f"{prefix}.weight").view(-1, 1, 1) + get(f"{prefix}.bias").view(-1, 1, 1)

    def convolved(t, number, prefix, stride):
        kernel = weights[f"{prefix}conv{number}.weight"].shape[-1]
        t = F.conv2d(t, get(f"{prefix}conv{number}.weight"), stride=stride, padding=kernel // 2)
        return normed(t, f"{prefix}bn{number}")

    steps = {"basic": (2, 1), "bottleneck": (3, 2)}[block]  # convolutions, and which has the stride
    t = convolved(x, 1, "", 1).clamp(min=0)
    stages = []
    for stage in (1, 2, 3):
        for index in range(blocks):
            prefix, halves = f"layer{stage}.{index}.", stage > 1 and index == 0
            y = t
            for number in range(1, steps[0] + 1):
                y = convolved(y, number, prefix, 2 if halves and number == steps[1] else 1)
                y = y.clamp(min=0) if number < steps[0] else y
            if f"{prefix}downsample.0.weight" in weights:
                t = F.conv2d(t, get(f"{prefix}downsample.0.weight"), stride=2 if halves else 1)
                t = normed(t, f"{prefix}downsample.1")
            elif t.shape != y.shape:
                padded = torch.zeros_like(y)
                for channel in range(t.shape[1]):
                    for row in range(y.shape[2]):
                        for column in range(y.shape[3]):
                            step = 2 if halves else 1
                            padded[:, channel, row, column] = t[:, channel, step * row, step * column]
                t = padded
            t = (t + y).clamp(min=0)
        stages.append(t)
    return t.mean((2, 3)) @ get("fc.weight").T + get("fc.bias"), stages


@pytest.mark.parametrize(("depth", "size"), [(8, (16, 16)), (8, (13, 7)), (14, (9, 11))])
@pytest.mark.parametrize(("block", "shortcut"), READINGS)
def test_equals_the_reference_with_gradients(block, shortcut, depth, size):
    """In float64 and training, where BatchNorm takes the batch's own statistics."""
    torch.manual_seed(0)
    kwargs = {"block": block, "shortcut": shortcut, "num_classes": 5, "dtype": torch.float64}
    model = timm.create_model("resnet_cifar", depth=depth, **kwargs)
    for module in model.modules():  # scales and shifts start at one and zero, where they could not be told apart
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    other_x, counts = x.detach().clone().requires_grad_(), {}

    features, maps = model.forward_intermediates(x)
    scores = model.forward_head(features)
    expected, stages = reference(weights, other_x, (depth - 2) // 6, block, counts)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)
    for found, stage in zip(maps, stages, strict=True):
        torch.testing.assert_close(found, stage, rtol=1e-10, atol=1e-10)
    assert counts == dict.fromkeys(weights, 1), "the reference and the model have other tensors"

    direction = torch.randn_like(scores)
    scores.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-8, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (6, 5)])
@pytest.mark.parametrize(("extra", "stride"), [(3, 2), (3, 1), (0, 2)])
def test_shortcut_a_subsamples_and_appends_zeros(extra, stride, size):
    x = torch.rand(2, 4, *size)
    found = PaddedShortcut(extra, stride)(x)
    assert found.shape == (2, 4 + extra, *(math.ceil(side / stride) for side in size))
    assert torch.equal(found[:, :4], x[:, :, ::stride, ::stride])
    assert not found[:, 4:].any()
    assert not list(PaddedShortcut(extra, stride).parameters())


@pytest.mark.parametrize(("block", "shortcut"), READINGS)
def test_only_blocks_that_change_the_shape_have_a_shortcut(block, shortcut):
    model = meta("resnet_cifar", depth=14, block=block, shortcut=shortcut)
    changing = {n.removesuffix(".downsample"): m for n, m in model.named_modules() if n.endswith(".downsample")}
    first = ["layer1.0"] if block == "bottleneck" else []  # from 16 channels to 64
    assert list(changing) == [*first, "layer2.0", "layer3.0"]
    kind = PaddedShortcut if shortcut == "A" else nn.Sequential
    assert {type(m) for m in changing.values()} == {kind}


@pytest.mark.parametrize(("block", "factor"), [("basic", 1), ("bottleneck", 4)])
def test_intermediates_are_the_outputs_of_the_stages(block, factor):
    torch.manual_seed(0)
    model = timm.create_model("resnet_cifar", depth=14, block=block).eval()
    assert [info["num_chs"] for info in model.feature_info] == [16 * factor, 32 * factor, 64 * factor]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4]
    taps = []
    for name in model.stage_names:
        model.get_submodule(name).register_forward_hook(lambda m, i, out: taps.append(out.clone()))
    with torch.no_grad():
        final, maps = model.forward_intermediates(torch.randn(2, 3, 17, 15))
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 15), (9, 8), (5, 4)]
    for tap, found in zip(taps, maps, strict=True):
        assert torch.equal(tap, found), "a later stage changed the map"
        assert found.min() == 0
    assert final is maps[-1]
    assert model.num_features == 64 * factor


def test_the_stem_learns_as_the_first_layer():
    layers = group_parameters(meta("resnet20"), meta("resnet20").group_matcher(), reverse=True)
    assert layers["conv1.weight"] == layers["bn1.bias"] == 0
    assert layers["layer1.0.conv1.weight"] == 1
    assert layers["layer3.2.bn2.weight"] == 9
    assert layers["fc.weight"] == 10
    assert max(group_parameters(meta("resnet20"), meta("resnet20").group_matcher(coarse=True))) == 4


# ---------------------------------------------------------------- initialisation, configuration, names, errors


def test_weights_are_drawn_over_the_fan_out():
    torch.manual_seed(0)
    model = timm.create_model("resnet20", block="bottleneck", shortcut="B", num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2)
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()
    bound = 1 / math.sqrt(256)
    for drawn in (model.fc.weight, model.fc.bias):
        assert 0.9 * bound < drawn.abs().max() <= bound


def test_names_of_tensors_are_those_of_the_code():
    keys = meta("resnet20", shortcut="B").state_dict().keys()
    assert {"conv1.weight", "bn1.weight", "layer1.2.conv2.weight", "layer2.0.bn2.bias", "fc.bias"} <= keys
    assert {"layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_var"} <= keys
    assert not [key for key in meta("resnet20").state_dict() if "downsample" in key]


def test_no_name_is_timms():
    own = list_backbones("resnet*", baton_only=True)
    assert own == ["resnet20", "resnet32", "resnet110", "resnet_cifar"]
    assert [name for name in own if hasattr(timm.models, name)] == []


def test_digits_of_one_channel_with_dropout():
    model = timm.create_model("resnet20", in_chans=1, drop_rate=0.5)
    assert model.head_drop.p == 0.5
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"depth": 30}, r"6n \+ 2 \(3 stages of n blocks\), but got 30; the nearest valid depths are 26 and 32"),
        ({"depth": 2}, "got 2; the nearest valid depth is 8"),
        ({"depth": -3}, "got -3; the nearest valid depth is 8"),
        ({"block": "wide"}, "block 'basic' or 'bottleneck', but got 'wide'"),
        ({"shortcut": "C"}, r"shortcut 'A' \(zero channels\) or 'B' \(projection\), but got 'C'"),
        ({"drop_rate": 1.0}, r"drop_rate in \[0, 1\)"),
        ({"global_pool": ""}, "num_classes=0"),
    ],
)
def test_arguments_that_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said):
        create_backbone("resnet_cifar", **{"depth": 8, **kwargs})
