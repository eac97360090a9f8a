"""The split-brain poster's networks: published parameter counts, maps, and outputs of an independent construction."""

import pytest
import timm
import torch
from torch import nn

import baton  # noqa: F401


def count(name, in_chans):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, in_chans=in_chans, num_classes=0).parameters())


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("simplenet", 389_440, 389_632),
        ("fc_alexnet", 72_316_420, 72_326_020),
        ("fc_resnet18", 3_303_512, 3_306_648),
    ],
)
def test_published_parameter_counts(name, one, two):
    assert (count(name, 1), count(name, 2)) == (one, two)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("simplenet", [48, 24, 20, 16, 12]),
        ("fc_alexnet", [45, 23, 12, 12, 12, 12, 12, 12]),
        ("fc_resnet18", [24, 24, 24, 24, 24]),
    ],
)
def test_maps_of_96_pixels(name, sides):
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=1, num_classes=0)
        maps = model.forward_intermediates(torch.empty(1, 1, 96, 96), intermediates_only=True)
    assert [m.shape[2] for m in maps] == sides
    assert maps[-1].shape[1] == 100


def test_simplenet_equals_the_plain_layers():
    def block(i, o, k, s, p):
        return [nn.Conv2d(i, o, k, s, p), nn.BatchNorm2d(o), nn.ReLU()]

    plain = nn.Sequential(
        *block(2, 12, 4, 2, 1), *block(12, 24, 4, 2, 1), *block(24, 48, 5, 1, 0), *block(48, 96, 5, 1, 0),
        nn.Conv2d(96, 100, 5),
    ).double()  # fmt: skip
    model = timm.create_model("simplenet", in_chans=2, num_classes=0).double()
    model.load_state_dict(dict(zip(model.state_dict(), plain.state_dict().values(), strict=True)))
    x = torch.rand(2, 2, 65, 71, dtype=torch.float64)
    ours, theirs = model.forward_features(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_classifier_sees_the_whole_map():
    """The poster's fine-tuning: one linear layer on 100 x 12 x 12 logits a half."""
    model = timm.create_model("simplenet", num_classes=7, global_pool="map12").eval()
    assert model.fc.weight.shape == (7, 100 * 144)
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.fc(model.forward_features(x).flatten(1)))
    model.reset_classifier(0, "map3")
    assert model(x).shape == (2, 900)
    assert model.head_hidden_size == 900
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)


SMALL = [("simplenet", {"padded": True}), ("fc_alexnet", {"width": 0.1}), ("fc_resnet18", {"width": 0.25})]


@pytest.mark.parametrize(("name", "kwargs"), SMALL)
def test_small_images(name, kwargs):
    model = timm.create_model(name, num_classes=4, out_chans=9, **kwargs)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert model.num_features == 9
    assert model.feature_info[-1]["num_chs"] == 9


def test_resnet_logits_are_not_negative_and_drawn_over_the_fan_out():
    torch.manual_seed(0)
    model = timm.create_model("fc_resnet18", in_chans=1, num_classes=0)
    assert model.forward_features(torch.rand(1, 1, 32, 32)).min() == 0
    conv = model.stage3[1].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    assert model.stage1[0].downsample is None
    assert model.stage4[0].downsample is not None


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="width multiplier above 0"):
        timm.create_model("simplenet", width=0.0)


@pytest.mark.parametrize(("name", "needed"), [("simplenet", 52), ("fc_alexnet", 8)])
def test_images_that_are_too_small_are_refused(name, needed):
    model = timm.create_model(name, width=0.1, num_classes=2).eval()
    assert model(torch.rand(1, 3, needed, needed + 1)).shape == (1, 2)
    with pytest.raises(ValueError, match=f"at least {needed} pixels a side, but got {needed} x {needed - 1}"):
        model(torch.rand(1, 3, needed, needed - 1))
