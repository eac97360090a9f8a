"""The arithmetic of sides: what convolutions and poolings leave of an image, compared with what they really do."""

import pytest
import torch
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork, _sides


class Example(PlainNetwork):
    def __init__(self, stages, norm=False, width=1.0):
        super().__init__()
        self._finish(self._add_stages(stages, 2, width, norm, dtype=torch.float64), 3, "avg")


LAYERS = [
    nn.Conv2d(1, 1, 3, padding=1),
    nn.Conv2d(1, 1, 11, stride=4),
    nn.Conv2d(1, 1, 4, stride=2, padding=1),
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2),
    nn.MaxPool2d(3, 2, padding=1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(2, 2, padding=1, ceil_mode=True),
    nn.MaxPool2d(2, 3, ceil_mode=True),
    nn.AvgPool2d(3, 2, ceil_mode=True),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_sides_are_those_of_the_layer(layer):
    """Of every image from one pixel on: nothing is left exactly where the layer fails."""
    for side in range(1, 40):
        expected = _sides([layer], side)[-1]
        if expected > 0:
            assert layer(torch.rand(1, 1, side, side)).shape[2] == expected
        else:
            with pytest.raises(RuntimeError):
                layer(torch.rand(1, 1, side, side))


def test_description_of_the_stages():
    stages = {
        "first": [Conv(8, 5, padding=0), nn.MaxPool2d(3, 2, ceil_mode=True)],
        "second": [nn.Dropout(0.1), Conv(12, stride=2), Conv(4, 1)],
    }
    model = Example(stages, width=0.5)
    assert model.feature_info == [
        {"num_chs": 4, "reduction": 2, "border": 2, "module": "first"},
        {"num_chs": 4, "reduction": 4, "border": 1, "module": "second"},
    ]
    assert [type(m) for m in model.first] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d]
    assert [type(m) for m in model.second] == [nn.Dropout, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    assert model.min_side == 6
    assert model(torch.rand(2, 2, 6, 7, dtype=torch.float64)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 6 pixels a side, but got 5 x 7; use larger ones"):
        model(torch.rand(2, 2, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize("norm", [False, True])
def test_a_relu_may_be_left_out(norm):
    model = Example({"only": [Conv(6), Conv(6, relu=False), nn.MaxPool2d(2)]}, norm=norm)
    norms = [nn.BatchNorm2d] if norm else []
    expected = [nn.Conv2d, *norms, nn.ReLU, nn.Conv2d, *norms, nn.MaxPool2d]
    assert [type(m) for m in model.only] == expected


@pytest.mark.parametrize("norm", [False, True])
def test_biases_only_without_norm(norm):
    model = Example({"only": [Conv(6)]}, norm=norm)
    assert (model.only[0].bias is None) == norm
    assert isinstance(model.only[1], nn.BatchNorm2d if norm else nn.ReLU)
    assert model.fc.weight.dtype == torch.float64
