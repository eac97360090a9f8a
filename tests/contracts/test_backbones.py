"""What every backbone promises (DESIGN.md, section 3), asked of each name Baton registers and of a few of timm's own.

A new backbone needs no new test: registering it is enough. Networks of more than LARGE parameters are checked for
shapes and gradients on the meta device, and with real numbers only in the slow tests. Of several such networks that are
built of the same modules, differing in depth and width, the fast tests ask the smallest for more than its class scores.
"""

import copy
import functools
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from baton.backbones import list_backbones
from baton.layers import NJetConv2d
from tiny import undrawn

LARGE = 6_000_000
#: Networks that convert RGB themselves.
RGB_ONLY = {"split_brain"}
OWN = list_backbones(baton_only=True)
TIMMS = ["resnet18", "test_resnet", "test_vit", "test_convnext", "test_efficientnet"]


def build(name, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name)


def build_on_meta(name, **kwargs):
    """The network without numbers."""
    with torch.device("meta"), undrawn():
        return timm.create_model(name, **kwargs)


@functools.cache
def on_meta(name):
    """The network without numbers, which nobody changes."""
    return build_on_meta(name)


def num_parameters(name):
    return sum(p.numel() for p in on_meta(name).parameters())


def is_large(name):
    return num_parameters(name) > LARGE


#: In a fixed order: processes that share the tests must choose the same ones.
LARGE_NAMES = [name for name in OWN + TIMMS if is_large(name)]
REAL = [pytest.param((n, "cpu"), id=n, marks=pytest.mark.slow if n in LARGE_NAMES else ()) for n in OWN + TIMMS]
SHAPES = REAL + [pytest.param((n, "meta"), id=f"{n}-meta") for n in OWN + TIMMS if n in LARGE_NAMES]


def kind_of(name):
    return frozenset(map(type, on_meta(name).modules()))


#: The largest first, so that the smallest of a kind stays; of two as small, the one listed later.
SMALLEST = {kind_of(name): name for name in sorted(LARGE_NAMES, key=num_parameters, reverse=True)}
KINDS = REAL + [
    pytest.param((n, "meta"), id=f"{n}-meta", marks=() if SMALLEST[kind_of(n)] == n else pytest.mark.slow)
    for n in OWN + TIMMS
    if n in LARGE_NAMES
]


@pytest.fixture(scope="module")
def built(request):
    """The network and where it lives; built once for all tests of a name, so a test that changes it takes a copy."""
    name, device = request.param
    model = build(name) if device == "cpu" else copy.deepcopy(on_meta(name))
    return model.eval(), name, device


on_shapes = pytest.mark.parametrize("built", SHAPES, indirect=True)
on_kinds = pytest.mark.parametrize("built", KINDS, indirect=True)
on_values = pytest.mark.parametrize("built", REAL, indirect=True)


def images(model, device="cpu", batch=2, in_chans=None, side=64):
    """Images of the network's own size, or of 64 pixels where it takes any size and its own is larger.

    With a smaller `side` they are as small as the network says it can take.
    """
    channels, *size = model.pretrained_cfg["input_size"]
    if not model.pretrained_cfg.get("fixed_input_size", False):
        smallest = model.pretrained_cfg.get("min_input_size", (0, 64, 64))[1:]
        size = [min(s, max(side, m)) for s, m in zip(size, smallest, strict=True)]
    shape = (batch, in_chans or channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def assert_same(actual, expected):
    """Bit for bit, as far as there are bits."""
    assert actual.shape == expected.shape
    if not actual.is_meta:
        assert torch.equal(actual, expected)


@on_shapes
def test_forward_gives_finite_class_scores(built):
    model, _, device = built
    with torch.no_grad():
        scores = model(images(model, device))
    assert scores.shape == (2, model.num_classes)
    assert model.num_classes == model.pretrained_cfg["num_classes"]
    if device == "cpu":
        assert torch.isfinite(scores).all()
        assert not torch.equal(scores[0], scores[1]), "the scores do not depend on the image"


@on_kinds
def test_every_parameter_gets_a_gradient(built):
    model, name, device = built
    model = copy.deepcopy(model).train()
    if device == "cpu" and name in OWN:  # timm starts branches of its networks, which some of ours contain, at zero
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()):
            nn.init.ones_(norm.weight)
    scores = model(images(model, device))
    F.cross_entropy(scores, torch.tensor([0, 1], device=device)).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    if device == "cpu":
        assert [n for n, p in model.named_parameters() if not torch.isfinite(p.grad).all()] == []
    if device == "cpu" and name in OWN:
        assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


@on_kinds
def test_head_of_features_is_forward(built):
    model, _, device = built
    x = images(model, device)
    with torch.no_grad():
        features = model.forward_features(x)
        assert model.num_features in features.shape[1:]
        assert_same(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert_same(model.get_classifier()(pooled), model(x))


@on_kinds
def test_intermediates_agree_with_feature_info(built):
    model, _, device = built
    x = images(model, device)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert_same(final, model.forward_features(x))
        assert len(maps) == len(model.feature_info)
        for info, found in zip(model.feature_info, maps, strict=True):
            assert found.shape[:2] == (2, info["num_chs"])
            for side, pixels in zip(found.shape[2:], x.shape[2:], strict=True):
                if "receptive_field" in info:  # a network without padding
                    assert side == (pixels - info["receptive_field"]) // info["reduction"] + 1
                else:
                    assert abs(side + info.get("border", 0) - pixels / info["reduction"]) <= 1
            assert info["module"] in dict(model.named_modules())
        alone = model.forward_intermediates(x, indices=[-1], stop_early=True, intermediates_only=True)
        assert len(alone) == 1
        assert_same(alone[0], maps[-1])
        first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert len(first) == 1
        assert_same(first[0], maps[0])
        with pytest.raises((ValueError, AssertionError)):
            model.forward_intermediates(x, output_fmt="CHAOS")


@pytest.mark.parametrize("name", OWN + TIMMS)
def test_features_only_lists_the_same_channels(name):
    model = on_meta(name)
    extractor = build_on_meta(name, features_only=True)
    x = images(model, "meta")
    with torch.no_grad():
        maps = extractor(x)
    channels = extractor.feature_info.channels()
    assert [m.shape[1] for m in maps] == channels
    assert set(channels) <= {info["num_chs"] for info in model.feature_info}


@on_kinds
def test_reset_classifier(built):
    model, name, device = built
    model = copy.deepcopy(model)
    x = images(model, device)
    trunk = {k: v for k, v in model.state_dict().items() if not k.startswith(model.pretrained_cfg["classifier"])}
    with torch.no_grad(), torch.device(device):
        features = model.forward_features(x)
        model.reset_classifier(7)
        assert model.num_classes == 7
        assert model(x).shape == (2, 7)
        model.reset_classifier(0)
        assert model.num_classes == 0
        pooled = model(x)
        assert pooled.shape == (2, model.head_hidden_size)
        assert_same(pooled, model.forward_head(features, pre_logits=True))
        model.reset_classifier(0, "")
        unpooled = model(x)
        assert unpooled.shape == features.shape
        if name in OWN:  # some of timm's heads keep a norm
            assert_same(unpooled, features)
    after = model.state_dict()
    assert after.keys() == trunk.keys()
    for key, value in trunk.items():
        assert_same(after[key], value)


@on_kinds
def test_reset_classifier_restores_a_trainable_one(built):
    model = copy.deepcopy(built[0])
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model.get_classifier().weight.requires_grad
    assert model.get_classifier().weight.dtype == torch.float32
    if built[2] == "cpu":
        assert model.get_classifier().weight.std() > 0


@on_values
def test_saved_and_loaded_network_is_the_same(built):
    model, name, _ = built
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build(name, seed=2).eval()
    x = images(model)
    with torch.no_grad():
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(other(x), model(x))


@on_values
def test_bf16_autocast(built):
    model, _, _ = built
    x = images(model, batch=1, side=16)  # processors without bf16 take a hundred times as long
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(x)
    assert scores.dtype == torch.bfloat16
    assert torch.isfinite(scores).all()
    scores, expected = scores.double(), expected.double()  # a fresh deep network gives scores whose squares vanish
    assert (scores - expected).norm() < 0.1 * expected.norm()


@on_values
def test_channels_last_equals_contiguous(built):
    model, _, _ = built
    x = images(model)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        scores = other(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@on_kinds
def test_gradient_checkpointing_changes_nothing(built):
    model, _, device = built
    x = images(model, device, side=32)
    gradients = [list(model.parameters())]  # whose shapes they have
    for enable in (False, True) if device == "cpu" else (True,):
        # in eval mode, where neither dropout nor BatchNorm's running statistics interfere
        other = copy.deepcopy(model)
        other.set_grad_checkpointing(enable)
        scores = other(x)
        # a fresh network of a hundred layers gives scores whose squares overflow
        (scores / scores.detach().abs().max()).square().mean().backward()
        gradients.append([p.grad for p in other.parameters()])
    for expected, found in zip(*gradients[-2:], strict=True):
        assert found is not None
        assert found.shape == expected.shape
        if device == "cpu":
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OWN + TIMMS)
def test_configuration_describes_the_network(name):
    model = on_meta(name)
    config = model.pretrained_cfg
    channels = config["input_size"][0]
    for statistic in ("mean", "std"):
        assert len(config[statistic]) in (1, channels, 3)
        assert all(0 <= value <= 1 for value in config[statistic])
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    if config["first_conv"] is None and name not in RGB_ONLY:  # timm cannot make its weights fit other channels
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | NJetConv2d))
        assert isinstance(first, NJetConv2d)
        assert first.in_channels == channels
    elif name not in RGB_ONLY:  # whose first convolutions see what it makes of RGB
        assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
        assert model.get_submodule(config["first_conv"]).in_channels == channels
    if name in OWN:
        assert config["architecture"] == name, "no configuration of its own"


@pytest.mark.parametrize("name", OWN + TIMMS)
def test_other_channels_and_no_classifier(name):
    channels = on_meta(name).pretrained_cfg["input_size"][0]
    if name in RGB_ONLY:
        with pytest.raises(ValueError, match="in_chans must be 3, got 4"):
            build_on_meta(name, in_chans=4)
        return
    model = build_on_meta(name, num_classes=0, in_chans=channels + 1)
    with torch.no_grad():
        pooled = model(images(model, "meta", in_chans=channels + 1))
    assert pooled.shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", OWN + TIMMS)
def test_parameters_sort_into_layers_for_the_optimiser(name):
    model = on_meta(name)
    names = {n for n, _ in model.named_parameters()}
    if hasattr(model, "no_weight_decay") and name in OWN:  # timm's name optional parameters too
        assert set(model.no_weight_decay()) <= names
    coarse, fine = (group_parameters(model, model.group_matcher(coarse=c)) for c in (True, False))
    for layers in (coarse, fine):
        assert {n for layer in layers.values() for n in layer} == names
        assert sum(map(len, layers.values())) == len(names)
    assert 1 < len(coarse) <= len(fine)
    classifier = model.pretrained_cfg["classifier"]
    assert any(n.startswith(classifier) for n in fine[max(fine)]), "the classifier is not in the last layer"


def test_both_kinds_of_check_have_networks():
    assert len(LARGE_NAMES) < len(OWN + TIMMS)
    assert LARGE_NAMES
    assert len(OWN) >= 20
