"""AlexNet's convolutions with BatchNorm: parameters by hand, Caffe's sides, and values of a naive construction."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401

#: Kernel, channels, stride, padding, and whether a pooling follows.
LAYOUT = [
    (11, 96, 4, 0, True),
    (5, 256, 1, 2, True),
    (3, 384, 1, 1, False),
    (3, 384, 1, 1, False),
    (3, 256, 1, 1, True),
]


def test_parameters_are_those_of_the_layout():
    convolutions = 121 * 3 * 96 + 25 * 96 * 256 + 9 * 256 * 384 + 9 * 384 * 384 + 9 * 384 * 256
    norms = 2 * (96 + 256 + 384 + 384 + 256)
    with torch.device("meta"):
        model = timm.create_model("alexnet_bn")
        whole = timm.create_model("alexnet_bn", global_pool="map6")
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms + 256 * 1000 + 1000 == 4_005_576
    assert whole.fc.weight.shape == (1000, 9216)  # what fc6 sees
    assert all(m.bias is None and m.groups == 1 for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("pixels", "sides"),
    [(227, [27, 13, 13, 13, 6]), (224, [27, 13, 13, 13, 6]), (64, [7, 3, 3, 3, 1]), (39, [4, 2, 2, 2, 1])],
)
def test_maps(pixels, sides):
    with torch.device("meta"):
        model = timm.create_model("alexnet_bn").eval()
        maps = model.forward_intermediates(torch.empty(1, 3, pixels, pixels), intermediates_only=True)
    assert [m.shape[2] for m in maps] == sides
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info] == [96, 256, 384, 384, 256]
    assert [info["reduction"] for info in model.feature_info] == [8, 16, 16, 16, 32]
    pools = [name for name, m in model.named_modules() if isinstance(m, nn.MaxPool2d)]
    assert pools == ["conv1.3", "conv2.3", "conv5.3"]


def maximum(x):
    """Of windows of 3 with stride 2 that may hang over the edge."""
    height, width = (2 * math.ceil((side - 3) / 2) + 3 for side in x.shape[2:])
    padded = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=-math.inf)
    return padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


@pytest.mark.parametrize("size", [(64, 64), (63, 85), (71, 90)])
def test_it_equals_the_naive_network(size):
    """In float64 and training, where BatchNorm takes the batch's own statistics."""
    torch.manual_seed(0)
    model = timm.create_model("alexnet_bn", width=1 / 16, num_classes=5).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(4, 3, *size, dtype=torch.float64)
    ours = model(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, naive = iter(copies), x
    for _, _, stride, padding, pooled in LAYOUT:
        naive = F.conv2d(naive, next(left), None, stride, padding)
        naive = naive - naive.mean((0, 2, 3), keepdim=True)
        naive = naive / (naive.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        naive = (naive * next(left).view(-1, 1, 1) + next(left).view(-1, 1, 1)).clamp(min=0)
        naive = maximum(naive) if pooled else naive
    naive = F.linear(naive.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    torch.testing.assert_close(ours, naive)
    ours.square().sum().backward()
    naive.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad)


def test_weights_are_drawn_over_the_fan_out():
    torch.manual_seed(0)
    model = timm.create_model("alexnet_bn", width=0.25, num_classes=100)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight[:, 0].numel()
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_images_that_are_too_small_are_refused():
    model = timm.create_model("alexnet_bn", width=0.1, num_classes=2).eval()
    assert model(torch.rand(1, 3, 39, 40)).shape == (1, 2)
    with pytest.raises(ValueError, match="at least 39 pixels a side, but got 38 x 64; use larger ones"):
        model(torch.rand(1, 3, 38, 64))
    assert model.pretrained_cfg["min_input_size"] == (3, 39, 39)
