"""Filters are drawn as they were and as they are, in their true sizes, and nothing that is trained is touched."""

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import nn

from baton.callbacks import NJetFilters
from baton.callbacks.njet_filters import Filters, draw, first_filters, in_a_row
from baton.layers import NJetConv2d
from baton.layers.njet import njet_layers
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, same, state

NJET = {"backbone": "njet_nin", "backbone_kwargs": {"width": 0.05, "sigma": [1.0, 2.0, 1.5]}}


def train(callbacks, epochs=2, backbone=NJET, **kwargs):
    torch.manual_seed(0)
    task = Classification(**backbone)
    return task, fit(task, Arrays(12, batch_size=4), epochs, callbacks=callbacks, **kwargs)


def equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].values, second[name].values) for name in first)
    assert [filters.sigma for filters in first.values()] == [filters.sigma for filters in second.values()]


def test_the_first_filters_of_every_layer():
    network = nn.Sequential(NJetConv2d(3, 8, sigma=2.0), NJetConv2d(8, 8), nn.Conv2d(8, 4, 3))
    found = first_filters(network, 5, 9)
    assert {name: (filters.values.shape, filters.sigma) for name, filters in found.items()} == {
        "0": ((5, 3, 9, 9), pytest.approx(2.0)), "1": ((5, 1, 5, 5), pytest.approx(1.0)),
    }  # fmt: skip
    torch.testing.assert_close(found["1"].values, network[1].filters()[:5, :1].detach())
    with torch.no_grad():
        network[1].weight.zero_()
    assert found["1"].values.any(), "they change with the layer"


def test_plain_networks_show_their_spatial_convolutions_and_deep_ones_some_layers():
    network = nn.Sequential(*(nn.Conv2d(2, 2, (1, 3) if i % 2 else 1) for i in range(22)))
    found = first_filters(network, 1, 4)
    assert list(found) == ["1", "7", "15", "21"]
    assert {(filters.values.shape, filters.sigma) for filters in found.values()} == {((1, 1, 1, 3), None)}


def test_filters_stand_in_the_middle_of_squares_in_their_own_colours():
    filters = torch.tensor([[[[0.0, 2.0, -2.0]]], [[[0.5, 0.0, -0.25]]]])
    row = in_a_row(filters, 5)
    assert row.shape == (5, 10, 4)
    shown = row[..., 3].nonzero().tolist()
    assert shown == [[2, 1], [2, 2], [2, 3], [2, 6], [2, 7], [2, 8]]
    zero, plus, minus = row[2, 1, :3], row[2, 2, :3], row[2, 3, :3]
    assert zero.min() > 0.95
    assert plus[0] > 2 * plus[2]  # red
    assert minus[2] > 2 * minus[0]  # blue
    assert torch.equal(row[2, 6], row[2, 2])  # each filter has its own scale
    colours = in_a_row(torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1), 1)
    assert colours.view(4).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert not in_a_row(torch.zeros(1, 3, 1, 1), 1)[..., :3].sub(0.5).any()


def test_sizes_are_true():
    before = {"a": Filters(torch.ones(2, 1, 3, 3), 0.5), "b": Filters(torch.ones(2, 3, 5, 5), 1.0)}
    after = {"a": Filters(torch.ones(2, 1, 7, 7), 1.5), "b": Filters(torch.ones(2, 3, 5, 5), None)}
    figure = draw(before, after)
    figure.canvas.draw()
    scales = {
        round(axis.get_window_extent().width / abs(axis.get_xlim()[1] - axis.get_xlim()[0]), 3) for axis in figure.axes
    }
    assert len(scales) == 1, "a pixel is not as large everywhere"
    assert [int(axis.images[0].get_array()[..., 3].sum()) for axis in figure.axes] == [18, 98, 50, 50]
    assert [axis.get_title() for axis in figure.axes] == [
        "a before: σ = 0.50, 3 × 3", "a after: σ = 1.50, 7 × 7", "b before: σ = 1.00, 5 × 5", "b after: 5 × 5"
    ]  # fmt: skip


def test_they_are_drawn_before_and_after_without_a_trace(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("baton.callbacks.njet_filters.draw", lambda *both: shown.append(both) or draw(*both))
    task, _ = train([NJetFilters(4, folder=str(tmp_path))])
    assert same(state(task), state(train([])[0]))
    torch.manual_seed(0)
    ((before, after),) = shown
    equal(before, first_filters(Classification(**NJET).backbone, 4, 8))
    equal(after, first_filters(task.backbone, 4, 8))
    assert list(after) == [name for name, _ in njet_layers(task.backbone)]
    assert min(Image.open(tmp_path / "njet_filters.png").size) > 300


def test_a_resumed_run_remembers_the_start(tmp_path):
    first, second = NJetFilters(), NJetFilters()

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    train([first, Save()], 1)
    train([second], 2, ckpt_path=tmp_path / "last.ckpt")
    equal(first.before, second.before)


def test_nothing_to_draw_and_mistakes(tmp_path):
    vit = {"backbone": "test_vit", "backbone_kwargs": {"img_size": 16, "patch_size": 1}}
    with pytest.warns(UserWarning, match="no spatial convolutions, so that NJetFilters draws nothing"):
        train([NJetFilters(folder=str(tmp_path / "none"))], 1, vit)
    assert not (tmp_path / "none").exists()
    train([NJetFilters(folder=str(tmp_path / "plain"))], 1, WRN)
    assert (tmp_path / "plain/njet_filters.png").exists()
    with pytest.raises(ValueError, match="Expected count and most_layers of 1 or more, but got 0 and 8"):
        NJetFilters(0)
