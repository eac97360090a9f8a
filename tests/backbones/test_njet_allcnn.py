"""All-CNN-C with N-Jet layers: counts, sides by scale, and a naive construction."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.layers import SubsampledNJet
from baton.layers.njet import njet_layers
from jet_by_hand import convolved, normed, shrunk

#: Channels of the N-Jet layers; a 1×1 convolution to 192 follows.
WIDTHS = (96, 96, 96, 192, 192, 192, 192)


@pytest.mark.parametrize(("order", "published", "ours"), [(2, 927_771, 927_761), (3, 1_518_747, 1_518_737)])
def test_parameter_counts(order, published, ours):
    """With a bias on the class scores; the published count has BatchNorm there."""
    channels, by_hand = 3, 0
    for width in WIDTHS:
        by_hand += (order + 1) * (order + 2) // 2 * channels * width + 1 + 2 * width
        channels = width
    by_hand += 192 * 192 + 2 * 192 + 192 * 10
    assert by_hand + 2 * 10 == published
    with torch.device("meta"):
        model = timm.create_model("njet_allcnn", order=order)
    assert sum(p.numel() for p in model.parameters()) == by_hand + 10 == ours
    if order == 3:  # the paper's
        with torch.device("meta"):
            assert sum(p.numel() for p in timm.create_model("njet_allcnn").parameters()) == ours


@pytest.mark.parametrize(
    ("options", "layers", "expected"),
    [
        ({}, [27, 23, 19, 16, 13, 11, 9], [23, 13, 9]),
        ({"sigma": 2.0}, [23, 16, 11, 8, 6, 4, 4], [16, 6, 4]),  # 4 is the shortest side
        ({"r": 6.0}, [29, 26, 23, 20, 18, 16, 14], [26, 18, 14]),
        ({"subsample": "stride"}, [32, 32, 16, 16, 16, 8, 8], [32, 16, 8]),
        ({"subsample": "none"}, [32] * 7, [32, 32, 32]),
    ],
)
def test_every_layer_subsamples_as_its_scale_allows(options, layers, expected):
    model = timm.create_model("njet_allcnn", width=0.05, **options).eval()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SubsampledNJet) or name in [n for n, _ in njet_layers(model) if not n.endswith("conv")]:
            module.register_forward_hook(lambda m, i, y: found.append(y.shape[2]))
    maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert found == layers
    assert [m.shape[2] for m in maps] == expected


@pytest.mark.parametrize("subsample", ["safe", "stride", "none"])
def test_it_equals_the_naive_network(subsample):
    torch.manual_seed(0)
    rates = {"input_drop_rate": 0.0, "drop_rate": 0.0}
    model = timm.create_model("njet_allcnn", subsample=subsample, order=2, width=0.03, num_classes=5, **rates).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    x = torch.rand(3, 3, 15, 18, dtype=torch.float64)
    scores = model(x)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    left, y = iter(copies), x
    for number in range(7):
        alpha, log2_sigma = next(left), next(left)
        y = convolved(y, alpha, log2_sigma, 2, stride=2 if subsample == "stride" and number in (2, 5) else 1)
        if subsample == "safe":
            y = shrunk(y, *(max(round(side * 0.5 ** (2 ** log2_sigma.item() / 4)), 4) for side in y.shape[2:]))
        y = normed(y, next(left), next(left)).clamp(min=0)
    y = normed(F.conv2d(y, next(left)), next(left), next(left)).clamp(min=0)
    expected = F.linear(y.mean((2, 3)), next(left), next(left))
    assert next(left, None) is None
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    scores.square().sum().backward()
    expected.square().sum().backward()
    for parameter, copied in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-6, atol=1e-8)


def test_dropout_stands_where_the_original_has_it():
    model = timm.create_model("njet_allcnn", width=0.05)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"stage1.0": 0.2, "stage2.3": 0.5, "stage3.3": 0.5, "head_drop": 0.0}
    with pytest.raises(ValueError, match=r"input_drop_rate in \[0, 1\), but got 1.5"):
        timm.create_model("njet_allcnn", input_drop_rate=1.5)
    with pytest.raises(ValueError, match="Expected subsample 'safe', 'stride', 'none', but got 'pool'"):
        timm.create_model("njet_allcnn", subsample="pool")


def test_weights_at_the_start():
    torch.manual_seed(0)
    model = timm.create_model("njet_allcnn", num_classes=100)
    for _, layer in njet_layers(model)[1:]:
        assert layer.weight.std().item() == pytest.approx(1, rel=0.05)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.05)
