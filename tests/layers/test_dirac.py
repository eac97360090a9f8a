"""The Dirac parameterisation against a naive one with a dense delta: values, gradients, what is drawn and refused."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.layers import DiracConv2d
from baton.layers.dirac import scale_names

SHAPES = [(4, 4, 3), (3, 6, 3), (6, 3, 5), (5, 5, 1), (2, 3, (1, 3)), (3, 3, (5, 3))]
FORMS = [(True, True), (False, True), (False, False), (True, False)]  # normalize, scaled


def drawn(shape, normalize=True, scaled=True, **kwargs):
    """A layer in float64 whose scales differ from channel to channel."""
    torch.manual_seed(0)
    layer = DiracConv2d(*shape, normalize=normalize, scaled=scaled, dtype=torch.float64, **kwargs)
    for scale in (layer.a, layer.b):
        if scale is not None:
            nn.init.normal_(scale)
    return layer


def naive(weight, a, b):
    """Eq. 5.4 and 5.5 as they stand, one entry of the delta at a time."""
    delta = torch.zeros_like(weight)
    for i in range(min(weight.shape[:2])):
        delta[i, i, weight.shape[2] // 2, weight.shape[3] // 2] = 1
    result = delta if a is None else a.view(-1, 1, 1, 1) * delta
    if b is None:
        return result + weight
    rows = [b[o] * weight[o] / max(weight[o].square().sum().sqrt(), torch.tensor(1e-12)) for o in range(len(weight))]
    return result + torch.stack(rows)


@pytest.mark.parametrize(("normalize", "scaled"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_naive_parameterisation_with_gradients(shape, normalize, scaled):
    layer = drawn(shape, normalize, scaled, padding=1)
    x = torch.randn(2, shape[0], 7, 9, dtype=torch.float64, requires_grad=True)
    copies = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.a, layer.b) if p is not None]
    left = iter(copies)
    weight = naive(next(left), next(left) if scaled else None, next(left) if normalize else None)
    torch.testing.assert_close(layer.effective_weight(), weight, rtol=1e-14, atol=1e-14)
    other_x = x.detach().clone().requires_grad_()
    ours, expected = layer(x), F.conv2d(other_x, weight, padding=1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-12, atol=1e-12)
    for parameter, copied in zip([p for p in (layer.weight, layer.a, layer.b) if p is not None], copies, strict=True):
        torch.testing.assert_close(parameter.grad, copied.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("normalize", "scaled"), FORMS)
@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 2, (1, 3)), (2, 3, (3, 1))])
def test_gradients_and_their_gradients_are_right(shape, normalize, scaled):
    layer = drawn(shape, normalize, scaled)
    names = [name for name, _ in layer.named_parameters()]

    def effective(*values):
        for name, value in zip(names, values, strict=True):
            delattr(layer, name)
            setattr(layer, name, value)
        return layer.effective_weight()

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(effective, values)
    assert torch.autograd.gradgradcheck(effective, values)


@pytest.mark.parametrize("frozen", ["weight", "a", "b"])
def test_frozen_tensors_need_no_gradient(frozen):
    layer, free = drawn((3, 4, 3)), drawn((3, 4, 3))
    getattr(layer, frozen).requires_grad_(False)
    for one in (layer, free):
        one(torch.ones(1, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        expected = None if name == frozen else getattr(free, name).grad
        assert parameter.grad is None if expected is None else torch.equal(parameter.grad, expected)


@pytest.mark.parametrize(("channels", "out"), [(4, 4), (6, 4), (3, 5)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_with_a_of_one_and_b_of_zero_it_is_the_identity(channels, out, kernel):
    layer = DiracConv2d(channels, out, kernel, padding=kernel // 2)
    nn.init.zeros_(layer.b)
    x = torch.randn(2, channels, 6, 7)
    y, both = layer(x), min(channels, out)
    assert torch.equal(y[:, :both], x[:, :both])
    assert not y[:, both:].any(), "outputs beyond the inputs have no identity"
    strided = DiracConv2d(channels, out, kernel, stride=2, padding=kernel // 2)
    nn.init.zeros_(strided.b)
    assert torch.equal(strided(x)[:, :both], x[:, :both, ::2, ::2])


def test_only_the_direction_of_a_normalised_filter_counts():
    layer = drawn((4, 4, 3))
    before = layer.effective_weight()
    with torch.no_grad():
        layer.weight *= torch.tensor([1e-9, 0.3, 7, 1e6]).view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.effective_weight(), before, rtol=1e-12, atol=1e-12)


def test_a_filter_of_zeros_is_no_division_by_zero():
    layer = drawn((3, 3, 3))
    with torch.no_grad():
        layer.weight[1] = 0
    expected = naive(layer.weight.detach(), layer.a.detach(), layer.b.detach())
    assert torch.equal(layer.effective_weight()[1], expected[1])
    layer.effective_weight()[1].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    reference = layer.weight.detach().clone().requires_grad_()
    (layer.b[1].detach() * F.normalize(reference.flatten(1), dim=1)[1]).sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.grad)


def test_what_is_drawn():
    torch.manual_seed(0)
    layer = DiracConv2d(40, 80, 3)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 360), rel=0.02)
    assert torch.equal(layer.a, torch.ones(80))
    assert torch.equal(layer.b, torch.full((80,), 0.1))
    assert layer.bias is None
    assert [*dict(layer.named_parameters())] == ["weight", "a", "b"]
    for std in (1e-8, 1.0):
        layer = DiracConv2d(40, 80, 3, init_std=std)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        before = layer.weight.clone()
        with torch.no_grad():
            layer.a.zero_()
        layer.reset_parameters()
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not torch.equal(layer.weight, before)
        assert layer.a.min() == 1
    assert not DiracConv2d(4, 4, 3, normalize=False, init_std=0).weight.any()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"kernel_size": 2}, "odd kernel_size, which has a centre, but got 2"),
        ({"kernel_size": (3, 4)}, r"but got \(3, 4\)"),
        ({"kernel_size": 3, "init_std": 0}, "init_std above 0, because filters of zeros have no direction, but got 0"),
        ({"kernel_size": 3, "init_std": -1, "normalize": False}, "init_std of 0 or more, but got -1"),
    ],
)
def test_what_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said):
        DiracConv2d(3, 3, **kwargs)


def test_channels_last_stays_channels_last():
    layer = drawn((8, 8, 3), padding=1)
    other = drawn((8, 8, 3), padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    assert other.effective_weight().is_contiguous(memory_format=torch.channels_last)
    ours, theirs = other(x.to(memory_format=torch.channels_last)), layer(x)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs)
    for one, y in ((other, ours), (layer, theirs)):
        y.square().sum().backward()
        assert one.weight.grad.stride() == one.weight.stride()
    torch.testing.assert_close(other.weight.grad, layer.weight.grad)


def test_autocast_composes_in_float32_and_convolves_in_bfloat16():
    torch.manual_seed(0)
    layer = DiracConv2d(16, 16, 3, padding=1)
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight, y = layer.effective_weight(), layer(x)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, layer.effective_weight())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_names_of_scales():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(DiracConv2d(4, 4, 3)), DiracConv2d(4, 4, 3, normalize=False)
    )
    assert scale_names(network) == {"1.0.a", "1.0.b", "2.a"}
    assert scale_names(DiracConv2d(4, 4, 3)) == {"a", "b"}
    assert scale_names(DiracConv2d(4, 4, 3, normalize=False, scaled=False)) == set()
    assert "normalize=True, scaled=False" in repr(DiracConv2d(4, 4, 3, scaled=False))


COMPILED = """
import torch
from baton.layers import DiracConv2d

layer, x = DiracConv2d(4, 6, 3), torch.randn(2, 4, 6, 6)
with torch.no_grad():
    program = torch.export.export(layer, (x,)).run_decompositions()  # as an export to ONNX does
    torch.testing.assert_close(program.module()(x), layer(x))
for kwargs in ({}, {"normalize": False}, {"scaled": False}):
    layer = DiracConv2d(4, 6, 3, padding=1, **kwargs)
    x = torch.randn(2, 4, 6, 6)
    expected, found = layer(x), torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (expected, found)]
    torch.testing.assert_close(gradients[0], gradients[1])
"""


@pytest.mark.parametrize(("normalize", "scaled"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exported_it_is_the_same(shape, normalize, scaled, monkeypatch):
    layer = drawn(shape, normalize, scaled)
    expected = layer.effective_weight()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.slow
def test_compiled_and_exported_it_is_the_same():
    """In a process without the checks of shapes that tests add, which cannot be compiled."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
