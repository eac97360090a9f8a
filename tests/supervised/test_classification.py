"""Classification claims: naive losses and metrics, and a backbone that stays untouched while it should."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from baton.optim import Optimizer
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, same, state, trainer

DROPOUT = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "drop_rate": 0.3}}


def naive_cross_entropy(logits, targets, smoothing=0.0):
    """In float64, sample by sample."""
    total = 0.0
    for row, target in zip(np.asarray(logits, np.float64), targets, strict=True):
        log_probabilities = row - math.log(np.exp(row - row.max()).sum()) - row.max()
        truth = np.full(len(row), smoothing / len(row))
        truth[target] += 1 - smoothing
        total -= (truth * log_probabilities).sum()
    return total / len(targets)


def naive_top(logits, targets, k):
    hits = 0
    for row, target in zip(np.asarray(logits), targets, strict=True):
        hits += target in np.argsort(-row, kind="stable")[:k]
    return hits / len(targets)


def fixed(task, table):
    """Let a task's classifier say what a table says: the image's first pixel is its row."""
    task.logits = lambda images: table[(images[:, 0, 0, 0] * 255).round().long()]
    return task


def numbered_batch(count, classes):
    images = torch.zeros(count, 3, 8, 8)
    images[:, 0, 0, 0] = torch.arange(count) / 255
    return images, torch.randint(classes, (count,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.35])
def test_loss_and_training_error(smoothing):
    torch.manual_seed(0)
    table = torch.randn(9, 7) * 4
    task = fixed(Classification(num_classes=7, label_smoothing=smoothing, **WRN), table)
    task.configure_model()
    batch = numbered_batch(9, 7)
    losses = task.losses(batch)
    assert losses["loss"].item() == pytest.approx(naive_cross_entropy(table, batch[1], smoothing), rel=1e-5)
    assert losses["error"].item() == pytest.approx(1 - naive_top(table, batch[1], 1))
    assert task.evaluate(batch)["loss"].item() == pytest.approx(naive_cross_entropy(table, batch[1]), rel=1e-5)


@pytest.mark.parametrize("classes", [3, 6, 11])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_a_split_with_an_uneven_last_batch(classes, stage):
    torch.manual_seed(1)
    count = 29
    data = Arrays(12, val=count, test=count, batch_size=8, num_classes=classes)
    task = Classification(**WRN)
    getattr(trainer(), stage)(task, datamodule=data, verbose=False)
    split, dataset = ("val", data.val_set) if stage == "validate" else ("test", data.test_set)
    images, targets = dataset.__getitems__(range(count))
    with torch.no_grad():
        logits = task.eval().backbone(task.normalize(images.float() / 255))
    expected = {"loss": naive_cross_entropy(logits, targets), "accuracy": naive_top(logits, targets, 1)}
    expected["error"] = 1 - expected["accuracy"]
    if classes > 5:
        expected["accuracy_top5"] = naive_top(logits, targets, 5)
        expected["error_top5"] = 1 - expected["accuracy_top5"]
    assert task.latest == {f"{split}/{name}": pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_metrics_start_afresh_every_epoch():
    data = Arrays(8, val=9)
    task = Classification(optimizer=Optimizer("momentum", lr=0.0), **DROPOUT)
    rows = fit(task, data, 3)
    task.eval()
    images, targets = data.val_set.__getitems__(range(9))
    with torch.no_grad():
        logits = task.logits(images.float() / 255)
    accuracies = rows.column("val/accuracy")
    assert accuracies[-1] == pytest.approx(naive_top(logits, targets, 1))
    assert len(accuracies) == 3


def test_prediction():
    table = torch.randn(5, 4)
    task = fixed(Classification(num_classes=4, **WRN), table)
    task.configure_model()
    images, targets = numbered_batch(5, 4)
    predicted = task.predict((images, targets - 5))
    assert torch.equal(predicted["prediction"], table.argmax(1))
    assert torch.allclose(predicted["probability"], (table.exp() / table.exp().sum(1, keepdim=True)).amax(1))
    assert torch.equal(predicted["target"], targets - 5)


# ----------------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("head_drop_rate", [0.0, 0.5])
def test_a_linear_probe_leaves_the_backbone_alone(head_drop_rate):
    torch.manual_seed(0)
    task = Classification(
        num_classes=3, protocol="linear_probe", head_drop_rate=head_drop_rate,
        optimizer=Optimizer("momentum", 0.1, weight_decay=0.1, decay_all=True), **DROPOUT,
    )  # fmt: skip
    task.configure_model()
    before = state(task.backbone)
    runner = trainer(3)
    runner.fit(task, datamodule=Arrays(16, val=8))
    after = state(task.backbone)
    classifier = {"fc.weight", "fc.bias"}
    assert classifier < before.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == classifier
    assert sum(len(group["params"]) for group in runner.optimizers[0].param_groups) == 2


def test_a_linear_probe_is_linear_regression_on_the_features():
    torch.manual_seed(0)
    task = Classification(
        num_classes=3, protocol="linear_probe", optimizer=Optimizer("momentum", 0.5, momentum=0.0), **DROPOUT
    )
    task.configure_model()
    data = Arrays(15, batch_size=15)
    data.setup()
    images, targets = data.train_set.__getitems__(range(15))
    with torch.no_grad():
        features = task.eval().features(images.float() / 255).double()
    weight, bias = (p.detach().double().clone() for p in task.backbone.get_classifier().parameters())
    task.train()
    fit(task, data, 4)
    for _ in range(4):
        error = (features @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(targets, 3)
        weight, bias = weight - 0.5 * error.T @ features / 15, bias - 0.5 * error.mean(0)
    ours = task.backbone.get_classifier()
    assert torch.allclose(ours.weight.double(), weight, atol=1e-4)
    assert torch.allclose(ours.bias.double(), bias, atol=1e-4)


class Recorder:
    """States of the backbone and modes before every step."""

    def __init__(self, task):
        self.states, self.modes = [], []
        step = task.training_step

        def training_step(batch, batch_idx):
            self.states.append(state(task.backbone))
            loss = step(batch, batch_idx)
            self.modes.append({module.training for module in task.backbone.modules()})
            return loss

        task.training_step = training_step


@pytest.mark.parametrize("head_drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_the_head_alone_learns_first_then_everything(steps, head_drop_rate):
    torch.manual_seed(0)
    task = Classification(
        head_only_steps=steps, head_drop_rate=head_drop_rate,
        optimizer=Optimizer("momentum", 0.05, weight_decay=0.1, decay_all=True), **DROPOUT,
    )  # fmt: skip
    seen = Recorder(task)
    fit(task, Arrays(16, val=8, batch_size=4), 2)
    assert len(seen.states) == 8
    classifier = {"fc.weight", "fc.bias"}
    for step in range(1, 8):
        before, after = seen.states[step - 1], seen.states[step]
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        if step <= steps:
            assert changed == classifier, step
            assert seen.modes[step - 1] == {False}
        else:
            assert changed == before.keys(), step  # batch norm's buffers too
            assert seen.modes[step - 1] == {True}


@pytest.mark.parametrize("head_drop_rate", [0.0, 0.5])
def test_a_resume_around_the_change_changes_nothing(head_drop_rate, tmp_path):
    def run(callbacks=None, **kwargs):
        torch.manual_seed(0)
        task = Classification(head_only_steps=3, head_drop_rate=head_drop_rate, **DROPOUT)
        fit(
            task,
            Arrays(24, val=8, batch_size=4),
            1,
            callbacks=callbacks,
            enable_checkpointing=bool(callbacks),
            **kwargs,
        )
        return state(task)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run([saver])
    for step in (1, 2, 3, 4, 5):
        assert same(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole), step


def test_dropout_before_the_classifier():
    torch.manual_seed(0)
    task = Classification(num_classes=4, head_drop_rate=0.5, **WRN)
    task.configure_model()
    images = torch.rand(6, 3, 16, 16)
    task.eval()
    with torch.no_grad():
        assert torch.equal(task.logits(images), task.backbone(task.normalize(images)))
        task.train()
        task.backbone.eval()
        torch.manual_seed(5)
        pooled = task.features(images)
        kept = torch.rand_like(pooled).new_empty(pooled.shape)
        torch.manual_seed(5)
        kept = torch.nn.functional.dropout(torch.ones_like(pooled), 0.5)
        torch.manual_seed(5)
        naive = task.backbone.get_classifier()(pooled * kept)
        ours = task.logits(images)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.allclose(ours, naive, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- errors


def error(task, data, stage="fit"):
    with pytest.raises(ValueError, match=r".*\.$") as caught:
        getattr(trainer(), stage)(task, datamodule=data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_number_of_classes():
    assert error(Classification(num_classes=2, **WRN), Arrays(num_classes=3)) == (
        "model.num_classes=2 is too few: the data have 3 classes."
    )
    assert "labelled data of at least two classes" in error(Classification(**WRN), Arrays(num_classes=0))
    assert "labelled data of at least two classes" in error(Classification(num_classes=1, **WRN), Arrays(num_classes=1))
    task = Classification(num_classes=10, **WRN)
    fit(task, Arrays(8))
    assert task.backbone.num_classes == 10
    assert task.classes is None  # the data cannot name ten classes
    task = Classification(**WRN)
    fit(task, Arrays(8))
    assert task.classes == ["class 0", "class 1", "class 2"]


class PartlyLabelled(Arrays):
    """Every third training image, or test image, has no label."""

    without = 0

    def sources(self):
        splits = super().sources()
        splits[self.without].targets[::3] = -1
        return splits


def test_samples_without_a_class_are_an_error():
    data = PartlyLabelled(20, test=9)
    message = error(Classification(**WRN), data)
    assert "7 of 20 in the train split have none" in message
    trainer().test(Classification(**WRN), datamodule=data, verbose=False)
    data.without, data.train_set = 2, None
    assert "3 of 9 in the test split have none" in error(Classification(**WRN), data, "test")


def test_protocols_that_contradict_each_other():
    with pytest.raises(ValueError, match="linear_probe never does: choose one"):
        Classification(protocol="linear_probe", head_only_steps=3, **WRN)


def test_evaluation_is_deterministic_and_changes_nothing():
    task = Classification(num_classes=3, head_drop_rate=0.5, **DROPOUT)
    task.configure_model()
    task.eval()
    before, batch = state(task), (torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    values: list[Tensor] = [task.evaluate(batch)["loss"] for _ in range(2)]
    assert torch.equal(*values)
    assert same(before, state(task))
