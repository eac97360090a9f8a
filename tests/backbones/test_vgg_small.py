"""VGG-16 and VGG-19 for 32 pixels: parameters counted by hand, maps, outputs and gradients of a naive construction."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401

WIDTHS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
WIDTHS_19 = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
#: Widths, convolutions that a pooling follows, what BatchNorm adds to the variance, how a side is halved.
LAYOUTS = {
    "vgg16_small": (WIDTHS, [1, 3, 6, 9, 12], 1e-5, math.floor),
    "vgg19_small": (WIDTHS_19, [1, 3, 7, 11, 15], 1e-3, math.ceil),
}


def test_parameters_are_those_of_the_layout():
    weights = sum(9 * i * o for i, o in zip([3, *WIDTHS], WIDTHS, strict=False))
    assert weights + sum(WIDTHS) == 14_714_688  # the convolutions of VGG-16, as torchvision counts them
    with torch.device("meta"):
        plain, normed = (timm.create_model("vgg16_small", norm=norm) for norm in (False, True))
    assert sum(p.numel() for p in plain.parameters()) == weights + sum(WIDTHS) + 512 * 10 + 10 == 14_719_818
    assert sum(p.numel() for p in normed.parameters()) == weights + 2 * sum(WIDTHS) + 512 * 10 + 10 == 14_724_042


def test_parameters_of_vgg19_are_those_of_the_code():
    weights = sum(9 * i * o for i, o in zip([3, *WIDTHS_19], WIDTHS_19, strict=False))
    assert weights + sum(WIDTHS_19) == 20_024_384  # the convolutions of VGG-19, as torchvision counts them
    with torch.device("meta"):
        model = timm.create_model("vgg19_small")
    assert sum(p.numel() for p in model.parameters()) == weights + 2 * sum(WIDTHS_19) + 512 * 10 + 10 == 20_035_018
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("norm", [False, True])
def test_stages_are_leaves_and_end_with_their_pooling(norm):
    with torch.device("meta"):
        model = timm.create_model("vgg16_small", norm=norm)
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] if norm else [nn.Conv2d, nn.ReLU]
    for name, convolutions in zip(model.stage_names, (2, 2, 3, 3, 3), strict=True):
        stage = getattr(model, name)
        assert [type(layer) for layer in stage] == block * convolutions + [nn.MaxPool2d]
        assert (stage[-1].kernel_size, stage[-1].stride, stage[-1].padding) == (2, 2, 0)
    head = {"norm", "act", "global_pool.pool", "global_pool.flatten", "head_drop", "fc", "global_pool"}
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    assert {name for name in leaves if not name.startswith("stage")} <= head
    assert type(model.norm) is type(model.act) is nn.Identity


def test_vgg19_pools_by_maxima_and_once_by_an_average():
    with torch.device("meta"):
        model = timm.create_model("vgg19_small")
    block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    poolings = [nn.MaxPool2d] * 4 + [nn.AvgPool2d]
    for name, convolutions, pooling in zip(model.stage_names, (2, 2, 4, 4, 4), poolings, strict=True):
        assert [type(layer) for layer in getattr(model, name)] == block * convolutions + [pooling]


@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_of_32_pixels(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        maps = model.forward_intermediates(torch.empty(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512, 1, 1)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert [info["border"] for info in model.feature_info] == [0] * 5


def windows(x, halved):
    """Windows of 2 × 2; where they round up, what hangs over the edge is NaN."""
    height, width = (2 * halved(side / 2) for side in x.shape[2:])
    padded = x.new_full((*x.shape[:2], height, width), math.nan)
    padded[:, :, : x.shape[2], : x.shape[3]] = x[:, :, :height, :width]
    return padded.unfold(2, 2, 2).unfold(3, 2, 2)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vgg16_small", (32, 32)),
        ("vgg16_small", (47, 65)),
        ("vgg19_small", (32, 32)),
        ("vgg19_small", (37, 65)),
        ("vgg19_small", (51, 3)),
    ],
)
def test_it_equals_the_naive_network(name, size, norm):
    """In float64 and training, where BatchNorm takes the batch's own statistics."""
    widths, last, eps, halved = LAYOUTS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, norm=norm, width=1 / 16, num_classes=5).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    ours = model(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, naive = iter(copies), x
    for number in range(len(widths)):
        if norm:
            naive = F.conv2d(naive, next(left), padding=1)
            naive = naive - naive.mean((0, 2, 3), keepdim=True)
            naive = naive / (naive.square().mean((0, 2, 3), keepdim=True) + eps).sqrt()
            naive = naive * next(left).view(-1, 1, 1) + next(left).view(-1, 1, 1)
        else:
            naive = F.conv2d(naive, next(left), next(left), padding=1)
        naive = naive.clamp(min=0)
        if name == "vgg19_small" and number == last[-1]:
            naive = windows(naive, halved).nanmean((4, 5))
        elif number in last:
            naive = windows(naive, halved).nan_to_num(-math.inf).amax((4, 5))
    assert naive.shape == (3, 32, halved(size[0] / 32), halved(size[1] / 32))
    naive = F.linear(naive.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    torch.testing.assert_close(ours, naive)
    ours.square().sum().backward()
    naive.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad)


def test_weights_are_drawn_over_the_fan_out():
    torch.manual_seed(0)
    model = timm.create_model("vgg16_small", norm=False, width=0.5, num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * layer.out_channels)), rel=0.1)
            assert not layer.bias.any()
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.fc.bias.any()


def test_weights_of_vgg19_are_drawn_as_the_code_draws_them():
    torch.manual_seed(0)
    model = timm.create_model("vgg19_small", width=0.5, num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * layer.in_channels)), rel=0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.eps == 1e-3
            assert 0 <= layer.weight.min() < 0.2
            assert 0.8 < layer.weight.max() <= 1
            assert not layer.bias.any()
    bound = 1 / math.sqrt(256)
    for drawn in (model.fc.weight, model.fc.bias):
        assert 0.9 * bound < drawn.abs().max() <= bound


def test_width_and_dropout():
    model = timm.create_model("vgg16_small", width=0.25, in_chans=1, drop_rate=0.5)
    assert [info["num_chs"] for info in model.feature_info] == [16, 32, 64, 128, 128]
    assert model.head_drop.p == 0.5
    assert model.eval()(torch.rand(1, 1, 32, 33)).shape == (1, 10)
    with pytest.raises(ValueError, match="width multiplier above 0"):
        timm.create_model("vgg16_small", width=0.0)
    with pytest.raises(ValueError, match=r"drop_rate in \[0, 1\), but got 1"):
        timm.create_model("vgg16_small", drop_rate=1)


def test_images_that_are_too_small_are_refused():
    with torch.device("meta"):
        model = timm.create_model("vgg16_small")
        with pytest.raises(ValueError, match="at least 32 pixels a side, but got 40 x 31; use larger ones"):
            model(torch.empty(1, 3, 40, 31))
    assert model.pretrained_cfg["min_input_size"] == (3, model.min_side, model.min_side)


def test_vgg19_takes_images_of_any_size():
    model = timm.create_model("vgg19_small", width=0.1).eval()
    assert model(torch.rand(1, 3, 1, 33)).shape == (1, 10)
    assert model.pretrained_cfg["min_input_size"] == (3, model.min_side, model.min_side) == (3, 1, 1)
    with pytest.raises(ValueError, match=r"drop_rate in \[0, 1\), but got -1"):
        timm.create_model("vgg19_small", drop_rate=-1)
