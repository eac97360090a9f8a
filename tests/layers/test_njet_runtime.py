"""Networks of N-Jet layers in use: low precision, memory formats, compilation, copies and files, other processes."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from baton.layers import NJetConv2d, SafeSubsample, SubsampledNJet


def network(evaluation="auto", subsample=True, **options):
    """Wide and narrow layers, with strides, groups and scales of their own, BatchNorm between."""
    torch.manual_seed(0)
    first = NJetConv2d(3, 20, 2, 1.2, evaluation=evaluation, **options)
    return nn.Sequential(
        SubsampledNJet(first, SafeSubsample()) if subsample else first, nn.BatchNorm2d(20), nn.ReLU(),
        NJetConv2d(20, 24, 3, 1.7, stride=2, evaluation=evaluation, **options), nn.BatchNorm2d(24), nn.ReLU(),
        NJetConv2d(24, 8, 1, 0.6, groups=2, evaluation=evaluation, **options),
    )  # fmt: skip


def images(dtype=torch.float32):
    return torch.randn(2, 3, 18, 23, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gradients(net, x, run=None):
    y = (run or net)(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return y, torch.autograd.grad((y * weight).sum(), list(net.parameters()))


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm().clamp_min(1e-3)


def move(net, step):
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, NJetConv2d):
                layer.log2_sigma += step


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_mixed_precision_learns_the_same(evaluation):
    net = network(evaluation)
    exact, expected = gradients(net, images())
    with torch.autocast("cpu", torch.bfloat16):
        found, mixed = gradients(net, images())
    assert found.dtype == torch.bfloat16
    assert_close(found, exact, 0.05)
    for parameter, a, b in zip(net.parameters(), mixed, expected, strict=True):
        assert a.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(a).all()
        if parameter.ndim > 1:
            assert_close(a, b, 0.2)


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_channels_last_is_the_same(evaluation):
    net = network(evaluation).double()
    exact, expected = gradients(net, images(torch.float64))
    net = net.to(memory_format=torch.channels_last)
    found, others = gradients(net, images(torch.float64).to(memory_format=torch.channels_last))
    for a, b in zip([found, *others], [exact, *expected], strict=True):
        assert_close(a, b, 1e-9)


#: In a process of its own, where nobody checks shapes while code is traced.
COMPILED = """
import sys
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from baton.layers import NJetConv2d, SafeSubsample, SubsampledNJet

def move(net, step):
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, NJetConv2d):
                layer.log2_sigma += step

def network(evaluation):
    torch.manual_seed(0)
    first = NJetConv2d(3, 20, 2, 1.2, evaluation=evaluation)
    return nn.Sequential(first, nn.ReLU(), NJetConv2d(20, 6, 1, 1.7, stride=2, evaluation=evaluation)).double()

evaluation, x = sys.argv[1], torch.randn(2, 3, 14, 17, dtype=torch.float64)

# values and gradients
net = network(evaluation)
run = torch.compile(net, backend="aot_eager", fullgraph=True)
expected, found = net(x), run(x)
torch.testing.assert_close(found, expected)
direction = torch.randn_like(expected)
both = [torch.autograd.grad((y * direction).sum(), list(net.parameters())) for y in (expected, found)]
torch.testing.assert_close(*both)

# graphs are made anew only when filters outgrow them
torch.compiler.reset()
net, counter = network(evaluation).eval(), CompileCounter()
run = torch.compile(net, backend=counter, fullgraph=True)
def sides():
    return [net[0].kernel_size, net[2].kernel_size]
assert sides() == [7, 9]
for step in (0.0, 0.01, 0.02, -0.04):
    move(net, step)
    torch.testing.assert_close(run(x), net(x))
    net.train().eval()  # as after an epoch: all scales are looked at
    torch.testing.assert_close(run(x), net(x))
assert sides() == [7, 9]
assert counter.frame_count == 1
move(net, 0.25)  # there is room in the graph, even without a look
torch.testing.assert_close(run(x), net(x))
assert counter.frame_count == 1
move(net, 1.0)
net.train().eval()
torch.testing.assert_close(run(x), net(x))
assert counter.frame_count == 2

# safe subsampling follows the scale
torch.compiler.reset()
net = nn.Sequential(SubsampledNJet(NJetConv2d(3, 4, 2, evaluation=evaluation), SafeSubsample()), nn.ReLU()).double()
run, shapes = torch.compile(net, backend="eager", fullgraph=True), set()
for step in (0.0, 0.8, 0.8):
    move(net, step)
    net.eval()
    shapes.add(run(x).shape)
    torch.testing.assert_close(run(x), net(x))
assert len(shapes) == 3
"""


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", ["filters", "separable", "auto"])
def test_networks_compile_to_one_graph(evaluation):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", COMPILED, evaluation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_file])
def test_copies_compute_the_same_and_live_on_their_own(way):
    net, x = network().eval(), images()
    move(net, 0.4)
    expected, other = net(x), way(net)
    assert torch.equal(other(x), expected)
    move(other, 1.0)
    other(x)
    assert torch.equal(net(x), expected)
    assert [layer.kernel_size for layer in (net[3], other[3])] == [11, 19]


def test_what_processes_share_does_not_depend_on_scales():
    """DDP's buckets and broadcasts, averages of weights, and files know parameters and buffers alone."""
    net = network()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert set(net[3].state_dict()) == {"weight", "log2_sigma", "bias"}
    assert not list(net[3].buffers())
    move(net, 1.5)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == shapes
    assert all(gradient is not None for gradient in gradients(net, images())[1])
    other = network()
    averaged = torch.optim.swa_utils.AveragedModel(other)
    averaged.update_parameters(net)
    assert torch.equal(averaged.module[3].log2_sigma, net[3].log2_sigma)
    other.load_state_dict(torch.nn.parallel.DataParallel(net).module.state_dict())
    assert other[3].kernel_size == net[3].kernel_size
    assert_close(other.eval()(images()), net.eval()(images()), 0.0)
