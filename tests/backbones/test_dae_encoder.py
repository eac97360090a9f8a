"""The poster's encoder: parameters counted by hand, maps, and outputs and gradients of a naive construction."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401


def test_parameters_are_those_of_the_layout():
    model = timm.create_model("dae_encoder", num_classes=0)
    by_hand = (16 * 3 * 12 + 12) + (16 * 12 * 24 + 24) + (16 * 24 * 48 + 48) + (16 * 48 * 96 + 96)
    assert sum(p.numel() for p in model.parameters()) == by_hand == 97_524
    assert not model.state_dict().keys() - dict(model.named_parameters()).keys()  # no norm, so no buffers


def test_maps_of_96_pixels():
    model = timm.create_model("dae_encoder", num_classes=0)
    maps = model.forward_intermediates(torch.rand(1, 3, 96, 96), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(12, 48, 48), (24, 24, 24), (48, 12, 12), (96, 6, 6)]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]
    assert all(m.min() == 0 for m in maps), "a stage ends with its ReLU"


@pytest.mark.parametrize("size", [(16, 16), (32, 96), (33, 35), (47, 64), (63, 17)])
def test_it_equals_the_naive_network(size):
    """In float64, with every convolution written as a sum over its 16 taps."""
    torch.manual_seed(0)
    model = timm.create_model("dae_encoder", num_classes=0).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    ours = model.forward_features(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    naive = x
    for weight, bias in zip(copies[::2], copies[1::2], strict=True):
        height, width = naive.shape[2] // 2, naive.shape[3] // 2
        padded, total = F.pad(naive, (1, 1, 1, 1)), bias.view(-1, 1, 1)
        for row in range(4):
            for column in range(4):
                taps = padded[:, :, row : row + 2 * height - 1 : 2, column : column + 2 * width - 1 : 2]
                total = total + torch.einsum("oi,bihw->bohw", weight[:, :, row, column], taps)
        naive = total * (total > 0)
    assert ours.shape == (2, 96, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(ours, naive)
    ours.square().sum().backward()
    naive.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        assert copied.grad.any()
        torch.testing.assert_close(parameter.grad, copied.grad)


def test_weights_are_drawn_as_pytorch_draws_them():
    """Its layers draw uniformly, up to one over the square root of the fan-in; so does `init_weights`."""
    torch.manual_seed(0)
    model = timm.create_model("dae_encoder", num_classes=10)
    for _ in range(2):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                assert layer.weight.abs().max() <= bound
                assert layer.bias.abs().max() <= bound
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        before = model.conv4[0].weight.detach().clone()
        model.init_weights()
        assert not torch.equal(before, model.conv4[0].weight)


def test_a_classifier_sees_the_whole_map():
    """The poster's fine-tuning: one linear layer on 96 x 6 x 6 features."""
    model = timm.create_model("dae_encoder", num_classes=7, global_pool="map6").eval()
    assert model.fc.weight.shape == (7, 96 * 36)
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model(x), model.fc(model.forward_features(x).flatten(1)))


def test_width_multiplies_all_widths():
    model = timm.create_model("dae_encoder", width=0.5, in_chans=1, num_classes=0)
    assert [info["num_chs"] for info in model.feature_info] == [6, 12, 24, 48]
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 48)
    with pytest.raises(ValueError, match="width multiplier above 0"):
        timm.create_model("dae_encoder", width=0.0)


def test_images_that_are_too_small_are_refused():
    model = timm.create_model("dae_encoder", num_classes=2)
    with pytest.raises(ValueError, match="at least 16 pixels a side, but got 16 x 15; use larger ones"):
        model(torch.rand(1, 3, 16, 15))
