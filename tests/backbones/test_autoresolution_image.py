"""The image tower: forty convolutions, Inception modules, resolutions."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from baton.backbones.autoresolution_image import WIDTHS, Inception


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("name", ["autoresolution_image", "autoresolution_image_large"])
@pytest.mark.parametrize("kwargs", [{}, {"norm": False}, {"width": 0.25}])
def test_exactly_forty_convolutions_and_relus(name, kwargs):
    model = timm.create_model(name, **kwargs)
    called = []
    for conv in convolutions(model):
        conv.register_forward_hook(lambda *_: called.append(1))
    model.eval()(torch.rand(1, 3, 32, 32))
    assert len(convolutions(model)) == len(called) == 40
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 40
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert norms == (0 if kwargs.get("norm") is False else 40)
    assert all((conv.bias is None) == bool(norms) for conv in convolutions(model))


def test_parameter_counts():
    """Counted by hand: k² times in times out and two for each norm's channel, over the table of widths."""
    stem = [(3, 64, 3), (64, 64, 1), (64, 96, 3)]
    channels, layers = 96, list(stem)
    for widths in WIDTHS:
        one, reduce3, three, reduce5, five, pooled = (w // 2 for w in widths)
        layers += [(channels, one, 1), (channels, reduce3, 1), (reduce3, three, 3), (channels, reduce5, 1)]
        layers += [(reduce5, five, 5), (channels, pooled, 1)]
        channels = one + three + five + pooled
    layers.append((channels, 128, 1))
    expected = sum(i * o * k * k + 2 * o for i, o, k in layers)
    model = timm.create_model("autoresolution_image", num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == expected == 1_066_280


@pytest.mark.parametrize(("name", "size", "sides"), [
    ("autoresolution_image", 32, [32, 32, 16, 8, 8]),
    ("autoresolution_image", 21, [21, 21, 11, 6, 6]),
    ("autoresolution_image_large", 224, [28, 28, 14, 7, 7]),
    ("autoresolution_image_large", 65, [9, 9, 5, 3, 3]),
])  # fmt: skip
def test_resolutions_of_the_stages(name, size, sides):
    model = timm.create_model(name, width=0.1).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.rand(1, 3, size, size), intermediates_only=True)
    assert [m.shape[-1] for m in maps] == sides
    assert maps[-1].shape[1] == model.num_features == 128
    assert all((m >= 0).all() for m in maps), "every stage ends in a ReLU"


def test_an_inception_module_is_its_four_branches():
    torch.manual_seed(0)
    module = Inception(5, (3, 4, 6, 2, 5, 7), norm=False).double()
    x = torch.randn(2, 5, 7, 9, dtype=torch.float64)

    def conv(branch, x):
        return F.relu(F.conv2d(x, branch.conv.weight, branch.conv.bias, padding=branch.conv.kernel_size[0] // 2))

    pooled = torch.stack([
        F.pad(x, (1, 1, 1, 1), value=-torch.inf)[:, :, i : i + 7, j : j + 9] for i in range(3) for j in range(3)
    ]).amax(0)  # fmt: skip
    expected = [
        conv(module.branch1, x),
        conv(module.branch3[1], conv(module.branch3[0], x)),
        conv(module.branch5[1], conv(module.branch5[0], x)),
        conv(module.branch_pool[1], pooled),
    ]
    assert torch.allclose(module(x), torch.cat(expected, 1), atol=1e-12)
    assert module.out_channels == 3 + 6 + 5 + 7


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"width": 0}, "width multiplier above 0"),
    ({"drop_rate": 1.0}, "drop_rate"),
    ({"global_pool": ""}, "num_classes=0"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model("autoresolution_image", **kwargs)


def test_dropout_acts_before_the_classifier():
    model = timm.create_model("autoresolution_image", width=0.1, drop_rate=0.5).train()
    features = torch.ones(1, 128, 8, 8)
    dropped = model.forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(1, 128))
