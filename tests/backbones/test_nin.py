"""Networks in networks: the code's parameter counts, maps, and outputs and gradients of a naive construction."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton.layers

LAYOUT = [(5, 192), (1, 160), (1, 96), (5, 192), (1, 192), (1, 192), (3, 192), (1, 192), (1, 192)]  # kernel, channels


def by_hand(divisor, classes=10):
    channels, total = 3, 0
    for kernel, width in LAYOUT:
        total += kernel**2 * channels * (width // divisor) + 2 * (width // divisor)
        channels = width // divisor
    return total + channels * classes + classes


@pytest.mark.parametrize(("name", "divisor", "published"), [("nin", 1, 1_005_642), ("nin_thin", 2, 256_298)])
def test_parameters_are_those_of_the_code(name, divisor, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == by_hand(divisor) == published
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(("name", "widths"), [("nin", (96, 192, 192)), ("nin_thin", (48, 96, 96))])
def test_groups_end_before_a_reduction(name, widths):
    with torch.device("meta"):
        model = timm.create_model(name)
        maps = model.forward_intermediates(torch.empty(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(w, s, s) for w, s in zip(widths, (32, 16, 8), strict=True)]
    assert [(i["reduction"], i["border"]) for i in model.feature_info] == [(1, 0), (2, 0), (4, 0)]
    pools = [(name, type(m), m.kernel_size, m.stride) for name, m in model.named_modules() if hasattr(m, "ceil_mode")]
    assert pools == [("group2.0", nn.MaxPool2d, 3, 2), ("group3.0", nn.AvgPool2d, 3, 2)]


def overhanging(x):
    """Add what windows of 3 with stride 2 that round up hang over, as NaN."""
    height, width = (2 * math.ceil((side - 3) / 2) + 3 for side in x.shape[2:])
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=math.nan).unfold(2, 3, 2).unfold(3, 3, 2)


def maximum(x):
    return overhanging(x).nan_to_num(-math.inf).amax((4, 5))


def average(x):
    return overhanging(x).nanmean((4, 5))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (15, 22), (17, 13), (4, 7)])
def test_it_equals_the_naive_network(size, norm, relu):
    """In float64 and training, where BatchNorm takes the batch's own statistics."""
    torch.manual_seed(0)
    model = timm.create_model("nin", norm=norm, relu_before_pool=relu, width=1 / 16, num_classes=5).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    ours, maps = model.forward_intermediates(x)
    scores = model.forward_head(ours)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, naive, groups = iter(copies), x, []
    for number, (kernel, _) in enumerate(LAYOUT):
        if number == 3:
            naive = maximum(naive)
        elif number == 6:
            naive = average(naive)
        if norm:
            naive = F.conv2d(naive, next(left), padding=kernel // 2)
            naive = naive - naive.mean((0, 2, 3), keepdim=True)
            naive = naive / (naive.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
            naive = naive * next(left).view(-1, 1, 1) + next(left).view(-1, 1, 1)
        else:
            naive = F.conv2d(naive, next(left), next(left), padding=kernel // 2)
        naive = naive.clamp(min=0) if relu or number % 3 < 2 else naive
        if number % 3 == 2:
            groups.append(naive)
    for found, expected in zip(maps, groups, strict=True):
        torch.testing.assert_close(found, expected)
    naive = F.linear(naive.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    torch.testing.assert_close(scores, naive)
    scores.square().sum().backward()
    naive.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad)


@pytest.mark.parametrize(("name", "norm"), [("nin", True), ("nin_thin", False)])
def test_without_the_relus_before_poolings_nothing_else_changes(name, norm):
    """Three ReLUs less, no parameter; attention then compares maps of both signs, and folding finds its BatchNorms."""
    torch.manual_seed(0)
    twin = timm.create_model(name, norm=norm).eval()
    model = timm.create_model(name, norm=norm, relu_before_pool=False).eval()
    model.load_state_dict(twin.state_dict())
    kinds = [[type(layer) for layer in network.modules()] for network in (model, twin)]
    assert [kind.count(nn.ReLU) for kind in kinds] == [6, 9]
    assert [type(getattr(model, f"group{i}")[-1]) for i in (1, 2, 3)] == [nn.BatchNorm2d if norm else nn.Conv2d] * 3
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert all(found.min() < 0 < found.max() for found in maps)
        torch.testing.assert_close(maps[0].relu(), twin.forward_intermediates(x, intermediates_only=True)[0])
        assert not torch.allclose(model(x), twin(x))
        if norm:
            torch.testing.assert_close(baton.layers.fold(model)(x), model(x))
    assert model.feature_info == twin.feature_info


def test_weights_are_drawn_as_the_code_draws_them():
    torch.manual_seed(0)
    model = timm.create_model("nin", num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.05)
        elif isinstance(layer, nn.BatchNorm2d):
            assert 0 <= layer.weight.min() < 0.1
            assert 0.9 < layer.weight.max() <= 1
            assert not layer.bias.any()
    bound = 1 / math.sqrt(192)
    for drawn in (model.fc.weight, model.fc.bias):
        assert 0.9 * bound < drawn.abs().max() <= bound


def test_images_that_are_too_small_are_refused():
    model = timm.create_model("nin_thin").eval()
    assert model(torch.rand(1, 3, 4, 5)).shape == (1, 10)
    with pytest.raises(ValueError, match="at least 4 pixels a side, but got 3 x 32; use larger ones"):
        model(torch.rand(1, 3, 3, 32))
    assert model.pretrained_cfg["min_input_size"] == (3, 4, 4)
    with pytest.raises(ValueError, match="width multiplier above 0"):
        timm.create_model("nin", width=-1)
