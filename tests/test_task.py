"""The base of all recipes: what it logs, freezes, saves and never waits for."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from baton.backbones import create_backbone
from baton.distill import Distillation
from baton.handover import read_source, write_model
from baton.optim import LRScheduler, Optimizer
from baton.random_state import fixed_randomness
from baton.ssl_tasks import Autoresolution, Denoising, Reconstruction, SplitBrain
from baton.supervised import Classification, LinearProbes, Segmentation
from baton.task import Task
from tiny import WRN, Arrays, MaskArrays, Rows, fit, hand_over, same, state, trainer


class Numbered(Task):
    """Its n-th training batch has the loss n² / 7 and a second value; `bad` says which batch is not a number."""

    def __init__(self, bad=None, **kwargs):
        super().__init__(**WRN, **kwargs)
        self.bad, self.count = bad, 0

    def losses(self, batch):
        self.count += 1
        anchor = 0 * next(self.backbone.parameters()).sum()
        loss = torch.tensor(math.nan if self.count == self.bad else self.count**2 / 7)
        return {"loss": anchor + loss, "part": torch.tensor(1.0 / self.count)}

    def evaluate(self, batch):
        return {"mean": batch[1].float().mean()}


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("every", [1, 2, 3, 5, 100])
def test_logged_losses_are_the_means_of_their_windows(every):
    epochs, batches = 3, 5
    rows = fit(Numbered(), Arrays(batches * 4, batch_size=4), epochs, log_every_n_steps=every)
    expected, window = [], []
    for step in range(1, epochs * batches + 1):
        window.append(step)
        if step % every == 0 or step % batches == 0:
            mean = sum(n * n / 7 for n in window) / len(window)
            part = sum(1 / n for n in window) / len(window)
            expected.append((step, mean, part, (step - 1) // batches + 1))
            window = []
    assert [step for step, _ in rows.rows] == [step for step, *_ in expected]
    for (_, row), (_, mean, part, epoch) in zip(rows.rows, expected, strict=True):
        assert row == {"train/loss": pytest.approx(mean), "train/part": pytest.approx(part), "lr": 0.1, "epoch": epoch}


def test_a_last_partial_epoch_is_logged():
    rows = fit(Numbered(), Arrays(20, batch_size=4), -1, max_steps=8, log_every_n_steps=3)
    assert [step for step, _ in rows.rows] == [3, 5, 6, 8]
    assert rows.column("train/part")[-1] == pytest.approx((1 / 7 + 1 / 8) / 2)


def test_limited_batches_end_an_epoch():
    rows = fit(Numbered(), Arrays(20, batch_size=4), 2, limit_train_batches=2)
    assert rows.column("train/loss") == pytest.approx([(1 + 4) / 14, (9 + 16) / 14])


def test_rows_of_accumulated_batches_belong_to_their_step():
    rows = fit(Numbered(), Arrays(20, batch_size=4), 2, accumulate_grad_batches=2, log_every_n_steps=1)
    assert [step for step, _ in rows.rows] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]


@pytest.mark.parametrize(
    ("bad", "accumulate", "step", "epoch"), [(1, 1, 1, 1), (7, 1, 7, 2), (15, 1, 15, 3), (8, 2, 5, 2)]
)
@pytest.mark.parametrize("every", [1, 4, 50])
def test_a_bad_loss_names_its_step(every, bad, accumulate, step, epoch):
    with pytest.raises(ValueError, match=rf"became nan at step {step} \(epoch {epoch}\)") as caught:
        fit(Numbered(bad), Arrays(20, batch_size=4), 3, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_is_written_over_a_good_one_after_a_bad_loss(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(ValueError, match="at step 3"):
        fit(Numbered(3), Arrays(20, batch_size=4), callbacks=[saver], enable_checkpointing=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_windows_continue_after_a_resume(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"log_every_n_steps": 4}
    whole = fit(Numbered(), Arrays(40, batch_size=4), 1, callbacks=[saver], enable_checkpointing=True, **options)
    task = Numbered()
    task.count = 3
    continued = fit(task, Arrays(40, batch_size=4), 1, ckpt_path=tmp_path / "step=3.ckpt", **options)
    assert continued.rows == whole.rows
    assert len(whole.rows) == 3


def test_evaluation_weights_batches_by_their_size():
    data = Arrays(8, val=21, test=11, batch_size=4)
    runner, task = trainer(), Numbered()
    runner.fit(task, datamodule=data)
    assert runner.logger.column("val/mean") == pytest.approx([data.val_set.targets.double().mean().item()])
    runner.test(task, data, verbose=False)
    assert task.latest["test/mean"] == pytest.approx(data.test_set.targets.double().mean().item())


PATCHES = {"super_patch": 12, "low_resolution_factor": 2, "patch_backbone": "autoresolution_patch_rf9"}
SYNCHRONISING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")


@pytest.mark.parametrize(
    "kind",
    [
        "denoising",
        "classification",
        "head_only",
        "smoothed",
        "matching",
        "locating",
        "split_brain",
        "linear_probes",
        "segmentation",
        "reconstruction",
        "distillation",
    ],
)
def test_no_step_between_logs_waits_for_the_device(kind, monkeypatch, tmp_path):
    calls, where = [], [None]

    def watched(name, original):
        def call(self, *args, **kwargs):
            if where[0] is not None:
                calls.append((where[0], name))
            return original(self, *args, **kwargs)

        return call

    for name in SYNCHRONISING:
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    step = Task.training_step

    def training_step(self, batch, batch_idx):
        where[0] = batch_idx + 1
        try:
            return step(self, batch, batch_idx)
        finally:
            where[0] = None

    monkeypatch.setattr(Task, "training_step", training_step)
    tasks = {
        "denoising": lambda: Denoising(**WRN),
        "matching": lambda: Autoresolution(**PATCHES, **WRN),
        "locating": lambda: Autoresolution("regression", **PATCHES, **WRN),
        "split_brain": lambda: SplitBrain(size=4, backbone="split_brain", backbone_kwargs={"base": "test_resnet"}),
        "classification": lambda: Classification(**WRN),
        "head_only": lambda: Classification(head_only_steps=3, **WRN),
        "linear_probes": lambda: LinearProbes(**WRN),
        "segmentation": lambda: Segmentation(class_weights="inverse_frequency", **WRN),
        "reconstruction": lambda: Reconstruction(
            classification_weight=1, optimizer=Optimizer(lr=0.001), backbone="nin", backbone_kwargs={"width": 0.1}
        ),
        "distillation": lambda: Distillation(
            hand_over(tmp_path / "teacher", depth=10, width=2),
            kd_weight=1.0,
            at_weight=10.0,
            hint_weight=0.1,
            gradient_weight=0.1,
            symmetry_weight=0.1,
            final={"at": 0.0},
            optimizer=Optimizer(lr=0.001),
            **WRN,
        ),
        "smoothed": lambda: Classification(label_smoothing=0.1, head_drop_rate=0.5, **WRN),
    }
    data = MaskArrays if kind == "segmentation" else Arrays
    fit(tasks[kind](), data(28, batch_size=4), log_every_n_steps=5)
    assert {where for where, _ in calls} == {5, 7}  # the claim can fail: logging does wait


# ----------------------------------------------------------------------------------------------------------- backbone


def test_images_are_normalised_with_the_backbones_own_statistics():
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    images = torch.rand(2, 3, 5, 7)
    task = Denoising(backbone="wrn_16_1", backbone_kwargs={"pretrained_cfg_overlay": own})
    naive = torch.stack([(images[:, c] - own["mean"][c]) / own["std"][c] for c in range(3)], dim=1)
    assert torch.allclose(task.normalize(images), naive)
    other = Denoising(backbone="test_resnet").normalize(images)
    config = create_backbone("test_resnet").pretrained_cfg
    assert torch.allclose(other[:, 1], (images[:, 1] - config["mean"][1]) / config["std"][1])
    assert not any("mean" in name.split(".")[0] or name.startswith("std") for name in task.state_dict())


@pytest.mark.parametrize("name", ["wrn_16_1", "test_resnet"])
def test_features_are_what_the_classifier_sees(name):
    task = Classification(backbone=name, num_classes=4)
    task.configure_model()
    task.eval()
    images = torch.rand(2, 3, 32, 32)
    logits = task.backbone.get_classifier()(task.features(images))
    assert torch.allclose(logits, task.backbone(task.normalize(images)), atol=1e-6)
    assert task.feature_map(images).shape[:2] == (2, task.backbone.num_features)


class Frozen(Task):
    """Freezes its backbone, which has batch norm and dropout, and trains a linear map of its features."""

    def __init__(self, **kwargs):
        super().__init__(backbone="wide_resnet", backbone_kwargs={"depth": 10, "width": 1, "drop_rate": 0.5}, **kwargs)
        self.freeze_modules(self.backbone)
        self.head = torch.nn.Linear(self.backbone.num_features, 1)
        self.modes = set()

    def losses(self, batch):
        images, _ = batch
        self.modes |= {module.training for module in self.backbone.modules()}
        features = self.features(images)
        assert torch.equal(features, self.features(images))  # no dropout
        return {"loss": self.head(features).square().mean()}


def test_frozen_modules_keep_every_bit():
    task = Frozen(optimizer=Optimizer("adamw", 0.1, weight_decay=0.5))
    before, head = state(task.backbone), state(task.head)
    fit(task, Arrays(16, val=8), 2)
    assert same(before, state(task.backbone))
    assert not same(head, state(task.head))
    assert task.modes == {False}
    assert task.train().head.training
    assert not task.backbone.training


# --------------------------------------------------------------------------------------------------------- checkpoints


def saved(task, tmp_path, data=None, **kwargs):
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    fit(task, data or Arrays(16, val=8), callbacks=[saver], enable_checkpointing=True, **kwargs)
    return tmp_path / "last.ckpt"


def plain(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("kind", ["denoising", "classification"])
def test_a_checkpoint_is_plain_and_stands_alone(kind, tmp_path, monkeypatch):
    folder = tmp_path / "pre"
    write_model(
        folder, create_backbone(WRN["backbone"], num_classes=2, **WRN["backbone_kwargs"]),
        backbone_kwargs=WRN["backbone_kwargs"], config={}, metrics={}, parent=None,
    )  # fmt: skip
    for one in (Task, Denoising, Classification):  # Lightning looks for arguments in frames, where jaxtyping stands
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    kinds = {"denoising": (Denoising, {"noise": "gaussian", "amount": 0.1}), "classification": (Classification, {})}
    cls, options = kinds[kind]
    task = cls(
        init_from=str(folder), optimizer=Optimizer("adamw", lr=0.001, options={"betas": [0.8, 0.9]}),
        lr_scheduler=LRScheduler(name="step", milestones=[2]), **options,
    )  # fmt: skip
    sha = read_source(folder).sha256
    path = saved(task, tmp_path)
    for file in folder.iterdir():
        file.unlink()

    checkpoint = torch.load(path, weights_only=True)
    assert plain(dict(checkpoint["hyper_parameters"]))
    assert checkpoint["hyper_parameters"]["optimizer"]["options"] == {"betas": [0.8, 0.9]}
    assert checkpoint["baton"]["parent"]["sha256"] == sha
    loaded = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(state(loaded), state(task))
    assert loaded.optimizer == task.optimizer
    assert loaded.lr_scheduler == task.lr_scheduler
    assert loaded.parent["sha256"] == sha
    assert loaded.classes == task.classes
    batch = (torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        ours, theirs = task.eval().evaluate(batch), loaded.eval().evaluate(batch)
    assert torch.equal(ours["loss"], theirs["loss"])


def test_init_from_says_how_much_it_loaded(tmp_path, capsys):
    backbone = create_backbone("wrn_16_1", num_classes=2)
    write_model(tmp_path / "pre", backbone, backbone_kwargs={}, config={}, metrics={}, parent=None)
    task = Denoising(init_from=str(tmp_path / "pre"))
    values = {name: value for name, value in backbone.state_dict().items() if not name.startswith("fc.")}
    total = sum(value.numel() for value in values.values())
    printed = capsys.readouterr().out
    assert f"wrn_16_1, {len(values)} of {len(values)} tensors, {total:,} values" in printed
    assert same(values, state(task.backbone))


def test_a_backbone_is_needed():
    with pytest.raises(ValueError, match=r"model.backbone is missing: name a backbone .* or init_from"):
        Denoising()


def test_what_a_task_does_not_do_is_one_sentence():
    task = Numbered()
    with pytest.raises(ValueError, match="Numbered makes no predictions"):
        task.predict((torch.rand(1, 3, 8, 8), torch.zeros(1)))
    assert task.pictures((torch.rand(1, 3, 8, 8), torch.zeros(1))) == {}
    task.backbone = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="gives no spatial map"):
        task.feature_map(torch.rand(1, 3, 8, 8))


# -------------------------------------------------------------------------------------------------------------- faster


def trained(task_options, **kwargs):
    torch.manual_seed(0)
    task = Classification(optimizer=Optimizer("momentum", 0.02), **WRN, **task_options)
    rows = fit(task, Arrays(16, val=8), 2, log_every_n_steps=1, **kwargs)
    return task, rows


def test_channels_last_and_bf16_train_the_same_network():
    plain, rows = trained({})
    assert len(rows.column("train/loss")) == 4
    last, last_rows = trained({"channels_last": True})
    assert last.backbone.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert last.normalize(torch.rand(2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)
    assert last_rows.column("train/loss") == pytest.approx(rows.column("train/loss"), abs=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(last.parameters(), plain.parameters(), strict=True))
    half, half_rows = trained({}, precision="bf16-mixed")
    assert half_rows.column("train/loss") == pytest.approx(rows.column("train/loss"), abs=0.1)
    assert half_rows.column("train/loss") != rows.column("train/loss")
    assert next(half.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options", "networks"),
    [
        (Classification, {}, 1),
        (LinearProbes, {}, 1),
        (Denoising, {}, 1),
        (Segmentation, {}, 1),
        (Autoresolution, PATCHES, 2),
    ],
    ids=["Classification", "LinearProbes", "Denoising", "Segmentation", "Autoresolution"],
)
def test_compiled_networks_train_the_same_weights(cls, options, networks, monkeypatch):
    compiled = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(1) or original(function))
    losses = {}
    for compile_it in (False, True):
        torch.manual_seed(0)
        task = cls(optimizer=Optimizer("momentum", 0.02), compile=compile_it, **options, **WRN)
        data = MaskArrays if cls is Segmentation else Arrays
        losses[compile_it] = fit(task, data(16, val=8), 1, log_every_n_steps=1).column("train/loss")
        assert not any("_orig_mod" in name for name in task.state_dict())
    assert len(compiled) >= networks
    assert losses[True] == pytest.approx(losses[False], abs=1e-3)


def test_fixed_randomness_repeats_inside_and_leaves_the_outside_alone():
    torch.manual_seed(1)
    first = torch.rand(2)
    torch.manual_seed(1)
    with fixed_randomness(5):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(2), first)
    with fixed_randomness(5):
        assert torch.equal(torch.rand(3), inside)


def test_epochs_and_learning_rate_are_logged_from_one(tmp_path):
    class Epochs(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(trainer.current_epoch)

    seen = []
    rows: Rows = fit(Numbered(), Arrays(8, val=4, batch_size=4), 2, callbacks=[Epochs()], log_every_n_steps=1)
    assert seen == [0, 1]
    assert [row["epoch"] for _, row in rows.rows] == [1, 1, 1, 2, 2, 2]
    assert [step for step, _ in rows.rows] == [1, 2, 2, 3, 4, 4]


def test_a_backbone_for_grey_images_is_refused():
    with pytest.raises(ValueError, match="always RGB"):
        Denoising(backbone="resnet18", backbone_kwargs={"in_chans": 1})
