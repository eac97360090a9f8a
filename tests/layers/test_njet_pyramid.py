"""Pyramids of N-Jets: as many convolutions as scales, added, in either evaluation; one filter that says the same."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.layers import NJetConv2d, NJetPyramid2d, fold

SIGMAS = [0.7, 1.5, 3.1]


def build(sigmas=SIGMAS, inside=4, outside=6, **kwargs):
    torch.manual_seed(0)
    layer = NJetPyramid2d(inside, outside, sigmas, **kwargs).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.log2_sigma += torch.tensor([0.11, -0.07, 0.05])[: len(sigmas)]
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def separate(layer):
    """One N-Jet convolution for each scale."""
    row = nn.ModuleList()
    for number, sigma in enumerate(layer.sigma):
        conv = NJetConv2d(
            layer.in_channels, layer.out_channels, layer.order, 1.0, layer.extent, layer.stride, layer.groups,
            number == 0 and layer.bias is not None, layer.size_rule, "filters", layer.padding,
        ).double()  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(layer.weight)
            conv.log2_sigma.fill_(sigma.log2())
            if conv.bias is not None:
                conv.bias.copy_(layer.bias)
        conv.refresh()
        row.append(conv)
    return row


OPTIONS = [
    {}, {"order": 0}, {"order": 4, "extent": 1.5}, {"stride": 2}, {"groups": 2, "bias": False}, {"size_rule": "code"},
    {"padding": "valid"}, {"padding": "valid", "stride": 2}, {"sigmas": [2.2]}, {"sigmas": [3.1, 3.1, 0.4], "order": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_as_separate_convolutions_of_every_scale(evaluation, options):
    layer = build(evaluation=evaluation, **options)
    convolutions = separate(layer)
    x = torch.randn(2, 4, 25, 19, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    if options.get("padding") == "valid":  # smaller filters leave more of the map: its border falls away
        reach = (layer.kernel_size - 1) // 2
        expected = sum(
            conv(x[:, :, reach - r : 25 - reach + r, reach - r : 19 - reach + r])
            for conv in convolutions
            for r in [(conv.kernel_size - 1) // 2]
        )
    else:
        expected = sum(conv(x) for conv in convolutions)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(y)
    inputs = [x, layer.weight, layer.log2_sigma, *([] if layer.bias is None else [layer.bias])]
    found = torch.autograd.grad((y * weights).sum(), inputs)
    theirs = [x, *(p for conv in convolutions for p in conv.parameters())]
    of_x, *of_parameters = torch.autograd.grad((expected * weights).sum(), theirs)
    named = dict(zip([n for n, _ in convolutions.named_parameters()], of_parameters, strict=True))
    torch.testing.assert_close(found[0], of_x, rtol=0, atol=1e-9)
    shared = sum(gradient for name, gradient in named.items() if name.endswith(".weight"))
    torch.testing.assert_close(found[1], shared, rtol=0, atol=1e-8)
    own = torch.cat([gradient for name, gradient in named.items() if name.endswith("log2_sigma")])
    torch.testing.assert_close(found[2], own, rtol=0, atol=1e-8)
    if layer.bias is not None:
        torch.testing.assert_close(found[3], named["0.bias"], rtol=0, atol=1e-9)


def test_gradients():
    layer = build(inside=2, outside=2, sigmas=[0.6, 1.3], order=2)
    x = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    names = ["weight", "log2_sigma", "bias"]
    for evaluation in ("filters", "separable"):
        layer.evaluation = evaluation

        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

        assert torch.autograd.gradcheck(run, (x, *(getattr(layer, name) for name in names)))


def test_one_filter_says_the_same():
    layer = build()
    x = torch.randn(1, 4, 20, 23, dtype=torch.float64)
    filters = layer.filters()
    assert filters.shape == (6, 4, layer.kernel_size, layer.kernel_size)
    assert layer.kernel_size == 2 * math.ceil(2 * layer.sigma.max().item()) + 1
    torch.testing.assert_close(F.conv2d(x, filters, layer.bias, padding=layer.kernel_size // 2), layer(x))
    plain = fold(nn.Sequential(layer))[0]
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("scales", [(6.0, 12.0), (0.5, 0.5, 0.5), (1.0,)])
def test_auto_gives_what_both_give(scales):
    layer = build(sigmas=list(scales))
    x = torch.randn(1, 4, 16, 15, dtype=torch.float64)
    values = []
    for evaluation in ("auto", "filters", "separable"):
        layer.evaluation = evaluation
        values.append(layer(x))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_large_scales_are_not_convolved_as_filters():
    layer = NJetPyramid2d(64, 21, [3.0, 6.0, 9.0, 12.0])
    assert layer._is_separable(41, 41, layer.kernel_size)
    assert not NJetPyramid2d(64, 21, [0.4])._is_separable(41, 41, 3)


@pytest.mark.parametrize("size", [(3, 40), (1, 1), (2, 5)])
def test_maps_that_are_smaller_than_the_filters(size):
    layer = build(sigmas=[3.0, 6.0])
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    assert layer(x).shape == (2, 6, *size)
    torch.testing.assert_close(layer(x), sum(conv(x) for conv in separate(layer)))


# --------------------------------------------------------------------------------------------------------------- start


def test_scales_begin_where_they_are_told_and_return_there():
    layer = NJetPyramid2d(3, 2, [3, 6.5, 9])
    assert layer.sigma.tolist() == pytest.approx([3, 6.5, 9])
    assert layer.kernel_size == 37
    with torch.no_grad():
        layer.log2_sigma += 1
        layer.bias += 1
    assert layer.kernel_size == 73
    layer.reset_parameters()
    assert layer.sigma.tolist() == pytest.approx([3, 6.5, 9])
    assert not layer.bias.any()
    assert "sigma=3..9" in str(layer)


def test_maps_do_not_grow_through_layer_and_relu():
    torch.manual_seed(0)
    layer = NJetPyramid2d(200, 300, [1.0, 2.0, 4.0], order=2)
    energies = []
    for x in (torch.randn(1, 200, 48, 48), torch.randn(1, 200, 1, 1).expand(-1, -1, 48, 48)):
        y = layer(x)[:, :, 16:32, 16:32].relu()
        energies.append(y.square().mean().item() / x.square().mean().item())
    assert max(energies) == pytest.approx(1, rel=0.25)
    assert 0 < min(energies) < 1


@pytest.mark.parametrize("learn", [False, True])
def test_scales_are_learned_or_stay(learn):
    layer = NJetPyramid2d(2, 2, [1.0, 2.0], learn_sigma=learn)
    layer(torch.randn(1, 2, 9, 9)).square().sum().backward()
    assert (layer.log2_sigma.grad is not None) == learn
    assert layer.weight.grad.any()


def test_saved_and_loaded():
    layer, other = build(), NJetPyramid2d(4, 6, [1.0, 1.0, 1.0]).double()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 4, 21, 8, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert other.kernel_size == layer.kernel_size


def test_half_precision_and_the_meta_device():
    layer = NJetPyramid2d(4, 6, SIGMAS)
    x = torch.randn(2, 4, 12, 15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for evaluation in ("filters", "separable"):
            layer.evaluation = evaluation
            half = layer(x)
            assert half.dtype == torch.bfloat16
            assert (half.float() - layer.float()(x)).norm() < 0.05 * half.float().norm()
    with torch.device("meta"):
        meta = NJetPyramid2d(4, 6, SIGMAS)
    assert meta(x.to("meta")).shape == (2, 6, 12, 15)
    assert meta.kernel_size == layer.kernel_size


@pytest.mark.parametrize("sigmas", [[], [1.0, 0.0], [-1.0], [math.inf], [math.nan, 1.0]])
def test_scales_that_cannot_be(sigmas):
    with pytest.raises(ValueError, match="Expected one scale or more in sigmas, all above 0 pixels, but got"):
        NJetPyramid2d(2, 2, sigmas)
