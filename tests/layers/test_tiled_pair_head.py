"""The tiled head equals concatenating the tiled image embedding, cell by cell."""

import pytest
import torch
from torch import nn

from baton.layers.tiled_pair_head import TiledPairHead


def naive(head, patches, images, shift):
    """One pair and one cell at a time, as the paper says it: concatenate, then five layers."""
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
    batch, _, height, width = patches.shape
    out = torch.empty(batch, layers[-1].out_channels, height, width, dtype=patches.dtype)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                x = torch.cat([patches[(b + shift) % batch, :, i, j], images[b]])
                for index, layer in enumerate(layers):
                    x = layer.weight[:, :, 0, 0] @ x + layer.bias
                    x = x if index == len(layers) - 1 else x.clamp_min(0)
                out[b, :, i, j] = x
    return out


@pytest.mark.parametrize("shifts", [(0,), (0, 1), (2, 0)])
def test_equals_concatenation_in_every_cell_with_gradients(shifts):
    torch.manual_seed(0)
    head = TiledPairHead(4, 3, 2, width=6, norm=False).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    patches = torch.randn(3, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    found = head(patches, images, shifts)
    expected = torch.cat([naive(head, patches, images, shift) for shift in shifts])
    assert torch.allclose(found, expected, atol=1e-10)
    weights = torch.randn_like(found)
    inputs = [patches, images, *head.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_five_convolutions_and_relu_after_all_but_the_last():
    head = TiledPairHead(4, 3, 2)
    assert sum(isinstance(module, nn.Conv2d) for module in head.modules()) == 5
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == 4
    torch.manual_seed(0)
    output = head(torch.randn(4, 4, 5, 5), torch.randn(4, 3))
    assert (output < 0).any()
    assert (output > 0).any()


def test_gradcheck_with_batch_norm():
    torch.manual_seed(0)
    head = TiledPairHead(2, 3, 2, width=3, depth=3).double()
    patches = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    images = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, e: head(p, e, (0, 1)), (patches, images))
