"""All-CNN-C: published parameter counts, maps, and scores and gradients of the published order of its layers."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401

#: Kernel, channels, stride and padding of the paper's convolutions before the one to the classes.
LAYOUT = [
    (3, 96, 1, 1), (3, 96, 1, 1), (3, 96, 2, 1), (3, 192, 1, 1), (3, 192, 1, 1), (3, 192, 2, 1),
    (3, 192, 1, 0), (1, 192, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "published"), [(10, 1_369_738), (100, 1_387_108)])
def test_published_parameter_counts(classes, published):
    channels, by_hand = 3, 0
    for kernel, width, _, _ in [*LAYOUT, (1, classes, 1, 0)]:
        by_hand += kernel**2 * channels * width + width
        channels = width
    with torch.device("meta"):
        model = timm.create_model("allcnn", num_classes=classes)
        normed = timm.create_model("allcnn", num_classes=classes, norm=True)
    assert sum(p.numel() for p in model.parameters()) == by_hand == published
    shifts = 3 * 96 + 5 * 192  # a norm's shifts take the place of the biases, its scales come on top
    assert sum(p.numel() for p in normed.parameters()) == published + shifts


def test_maps_of_32_pixels():
    """The paper averages 6 × 6 cells."""
    with torch.device("meta"):
        model = timm.create_model("allcnn")
        maps = model.forward_intermediates(torch.empty(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 32, 32), (192, 16, 16), (192, 6, 6)]
    assert [(i["reduction"], i["border"]) for i in model.feature_info] == [(1, 0), (2, 0), (4, 2)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 22), (9, 31)])
def test_it_equals_the_published_order(size, norm):
    """In float64: the last convolution cell by cell, and then the average of its map."""
    torch.manual_seed(0)
    rates = {"input_drop_rate": 0.0, "drop_rate": 0.0}
    model = timm.create_model("allcnn", norm=norm, width=1 / 12, num_classes=5, **rates).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    ours = model(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, naive = iter(copies), x
    for _, _, stride, padding in LAYOUT:
        if norm:
            naive = F.conv2d(naive, next(left), None, stride, padding)
            naive = naive - naive.mean((0, 2, 3), keepdim=True)
            naive = naive / (naive.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
            naive = naive * next(left).view(-1, 1, 1) + next(left).view(-1, 1, 1)
        else:
            naive = F.conv2d(naive, next(left), next(left), stride, padding)
        naive = naive.clamp(min=0)
    naive = F.conv2d(naive, next(left)[:, :, None, None], next(left)).mean((2, 3))
    assert next(left, None) is None
    torch.testing.assert_close(ours, naive)
    ours.square().sum().backward()
    naive.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad)


def test_dropout_of_the_image_and_after_each_stride():
    model = timm.create_model("allcnn")
    places = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert places == {"stage1.0": 0.2, "stage2.2": 0.5, "stage3.2": 0.5, "head_drop": 0.0}
    assert model.stage2[0].stride == model.stage3[0].stride == (2, 2)
    x = torch.rand(2, 3, 16, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    without = timm.create_model("allcnn", input_drop_rate=0.0, drop_rate=0.0)
    without.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(without.train()(x), model(x))
    with pytest.raises(ValueError, match=r"input_drop_rate in \[0, 1\), but got 1.5"):
        timm.create_model("allcnn", input_drop_rate=1.5)
    with pytest.raises(ValueError, match=r"Expected drop_rate in \[0, 1\), but got -0.1"):
        timm.create_model("allcnn", drop_rate=-0.1)


def test_weights_are_drawn_over_the_fan_in():
    torch.manual_seed(0)
    model = timm.create_model("allcnn", num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.05)
            assert not layer.bias.any()


def test_images_that_are_too_small_are_refused():
    model = timm.create_model("allcnn", width=0.1).eval()
    assert model(torch.rand(1, 3, 9, 10)).shape == (1, 10)
    with pytest.raises(ValueError, match="at least 9 pixels a side, but got 9 x 8; use larger ones"):
        model(torch.rand(1, 3, 9, 8))
    assert model.pretrained_cfg["min_input_size"] == (3, 9, 9)
