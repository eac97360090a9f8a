"""The effective receptive field where it is known, what is recorded of it, and that measuring it changes nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from baton.callbacks import ReceptiveField
from baton.callbacks.receptive_field import draw, effective_receptive_field, side_of
from baton.layers import NJetConv2d
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, same, state

NJET = {"backbone": "njet_nin", "backbone_kwargs": {"width": 0.05}}


def train(callbacks, epochs=2, backbone=NJET, val=6, **kwargs):
    torch.manual_seed(0)
    task = Classification(**backbone)
    return task, fit(task, Arrays(12, val, batch_size=4), epochs, callbacks=callbacks, **kwargs)


def centre(layer):
    return lambda images: layer(images)[:, :, 4, 4].mean(1)


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_of_one_convolution_it_is_its_filters(sigma):
    torch.manual_seed(0)
    layer = NJetConv2d(3, 5, sigma=sigma, dtype=torch.float64)
    field = effective_receptive_field(centre(layer), torch.rand(4, 3, 9, 9, dtype=torch.float64))
    expected = layer.filters().mean(0).abs().mean(0).detach()  # of the mean over output channels, for each of the input
    reach = 4 - layer.kernel_size // 2
    torch.testing.assert_close(field, F.pad(expected, [reach] * 4))


def test_of_two_convolutions_it_is_what_finite_differences_say():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, (1, 3), padding=(0, 1))).double()
    images = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    field = effective_receptive_field(centre(network), images)
    expected, small = torch.zeros(9, 9, dtype=torch.float64), 1e-6
    with torch.no_grad():
        for row in range(9):
            for column in range(9):
                for channel in range(2):
                    moved = images.clone()
                    moved[:, channel, row, column] += small
                    step = (centre(network)(moved) - centre(network)(images)) / small
                    expected[row, column] += step.abs().mean() / 2
    torch.testing.assert_close(field, expected, rtol=1e-4, atol=1e-7)
    assert side_of(field, 0.0) == pytest.approx(15**0.5)  # 3 x 5 pixels
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_the_side_counts_pixels_above_a_fraction():
    field = torch.tensor([[0.0, 0.04, 0.0455], [0.0456, 1.0, 0.5], [0.0, 0.0, 0.2]])
    assert side_of(field) == 2.0
    assert side_of(field, 0.3) == pytest.approx(2**0.5)
    assert side_of(torch.zeros(3, 3)) == 0.0


def test_a_gaussian_has_the_side_of_its_sigma():
    x = torch.arange(-30, 31.0)
    field = torch.exp(-(x[:, None] ** 2 + x**2) / (2 * 4.0**2))
    # above 4.55 % is a disc of radius σ sqrt(2 ln(1 / 0.0455))
    assert side_of(field) == pytest.approx(4.0 * (2 * np.log(1 / 0.0455) * np.pi) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("of", "val"), [("map", 6), ("scores", 6), ("map", 0)])
def test_it_is_measured_after_the_last_epoch_without_a_trace(of, val, tmp_path):
    kept = []

    class Field(ReceptiveField):
        def _measure(self, task):
            kept.append(torch.cat(self._kept).clone())
            return super()._measure(task)

    task, logged = train([Field(5, of, folder=str(tmp_path))], val=val)
    assert same(state(task), state(train([], val=val)[0]))
    (images,) = kept
    assert len(images) == 5
    task.eval()

    def score(x):
        cell = task.feature_map(x)
        cell = cell[:, :, cell.shape[2] // 2, cell.shape[3] // 2]
        return cell.mean(1) if of == "map" else task.backbone.fc(cell).max(1).values

    field = effective_receptive_field(score, images)
    np.testing.assert_allclose(np.load(tmp_path / "receptive_field.npy"), field, rtol=1e-4, atol=1e-9)
    assert logged.column("receptive_field/side") == [pytest.approx(side_of(field))]
    assert 0 < side_of(field) <= 16
    assert min(Image.open(tmp_path / "receptive_field.png").size) > 300


def test_a_run_that_ends_by_steps_is_measured_too():
    assert len(train([ReceptiveField()], 5, max_steps=4, val=0)[1].column("receptive_field/side")) == 1


def test_the_picture():
    (axis,) = draw(torch.ones(8, 12), 4.0).axes
    (square,) = axis.patches
    assert (square.get_xy(), square.get_width(), square.get_height()) == ((3.5, 1.5), 4.0, 4.0)
    assert axis.get_title() == "effective receptive field: 4.0 pixels a side"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "logits"}, "Expected of 'map' or 'scores', but got 'logits'"),
        ({"images": 0}, "Expected 1 image or more and a fraction in .*, but got 0 and 0.0455"),
        ({"fraction": 1.0}, "but got 16 and 1.0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        ReceptiveField(**options)


def test_scores_need_a_classifier():
    task = Classification(num_classes=3, **WRN)
    task.backbone.reset_classifier(0)
    callback = ReceptiveField(of="scores")
    callback._kept = [torch.rand(2, 3, 16, 16)]
    with pytest.raises(
        ValueError, match="of='scores' needs a backbone with a linear classifier, but 'wide_resnet' has"
    ):
        callback._measure(task)
