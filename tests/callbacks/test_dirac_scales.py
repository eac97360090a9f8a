"""The scales of Dirac layers are recorded, drawn, continued by a resumed run, and never touched."""

import csv
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from baton import cli
from baton.callbacks import DiracScales
from baton.callbacks.dirac_scales import Row, draw
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, same, state

DIRAC = {"backbone": "diracnet", "backbone_kwargs": {"depth": 10, "width": 1}}
LAYERS = [f"group{group}.{layer}.conv" for group in (1, 2, 3) for layer in (0, 1)]


def read(folder):
    with (folder / "dirac_scales.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train(callbacks, epochs=3, backbone=DIRAC, **kwargs):
    torch.manual_seed(0)
    task = Classification(**backbone)
    return task, fit(task, Arrays(12, batch_size=4), epochs, callbacks=callbacks, **kwargs)


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (5, [0, 3])])
def test_every_layer_is_recorded(every, epochs, tmp_path):
    task, logged = train([DiracScales(every, str(tmp_path / "pictures"))])
    rows = read(tmp_path / "pictures")
    assert [(int(row["epoch"]), row["layer"]) for row in rows] == [(e, layer) for e in epochs for layer in LAYERS]
    assert {(row["a_mean"], round(float(row["b_mean"]), 6)) for row in rows[:6]} == {("1.0", 0.1)}
    last = {}
    for row in rows[-6:]:
        layer = task.backbone.get_submodule(row["layer"])
        last[row["layer"]] = layer.a.mean().item(), layer.b.mean().item()
        assert float(row["a_mean"]) == pytest.approx(last[row["layer"]][0], rel=1e-6)
        assert float(row["b_mean"]) == pytest.approx(last[row["layer"]][1], rel=1e-6)
        assert float(row["a_mean"]) != 1
    for position, name in enumerate(("dirac/a_mean", "dirac/b_mean")):
        assert len(logged.column(name)) == len(epochs) - 1
        mean = np.mean([means[position] for means in last.values()])
        assert logged.column(name)[-1] == pytest.approx(mean, rel=1e-6)
    assert Image.open(tmp_path / "pictures/dirac_scales.png").size == (1530, 540)


def test_it_changes_nothing():
    assert same(state(train([DiracScales()])[0]), state(train([])[0]))


def test_a_resumed_run_continues_the_record(tmp_path):
    whole, first, second = DiracScales(), DiracScales(), DiracScales()
    train([whole], 4)
    checkpoint = tmp_path / "last.ckpt"

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(checkpoint)

    train([first, Save()], 2)
    train([second], 4, ckpt_path=checkpoint)
    assert [row[:2] for row in second.rows] == [row[:2] for row in whole.rows]
    assert second.rows[: len(first.rows)] == first.rows


def test_networks_without_b_or_without_scales(tmp_path):
    scaled = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "dirac": "scaled"}}
    _, logged = train([DiracScales(folder=str(tmp_path))], 1, scaled)
    assert {row["b_mean"] for row in read(tmp_path)} == {""}
    assert logged.column("dirac/a_mean") != []
    assert logged.column("dirac/b_mean") == []
    assert Image.open(tmp_path / "dirac_scales.png").size == (900, 540), "there is one panel"
    for without in (
        WRN,
        {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "dirac": "identity"}},
    ):
        with pytest.warns(UserWarning, match="no Dirac layers with scales, so that DiracScales records nothing"):
            _, logged = train([DiracScales(folder=str(tmp_path / "none"))], 1, without)
        assert not (tmp_path / "none").exists()
        assert logged.column("dirac/a_mean") == []


def test_what_is_drawn():
    rows = [
        Row(epoch, layer, 1.0 + i + epoch, None if layer == "group2.0" else 0.5 * epoch)
        for epoch in (0, 1, 2)
        for i, layer in enumerate(["group1.0", "group1.1", "group2.0"])
    ]
    figure = draw(rows)
    axes = figure.axes
    assert [axis.get_title().split(" (")[0] for axis in axes] == ["mean a", "mean b"]
    lines = axes[0].get_lines()
    assert [line.get_ydata().tolist() for line in lines] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert all(line.get_xdata().tolist() == [0, 1, 2] for line in lines)
    brightness = [sum(line.get_color()[:3]) for line in lines]
    assert brightness[1] < brightness[0], "the deeper layer of a group is not darker"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["group1", "group2"]


def test_the_command_writes_into_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["baton"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [
        "--model=Classification", "--model.backbone=diracnet", "--model.backbone_kwargs={depth: 10, width: 1}",
        "--data=Shapes", "--data.size=16", "--data.length=16", "--data.val_length=8", "--data.test_length=8",
        "--data.batch_size=8", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--run.wandb=false",
        "--trainer.callbacks+=DiracScales", "--run.name=r",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["fit", *arguments]) == 0
    pictures = {path.name for path in (tmp_path / "runs/r/pictures").iterdir()}
    assert pictures >= {"dirac_scales.csv", "dirac_scales.png"}
    header = (tmp_path / "runs/r/metrics.csv").read_text().partition("\n")[0].split(",")
    assert [name for name in header if name.startswith("dirac/")] == ["dirac/a_mean", "dirac/b_mean"]
