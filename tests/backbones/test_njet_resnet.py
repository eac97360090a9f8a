"""ResNets with N-Jet layers: counts, shortcuts that follow the scale, and a naive construction."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.backbones.njet_resnet import ResizedShortcut, ShrinkingBlock
from baton.layers.njet import njet_layers
from jet_by_hand import convolved, normed, shrunk


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


BOTTLENECKS = {"block": "bottleneck", "shortcut": "B"}


@pytest.mark.parametrize(
    ("name", "options", "parameters", "layers"),
    [
        ("njet_resnet32", {}, 515_433, 31),
        ("njet_resnet32", {"order": 2}, 310_441, 31),
        ("njet_resnet110", {}, 1_154_999, 109),
        ("njet_resnet110", {"order": 3}, 1_919_095, 109),
        ("njet_resnet110", BOTTLENECKS, 1_413_761, 55),
        ("njet_resnet110", {"order": 3, **BOTTLENECKS}, 1_801_025, 55),
    ],
)
def test_parameter_counts(name, options, parameters, layers):
    """Of the network without N-Jet layers: 9 weights become 6 or 10, and each layer has a scale."""
    model = meta(name, **options)
    kinds = {key: value for key, value in options.items() if key != "order"}
    twin = meta("resnet_cifar", depth=int(name.removeprefix("njet_resnet")), **kinds)
    basis = 10 if options.get("order", 3 if name == "njet_resnet32" else 2) == 3 else 6
    spatial = [m.weight for m in twin.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    by_hand = sum(p.numel() for p in twin.parameters()) + sum(w.numel() // 9 * (basis - 9) + 1 for w in spatial)
    assert sum(p.numel() for p in model.parameters()) == by_hand == parameters
    assert len(njet_layers(model)) == len(spatial) == layers
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("njet_resnet32", {}, [32, 27, 23]),
        ("njet_resnet32", {"sigma": 2.0}, [32, 23, 16]),
        ("njet_resnet32", {"sigma": 3.0, "rule": "code"}, [32, 16, 8]),
        ("njet_resnet32", {"subsample": "stride"}, [32, 16, 8]),
        ("njet_resnet110", {"depth": 14}, [32, 16, 8]),
    ],
)
def test_only_the_layers_that_had_a_stride_subsample(name, options, expected):
    model = timm.create_model(name, **{"depth": 8, **options}).eval()
    maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert [m.shape[2] for m in maps] == expected
    assert [info["reduction"] for info in model.feature_info] == pytest.approx([32 / s for s in expected], rel=0.02)
    shrinking = [name for name, m in model.named_modules() if isinstance(m, ShrinkingBlock)]
    assert shrinking == (["layer2.0", "layer3.0"] if name == "njet_resnet32" and "subsample" not in options else [])


def test_sides_follow_a_loaded_scale():
    model = timm.create_model("njet_resnet32", depth=8).eval()
    other = timm.create_model("njet_resnet32", depth=8).eval()
    with torch.no_grad():
        model.layer2[0].conv1.conv.log2_sigma.fill_(2.0)
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert [m.shape[2] for m in other.forward_intermediates(x, intermediates_only=True)] == [32, 16, 13]
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("size", [(16, 16), (13, 18)])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("subsample", ["safe", "stride"])
def test_it_equals_the_naive_network(subsample, shortcut, size):
    torch.manual_seed(0)
    options = {"subsample": subsample, "shortcut": shortcut, "num_classes": 5, "order": 2}
    sigmas = [0.7, 1.1, 1.0, 1.4, 0.9, 0.6, 1.0]
    model = timm.create_model("njet_resnet32", depth=8, sigma=sigmas, **options).double()
    assert [layer.sigma.item() for _, layer in njet_layers(model)] == pytest.approx(sigmas)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    scores = model(x)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    used = set()

    def get(name):
        used.add(name)
        return weights[name]

    def jet(y, name, norm, stride=1):
        y = convolved(y, get(f"{name}.weight"), get(f"{name}.log2_sigma"), 2, stride)
        if name.endswith("conv1.conv"):
            y = shrunk(y, *(round(side * 0.5 ** (2 ** get(f"{name}.log2_sigma").item() / 4)) for side in y.shape[2:]))
        return normed(y, get(f"{norm}.weight"), get(f"{norm}.bias"))

    y = jet(x, "conv1", "bn1").clamp(min=0)
    for number in (1, 2, 3):
        block, changes = f"layer{number}.0", number > 1
        safe = changes and subsample == "safe"
        z = jet(y, f"{block}.conv1{'.conv' if safe else ''}", f"{block}.bn1", 2 if changes and not safe else 1)
        z = jet(z.clamp(min=0), f"{block}.conv2", f"{block}.bn2")
        if changes:
            y = shrunk(y, *z.shape[2:]) if safe else y[:, :, ::2, ::2]
            if shortcut == "B":
                place = f"{block}.downsample{'.projection' if safe else ''}"
                y = normed(F.conv2d(y, get(f"{place}.0.weight")), get(f"{place}.1.weight"), get(f"{place}.1.bias"))
            else:
                y = torch.cat([y, torch.zeros_like(y)], 1)
        y = (y + z).clamp(min=0)
    expected = F.linear(y.mean((2, 3)), get("fc.weight"), get("fc.bias"))
    assert used == weights.keys()
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    scores.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-6, atol=1e-8)


def test_a_shortcut_resizes_both_ways():
    x = torch.rand(2, 3, 6, 5)
    short = ResizedShortcut(3, 5, "A", "nearest")
    found = short(x, (4, 5))
    assert found.shape == (2, 5, 4, 5)
    assert torch.equal(found[:, :3], shrunk(x, 4, 5))
    assert not found[:, 3:].any()
    assert torch.equal(short(x, (6, 5))[:, :3], x)
    assert not list(short.parameters())
    assert ResizedShortcut(3, 5, "B", "nearest")(x, (9, 9)).shape == (2, 5, 9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "bottleneck"}, "Expected basic blocks with subsample='safe', but got 'bottleneck'"),
        ({"subsample": "none"}, "Expected subsample 'safe', 'stride', but got 'none'"),
        ({"depth": 33}, "Expected a depth of 6n"),
        ({"sigma": [1.0, 2.0]}, "a list of 31 for the N-Jet layers"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        meta("njet_resnet32", **options)
