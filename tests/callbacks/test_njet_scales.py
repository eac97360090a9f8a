"""Scales, filters and maps of N-Jet layers are recorded, drawn, continued by a resumed run, and never touched."""

import csv
import sys
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import nn

from baton import cli
from baton.backbones import create_backbone
from baton.callbacks import NJetScales
from baton.callbacks.njet_scales import Row, draw, map_sides
from baton.layers import NJetConv2d
from baton.layers.njet import njet_layers
from baton.supervised import Classification
from tiny import WRN, Arrays, Rows, fit, same, state

NJET = {"backbone": "njet_nin", "backbone_kwargs": {"width": 0.05, "sigma": [1.0, 2.0, 1.5], "sigma_groups": 2}}
LAYERS = ["group1.0.conv", "group2.2.conv", "group3.2.conv"]


def read(folder):
    with (folder / "njet_scales.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train(callbacks, epochs=3, backbone=NJET, **kwargs):
    torch.manual_seed(0)
    task = Classification(**backbone)
    return task, fit(task, Arrays(12, batch_size=4, size=(16, 20)), epochs, callbacks=callbacks, **kwargs)


def seen(network, size):
    """Sides of the maps that leave the N-Jet layers: the subsampled ones."""
    found, hooks = {}, []
    for name, layer in network.named_modules():
        if type(layer).__name__ == "SubsampledNJet":
            hooks.append(
                layer.register_forward_hook(lambda _, __, y, name=name: found.update({name + ".conv": y.shape[2:]}))
            )
    network.eval()(torch.zeros(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return {name: tuple(map(str, sides)) for name, sides in found.items()}


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3])])
def test_every_layer_is_recorded(every, epochs, tmp_path):
    task, logged = train([NJetScales(every, str(tmp_path / "pictures"), "njet_nin_plain", {"width": 0.05})])
    rows = read(tmp_path / "pictures")
    assert [(int(row["epoch"]), row["layer"]) for row in rows] == [(e, layer) for e in epochs for layer in LAYERS]
    assert [float(row["sigma_mean"]) for row in rows[:3]] == [1.0, 2.0, 1.5]
    assert [int(row["filter_side"]) for row in rows[:3]] == [5, 9, 7]
    torch.manual_seed(0)
    before = seen(create_backbone("njet_nin", **NJET["backbone_kwargs"]), (16, 20))
    after = seen(task.backbone, (16, 20))
    for row, sides in zip(rows[:3] + rows[-3:], [before] * 3 + [after] * 3, strict=True):
        assert (row["map_height"], row["map_width"]) == sides[row["layer"]]
    means = []
    for row, (name, layer) in zip(rows[-3:], njet_layers(task.backbone), strict=True):
        assert row["layer"] == name
        sigma = layer.sigma.tolist()
        assert [float(row[f"sigma_{which}"]) for which in ("min", "mean", "max")] == pytest.approx(
            [min(sigma), sum(sigma) / 2, max(sigma)], rel=1e-6
        )
        assert sigma[0] != sigma[1]
        assert int(row["filter_side"]) == layer.kernel_size
        means.append(sum(sigma) / 2)
    assert len(logged.column("njet/sigma_mean")) == len(epochs) - 1
    assert logged.column("njet/sigma_mean")[-1] == pytest.approx(sum(means) / 3, rel=1e-6)
    assert Image.open(tmp_path / "pictures/njet_scales.png").size == (2160, 540)


def test_it_changes_nothing():
    watched, alone = train([NJetScales()])[0], train([])[0]
    assert same(state(watched), state(alone))
    assert not any(module._forward_hooks for module in watched.backbone.modules())


class Remote(WandbLogger):
    """Weights & Biases that only remembers."""

    def __init__(self):
        self.metrics, self.images = [], []

    name = version = save_dir = "remote"

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_image(self, key, images, step=None):
        self.images.append((key, images[0].shape, step))

    def after_save_checkpoint(self, checkpoint):
        pass

    log_hyperparams = finalize = after_save_checkpoint


def test_layers_go_to_weights_and_biases_alone():
    remote, local = Remote(), Rows()
    callback = NJetScales()
    train([callback], 2, logger=[remote, local])
    detailed = [(step, metrics) for step, metrics in remote.metrics if "njet/sigma/group1.0.conv" in metrics]
    means = {(row.epoch, row.layer): row.sigma_mean for row in callback.rows}
    assert detailed == [(3 * e, {f"njet/sigma/{layer}": means[e, layer] for layer in LAYERS}) for e in (1, 2)]
    assert not any(name.startswith("njet/sigma/") for _, row in local.rows for name in row)
    assert remote.images == [("pictures/njet_scales", (540, 2160, 4), 6)]


def test_a_resumed_run_continues_the_record(tmp_path):
    whole, first, second = NJetScales(), NJetScales(), NJetScales()
    train([whole], 4)
    checkpoint = tmp_path / "last.ckpt"

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(checkpoint)

    train([first, Save()], 2)
    train([second], 4, ckpt_path=checkpoint)
    assert [row[:2] for row in second.rows] == [row[:2] for row in whole.rows]
    assert second.rows[: len(first.rows)] == first.rows


def test_networks_without_njet_layers_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="no N-Jet layers, so that NJetScales records nothing"):
        _, logged = train([NJetScales(folder=str(tmp_path / "none"))], 1, WRN)
    assert not (tmp_path / "none").exists()
    assert logged.column("njet/sigma_mean") == []


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 2, 3, 2), NJetConv2d(3, 4, stride=2)
        self.idle = nn.Conv2d(1, 1, 1)

    def forward_features(self, x):
        return self.second(self.first(x)).relu()


def test_sides_of_maps_are_those_of_a_copy():
    network = Network()
    heard = []
    network.first.register_forward_hook(lambda *arguments: heard.append(arguments))
    network.forward_features = torch.compile(network.forward_features, backend=lambda *_: pytest.fail("was compiled"))
    modules = {"second": network.second, "idle": network.idle, "first": network.first}
    assert list(map_sides(network, modules, (13, 9)).items()) == [("first", (7, 5)), ("second", (3, 2))]
    assert heard == []
    assert network.training


def test_what_is_drawn():
    rows = [
        Row(epoch, layer, 1.0, 2.0 + i + epoch, 9.0, 5, 16 - epoch, 4 * (16 - epoch))
        for epoch in (0, 1, 2)
        for i, layer in enumerate(["group1.0", "group1.1", "group2.0"])
    ]
    scales, over_epochs, over_layers = draw(rows, [(32, 32), (16, 16)]).axes
    assert [line.get_ydata().tolist() for line in scales.get_lines()] == [[2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert [line.get_ydata().tolist() for line in over_epochs.get_lines()] == [[32, 30, 28]] * 3
    drawn = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in over_layers.lines}
    assert drawn == {
        "epoch 0": ([1, 2, 3], [32] * 3), "epoch 2": ([1, 2, 3], [28] * 3), "plain network": ([1, 2], [32, 16]),
    }  # fmt: skip
    (alone,) = draw([row._replace(map_height=None, map_width=None) for row in rows]).axes
    assert alone.get_title() == "σ in pixels"


def test_the_command_writes_into_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["baton"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [
        "--model=Classification", "--model.backbone=njet_nin", "--model.backbone_kwargs={width: 0.05}",
        "--model.optimizer.overrides={'*.log2_sigma': {lr_factor: 0.5, weight_decay: 0}}",
        "--data=Shapes", "--data.size=16", "--data.length=16", "--data.val_length=8", "--data.test_length=8",
        "--data.batch_size=8", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--run.wandb=false",
        "--trainer.callbacks+=NJetScales", "--trainer.callbacks.plain=njet_nin_plain", "--run.name=r",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["fit", *arguments]) == 0
    assert {path.name for path in (tmp_path / "runs/r/pictures").iterdir()} >= {"njet_scales.csv", "njet_scales.png"}
    header = (tmp_path / "runs/r/metrics.csv").read_text().partition("\n")[0].split(",")
    assert [name for name in header if name.startswith("njet/")] == ["njet/sigma_mean"]
