"""The patch tower: seventeen convolutions; receptive field, stride and grid, probed through gradients."""

import pytest
import timm
import torch
from torch import nn

from baton.backbones.autoresolution_patch import split_receptive_field

#: name: receptive field, stride, super patch, cells
VARIANTS = {
    "autoresolution_patch": (35, 2, 127, 47),
    "autoresolution_patch_rf23": (23, 2, 71, 25),
    "autoresolution_patch_rf15": (15, 2, 47, 17),
    "autoresolution_patch_rf9": (9, 1, 24, 16),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_exactly_seventeen_convolutions_without_padding(name):
    model = timm.create_model(name)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 17
    assert all(conv.padding == (0, 0) for conv in convs)
    assert sum(conv.stride != (1, 1) for conv in convs) == VARIANTS[name][1] - 1
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 17
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 17
    assert not any(isinstance(m, nn.BatchNorm2d) for m in timm.create_model(name, norm=False).modules())


def seen_by(model, size, row, column):
    """First and last row and column of the pixels that a cell depends on."""
    x = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    model.forward_features(x)[0, :, row, column].sum().backward()
    rows, columns = x.grad.abs().sum((0, 1)).nonzero().T
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_receptive_field_stride_and_grid_by_probing_gradients(name):
    field, stride, size, cells = VARIANTS[name]
    torch.manual_seed(0)
    # positive weights: no ReLU is off, so that every pixel that can matter does
    model = timm.create_model(name, width=0.1, norm=False, num_classes=0).double().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    assert model.forward_features(torch.rand(1, 3, size, size, dtype=torch.float64)).shape[2:] == (cells, cells)
    assert model.forward_features(torch.rand(1, 3, field, field, dtype=torch.float64)).shape[2:] == (1, 1)
    assert (model.receptive_field, model.stride) == (field, stride)
    for row, column in ((0, 0), (1, 0), (cells - 1, cells // 2)):
        top, bottom, left, right = seen_by(model, size, row, column)
        assert (top, left) == (row * stride, column * stride)
        assert (bottom - top + 1, right - left + 1) == (field, field)


@pytest.mark.parametrize("stride", [1, 2])
def test_every_split_gives_the_receptive_field_it_promises(stride):
    for field in range(3, 36 if stride == 1 else 68, 2):
        a, b = split_receptive_field(field, stride)
        assert a >= 1
        assert a + b <= 17
        size = 1
        for layer in reversed(range(a + b)):  # backwards: r = (r - 1) s + k
            size = (size - 1) * (stride if layer == a - 1 else 1) + 3
        assert size == field


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"receptive_field": 36}, "odd receptive fields from 3 to 67 pixels, not 36; the nearest are 35 and 37"),
    ({"receptive_field": 99}, "from 3 to 67 pixels, not 99; the nearest are 65 and 67"),
    ({"receptive_field": 37, "stride": 1}, "from 3 to 35 pixels, not 37"),
    ({"stride": 3}, "stride of 1 or 2"),
    ({"width": -1}, "width multiplier"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model("autoresolution_patch", **kwargs)


def test_layout_of_the_papers_tower():
    model = timm.create_model("autoresolution_patch")
    convs = [(c.kernel_size[0], c.out_channels, c.stride[0]) for c in model.modules() if isinstance(c, nn.Conv2d)]
    assert convs == [(3, 32, 1)] * 4 + [(3, 64, 2)] + [(3, 96, 1), (1, 96, 1)] * 6
