"""N-Jet layers on a GPU: the same as on the CPU, without waiting for the device; skipped where there is none."""

import copy

import pytest
import torch
import torch.nn.functional as F

from baton.backbones import create_backbone
from baton.layers import NJetConv2d
from baton.layers.host_value import EVERY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def map_of(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, layer.in_channels, 17, 22, dtype=torch.float64, generator=generator)


def learned(layer, x):
    """What leaves the layer and the gradients of a sum of squares of it, on the CPU."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))]


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 2}, {"padding": "valid"}, {"sigma_groups": 3}])
def test_a_gpu_learns_the_same_though_its_scales_moved_unseen(evaluation, options):
    torch.manual_seed(0)
    layer = NJetConv2d(4, 6, 3, 1.3, evaluation=evaluation, dtype=torch.float64, **options)
    on_gpu = copy.deepcopy(layer).cuda()
    on_gpu.refresh()
    for step in (0.0, 0.1, -0.3):  # of log2 σ, up to within the room around filters
        with torch.no_grad():
            layer.log2_sigma += step
            on_gpu.log2_sigma += step
        x = map_of(layer)
        for found, expected in zip(learned(on_gpu, x.cuda()), learned(layer, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_looks_at_a_scale_arrive_within_two_intervals():
    layer = NJetConv2d(3, 4, 2, 1.0).cuda()
    with torch.no_grad():
        layer.log2_sigma.fill_(1.0)
    for _ in range(2 * EVERY + 1):
        layer(torch.randn(1, 3, 9, 9, device="cuda"))
    assert layer.host_sigma == 2.0


def test_no_training_step_waits_for_the_device():
    net = create_backbone("njet_nin", subsample="safe", order=2).cuda().train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
    images, labels = torch.randn(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda")

    def step():
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3 * EVERY):
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("evaluation", ["filters", "separable"])
def test_bfloat16_learns_nearly_the_same(evaluation):
    torch.manual_seed(0)
    layer = NJetConv2d(8, 8, 3, 1.3, evaluation=evaluation).cuda()
    x = map_of(layer).float().cuda()
    expected = learned(layer, x)
    with torch.autocast("cuda", torch.bfloat16):
        found = learned(layer, x)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 0.1 * b.double().norm()
