"""Linear probes: scores and gradients by hand, each probe as if alone, a backbone that keeps every bit."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from baton import cli
from baton.backbones.staged import StagedNetwork
from baton.optim import Optimizer
from baton.supervised import LinearProbes, linear_probes
from tiny import WRN, Arrays, fit, same, state, trainer

DROPOUT = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "drop_rate": 0.3}}
SPLIT = {"backbone": "split_brain", "backbone_kwargs": {"base": "simplenet", "base_kwargs": {"padded": True}}}
STILL = Optimizer("momentum", lr=0.0)


def measured(data, kwargs=WRN, **options):
    """A task whose probes are as at the start of training, but with weights of their own."""
    torch.manual_seed(0)
    task = LinearProbes(optimizer=STILL, **options, **kwargs)
    fit(task, data)
    for probe in task.probes:
        torch.nn.init.normal_(probe.linear.weight, std=0.1)
        torch.nn.init.normal_(probe.linear.bias)
    return task.double().eval()


def pixels(dataset):
    images, targets = dataset.__getitems__(range(len(dataset)))
    return images.double() / 255, targets


def naive_pool(maps, grid):
    """Means of cells whose borders are rounded outwards."""
    count, channels, height, width = maps.shape
    out = np.zeros((count, channels, grid, grid))
    for y in range(grid):
        for x in range(grid):
            rows = slice(y * height // grid, -(-(y + 1) * height // grid))
            columns = slice(x * width // grid, -(-(x + 1) * width // grid))
            out[:, :, y, x] = maps[:, :, rows, columns].reshape(count, channels, -1).mean(2)
    return out


def naive_grid(channels, side, most):
    grid = 1
    while grid < side and channels * (grid + 1) ** 2 <= most:
        grid += 1
    return grid


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("kwargs", [WRN, SPLIT], ids=["wide_resnet", "split_brain"])
@pytest.mark.parametrize(("size", "most"), [((17, 13), 10_000), ((9, 21), 500), ((5, 7), 20)])
def test_losses_and_gradients_by_hand(size, most, kwargs):
    data = Arrays(14, size=size, num_classes=4)
    task = measured(data, kwargs, max_features=most)
    seen, _ = pixels(data.train_set)
    images, targets = seen[:6], data.train_set.targets[:6]
    losses = task.losses((images, targets))
    losses["loss"].backward()
    with torch.no_grad():
        both = [
            task.backbone.forward_intermediates(task.normalize(x), norm=True, intermediates_only=True)
            for x in (seen, images)
        ]
    assert len(task.probes) == len(task.backbone.feature_info)
    total = 0.0
    for stage, (probe, everything, maps) in enumerate(zip(task.probes, *both, strict=True), start=1):
        channels = maps.shape[1]
        assert channels == task.backbone.feature_info[stage - 1]["num_chs"]
        grid = naive_grid(channels, min(maps.shape[2:]), most)
        pooled = naive_pool(everything.numpy(), grid)
        mean, variance = pooled.mean((0, 2, 3)), pooled.var((0, 2, 3))
        cells = naive_pool(maps.numpy(), grid)
        cells = (cells - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
        features = cells.reshape(6, channels * grid**2)
        weight, bias = (value.detach().numpy() for value in probe.linear.parameters())
        scores = features @ weight.T + bias
        chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        loss = -np.log(chances[np.arange(6), targets]).mean()
        # the statistics are measured in float32
        assert losses[f"loss_stage{stage}"].item() == pytest.approx(loss, rel=1e-4)
        assert losses[f"error_stage{stage}"].item() == pytest.approx((scores.argmax(1) != targets.numpy()).mean())
        residue = chances - np.eye(4)[targets]
        np.testing.assert_allclose(probe.linear.weight.grad, residue.T @ features / 6, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(probe.linear.bias.grad, residue.mean(0), rtol=1e-3, atol=1e-4)
        total += loss
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)
    assert all(value.grad is None for value in task.backbone.parameters())


@pytest.mark.parametrize("most", [1, 15, 16, 63, 64, 100, 1000, 9216, 10_000])
def test_the_grid_is_the_largest_that_fits(most):
    task = LinearProbes(max_features=most, **WRN)
    for channels in (1, 3, 16, 96, 100, 256, 384):
        for height, width in ((1, 1), (2, 9), (7, 5), (13, 13), (55, 55)):
            expected = naive_grid(channels, min(height, width), most)
            assert task._size(torch.zeros(1, channels, height, width)) == (channels, expected)


def test_the_sizes_of_the_papers_code():
    task = LinearProbes(**WRN)
    sides = {96: 55, 256: 27, 384: 13}
    assert [task._size(torch.zeros(1, c, side, side))[1] for c, side in sides.items()] == [10, 6, 5]


def test_probes_begin_at_chance_and_learn():
    torch.manual_seed(0)
    task = LinearProbes(optimizer=Optimizer("momentum", lr=0.01), **WRN)
    rows = fit(task, Arrays(60, val=30), 8, log_every_n_steps=1)
    for stage in (1, 2, 3):
        losses = rows.column(f"train/loss_stage{stage}")
        assert losses[0] == pytest.approx(math.log(3), rel=1e-5)
        assert losses[-1] < 0.3
    assert rows.column("val/error_stage1")[-1] < 0.2


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_do_not_depend_on_batches_and_join_their_parts():
    tasks = []
    for batch_size in (7, 64):
        data = Arrays(230, batch_size=batch_size, size=(6, 6))
        tasks.append(measured(data, DROPOUT))
    assert same(*({k: v for k, v in state(task.probes).items() if "linear" not in k} for task in tasks))
    images, _ = pixels(data.train_set)
    for probe, maps in zip(tasks[0].probes, tasks[0].maps(images), strict=True):
        cells = naive_pool(maps.numpy(), probe.grid)
        np.testing.assert_allclose(probe.mean, cells.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probe.variance, cells.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_statistics_are_of_images_spread_over_the_data(monkeypatch):
    monkeypatch.setattr(linear_probes, "LOOKED_AT", 5)
    data = Arrays(23, size=(6, 6), flip=True, crop_padding=2)
    task = measured(data)
    images, _ = pixels(data.train_set)
    cells = naive_pool(task.maps(images[[0, 4, 9, 13, 18]])[0].numpy(), task.probes[0].grid)
    np.testing.assert_allclose(task.probes[0].mean, cells.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_probe_learns_as_if_alone(stage, name):
    def trained(alone):
        torch.manual_seed(0)
        task = LinearProbes(optimizer=Optimizer(name, 0.05, weight_decay=0.1), **DROPOUT)
        if alone:
            everything = task.losses
            task.losses = lambda batch: {"loss": everything(batch)[f"loss_stage{stage}"]}
        fit(task, Arrays(24, flip=True), 3)
        return task.probes

    together, alone = trained(False), trained(True)
    assert same(state(together[stage - 1]), state(alone[stage - 1]))
    for place, (one, other) in enumerate(zip(together, alone, strict=True), start=1):
        assert one.linear.weight.any()
        assert bool(other.linear.weight.any()) == (place == stage)


def test_the_backbone_keeps_every_bit():
    torch.manual_seed(0)
    task = LinearProbes(optimizer=Optimizer("momentum", 0.1, weight_decay=0.1, decay_all=True), **DROPOUT)
    before = state(task.backbone)
    assert any("running_mean" in name for name in before)
    modes, everything = set(), task.losses

    def watched(batch):
        modes.update(module.training for module in task.backbone.modules())
        return everything(batch)

    task.losses = watched
    runner = trainer(2)
    runner.fit(task, datamodule=Arrays(24, val=8))
    assert same(before, state(task.backbone))
    assert modes == {False}
    learning = {id(value) for group in runner.optimizers[0].param_groups for value in group["params"]}
    assert learning == {id(value) for value in task.probes.parameters()}
    assert all(probe.linear.weight.any() for probe in task.probes)


def test_channels_last_and_bf16_measure_the_same():
    losses = []
    for options, precision in (({}, "32-true"), ({"channels_last": True}, "32-true"), ({}, "bf16-mixed")):
        torch.manual_seed(0)
        task = LinearProbes(optimizer=Optimizer("momentum", lr=0.01), **WRN, **options)
        losses.append(fit(task, Arrays(16, val=8), precision=precision, log_every_n_steps=1).column("train/loss"))
        assert all(value.dtype == torch.float32 for value in state(task.probes).values())
    plain, last, half = losses
    assert last == pytest.approx(plain, abs=1e-4)
    assert half == pytest.approx(plain, abs=0.1)


# ------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("classes", [3, 6, 11])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_every_stage_counted_by_hand(classes, stage):
    count = 29
    data = Arrays(12, val=count, test=count, num_classes=classes)
    task = measured(data).float()
    getattr(trainer(), stage)(task, datamodule=data, verbose=False)
    split, dataset = ("val", data.val_set) if stage == "validate" else ("test", data.test_set)
    images, targets = dataset.__getitems__(range(count))
    with torch.no_grad():
        scores = task(images.float() / 255)
    expected = {"loss": 0.0}
    for number, logits in enumerate(scores, start=1):
        ranks = [
            sorted(row.tolist(), reverse=True).index(row[target]) for row, target in zip(logits, targets, strict=True)
        ]
        expected[f"accuracy_stage{number}"] = sum(rank < 1 for rank in ranks) / count
        expected[f"error_stage{number}"] = sum(rank >= 1 for rank in ranks) / count
        if classes > 5:
            expected[f"accuracy_top5_stage{number}"] = sum(rank < 5 for rank in ranks) / count
            expected[f"error_top5_stage{number}"] = sum(rank >= 5 for rank in ranks) / count
        loss = torch.nn.functional.cross_entropy(logits.double(), targets).item()
        expected[f"loss_stage{number}"] = loss
        expected["loss"] += loss
    found = {name: value for name, value in task.latest.items() if name.startswith(split)}
    assert found == {f"{split}/{name}": pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_metrics_start_afresh_every_epoch():
    rows = fit(LinearProbes(optimizer=STILL, **DROPOUT), Arrays(8, val=9), 3)
    for stage in (1, 2, 3):
        values = rows.column(f"val/accuracy_stage{stage}")
        assert len(values) == 3
        assert len(set(values)) == 1


def test_prediction():
    data = Arrays(12, num_classes=4)
    task = measured(data)
    images, targets = pixels(data.train_set)
    predicted = task.predict((images, targets - 5))
    scores = task(images)
    assert torch.equal(predicted["prediction"], scores[2].argmax(1))
    assert torch.allclose(predicted["probability"], scores[2].softmax(1).amax(1))
    assert torch.equal(predicted["target"], targets - 5)
    for stage in (1, 2, 3):
        assert torch.equal(predicted[f"prediction_stage{stage}"], scores[stage - 1].argmax(1))
    assert all(len(value) == 12 for value in predicted.values())


# ------------------------------------------------------------------------------------------------------------ commands


def command(name: str, root: Path, run: str, *more: str) -> list[str]:
    return [name, f"--run.root={root}", f"--run.name={run}", "--trainer.accelerator=cpu", *more]


def shapes(size: int) -> list[str]:
    return ["--data=Shapes", f"--data.size={size}", "--data.length=24", "--data.val_length=9", "--data.test_length=11"]


def recorded(root: Path, run: str, prefix: str) -> dict[str, float]:
    metrics = json.loads((root / run / "model/config.json").read_text())["baton"]["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith(prefix)}


def last_row(root: Path, run: str, prefix: str) -> dict[str, float]:
    row = pd.read_csv(root / run / "metrics.csv").iloc[-1].dropna()
    return {str(name): float(value) for name, value in row.items() if str(name).startswith(prefix)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretext run and the probes of its backbone."""
    root = tmp_path_factory.mktemp("runs")
    brief = ["--trainer.max_epochs=1", "--run.wandb=false", "--trainer.enable_progress_bar=false"]
    chosen = ["--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1}"]
    assert cli.main(command("fit", root, "pretext", "--model=Denoising", *chosen, *shapes(16), *brief)) == 0
    probes = ["--model=LinearProbes", f"--model.init_from={root / 'pretext'}", "--model.optimizer.lr=0.01"]
    assert cli.main(command("fit", root, "probes", *probes, *shapes(16), *brief, "--run.test=true")) == 0
    return root


def test_the_backbone_is_handed_over_as_it_came(runs):
    handed = runs / "probes/model"
    assert (handed / "model.safetensors").read_bytes() == (runs / "pretext/model/model.safetensors").read_bytes()
    record = json.loads((handed / "config.json").read_text())
    assert record["baton"]["parent"]["sha256"] == record["baton"]["sha256"]
    assert record["num_classes"] == 0
    assert "label_names" not in record
    assert not any("probe" in name for name in load_file(handed / "model.safetensors"))


def test_a_finished_run_is_measured_again(runs):
    wanted = recorded(runs, "probes", "test/")
    assert len(wanted) == 4 + 3 * 4
    assert cli.main(command("test", runs, "probes")) == 0
    assert last_row(runs, "probes", "test/") == pytest.approx(wanted)
    assert cli.main(command("validate", runs, "probes")) == 0
    assert last_row(runs, "probes", "val/") == pytest.approx(recorded(runs, "probes", "val/"))


@pytest.mark.parametrize("size", [17, 24])
def test_images_of_another_size_meet_the_same_probes(size, runs, monkeypatch):
    sizes = []
    forward = LinearProbes.forward

    def watched(self, images):
        sizes.append((images.shape[-1], [probe.grid for probe in self.probes]))
        return forward(self, images)

    monkeypatch.setattr(LinearProbes, "forward", watched)
    assert cli.main(command("test", runs, "probes", f"--data.size={size}")) == 0
    assert {(side, *grids) for side, grids in sizes} == {(size, 16, 8, 4)}


def test_predictions_of_every_stage_are_written(runs):
    assert cli.main(command("predict", runs, "probes")) == 0
    table = pd.read_csv(runs / "probes/predictions/predictions.csv")
    assert len(table) == 11
    wanted = recorded(runs, "probes", "test/")
    for stage in (1, 2, 3):
        accuracy = (table[f"prediction_stage{stage}"] == table["target"]).mean()
        assert accuracy == pytest.approx(wanted[f"test/accuracy_stage{stage}"])
    assert (table["prediction"] == table["prediction_stage3"]).all()
    assert "class" in table


def test_a_checkpoint_loads_without_the_data(runs):
    path = runs / "probes/checkpoints/last.ckpt"
    task = LinearProbes.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(state(task), torch.load(path, weights_only=True)["state_dict"])
    assert [probe.grid for probe in task.probes] == [16, 8, 4]
    assert [len(scores) for scores in task(torch.rand(2, 3, 16, 16))] == [2, 2, 2]


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_backbone_without_maps(monkeypatch):
    monkeypatch.delattr(StagedNetwork, "forward_intermediates")
    with pytest.raises(ValueError, match=r"maps of its stages .*, but wide_resnet does not: choose another\.$"):
        LinearProbes(**WRN)


@pytest.mark.parametrize("most", [0, -3])
def test_a_probe_has_inputs(most):
    with pytest.raises(ValueError, match=rf"max_features must be at least 1, got {most}\.$"):
        LinearProbes(max_features=most, **WRN)


def test_probes_need_data_or_a_checkpoint():
    task = LinearProbes(num_classes=3, **WRN)
    task.configure_model()
    with pytest.raises(ValueError, match="follow from the data or a checkpoint"):
        task.losses((torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)))


def test_samples_without_a_class_are_an_error():
    with pytest.raises(ValueError, match="LinearProbes needs labelled data of at least two classes"):
        fit(LinearProbes(**WRN), Arrays(num_classes=0))
    data = Arrays(20, val=9)
    data.setup()
    data.val_set.targets[::3] = -1
    with pytest.raises(ValueError, match="LinearProbes needs a class for every sample, but 3 of 9 in the val split"):
        fit(LinearProbes(**WRN), data)
