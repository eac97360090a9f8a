"""Distillation: every term against its own arithmetic, a teacher nobody changes, and what a checkpoint needs of it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging

from baton.callbacks import Pictures
from baton.distill import Distillation, distillation
from baton.handover import load_backbone, read_source, write_model
from baton.losses import attention_map
from baton.optim import Optimizer
from baton.supervised import Classification
from baton.task import Task
from tiny import WRN, Arrays, fit, hand_over, same, state, trainer

OWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
#: Of a term, beside the cross-entropy.
OPTIONS = {
    "kd": {"kd_weight": 0.9, "temperature": 3.0},
    "at": {"at_weight": 1000.0},
    "hint": {"hint_weight": 0.5},
    "gradient": {"gradient_weight": 0.2},
    "symmetry": {"symmetry_weight": 0.3},
    "gradient_penalty": {"gradient_penalty_weight": 0.4},
}
ALL = {key: value for options in OPTIONS.values() for key, value in options.items()}
NEED_TEACHER = ("kd", "at", "hint", "gradient")


@pytest.fixture
def teacher(tmp_path):
    return hand_over(tmp_path / "teacher", cfg=OWN, depth=10, width=2)


def task(teacher=None, **kwargs):
    torch.manual_seed(0)
    return Distillation(
        teacher=teacher, **{**WRN, "num_classes": 3, "optimizer": Optimizer("momentum", 0.02), **kwargs}
    )


def built(teacher=None, **kwargs):
    model = task(teacher, **kwargs)
    model.configure_model()
    return model.eval()


def batch(count=3, height=16, width=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, generator=generator), torch.arange(count) % 3


def small(*lengths, **kwargs):
    """Data whose images are four times as quick to look at."""
    return Arrays(*lengths, size=(8, 8), **kwargs)


def checkpoint(model, path, epochs=1, data=None, **kwargs):
    runner = trainer(epochs)
    runner.fit(model, datamodule=data or Arrays(16, val=8), weights_only=True, **kwargs)
    runner.save_checkpoint(path)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- the losses


def looked_at(network, images, cfg, targets):
    """Logits, the three groups' maps and the input gradient of a network, with nothing of Baton's in between."""
    seen = images.clone().requires_grad_()
    channels = [(seen[:, c] - cfg["mean"][c]) / cfg["std"][c] for c in range(3)]
    x, maps = network.stem(torch.stack(channels, dim=1)), []
    for group in (network.group1, network.group2, network.group3):
        maps.append(x := group(x))
    logits = network.fc(torch.relu(network.norm(x)).mean((2, 3)))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), seen, retain_graph=True)
    return logits.detach(), [each.detach() for each in maps], gradient


def naive_terms(model, location, images, targets):
    """Every term of a batch in float64."""
    ours = looked_at(model.backbone.double(), images.double(), model.backbone.pretrained_cfg, targets)
    mirrored = looked_at(model.backbone, images.double().flip(3), model.backbone.pretrained_cfg, targets)
    theirs = looked_at(load_backbone(location).double(), images.double(), OWN, targets)
    p, q = (theirs[0] / 3).softmax(1), (ours[0] / 3).softmax(1)
    attention = [[each.square().sum(1).flatten(1) for each in maps] for maps in (ours[1], theirs[1])]
    attention = [[each / each.norm(dim=1, keepdim=True) for each in maps] for maps in attention]
    regressed = [regress.double()(each) for regress, each in zip(model.regressors, ours[1], strict=False)]
    return {
        "ce": F.cross_entropy(ours[0], targets),
        "kd": 9 * (p * (p / q).log()).sum(1).mean(),
        "at": sum((s - t).square().mean() for s, t in zip(*attention, strict=True)),
        "hint": sum((s - t).square().mean() for s, t in zip(regressed, theirs[1], strict=False)),
        "gradient": (ours[2] - theirs[2]).square().sum((1, 2, 3)).mean(),
        "symmetry": (ours[2] - mirrored[2].flip(3)).square().sum((1, 2, 3)).mean(),
        "gradient_penalty": ours[2].square().sum((1, 2, 3)).mean(),
    }


@pytest.mark.parametrize("chosen", [*([name] for name in OPTIONS), ["kd", "at"], list(OPTIONS)], ids="+".join)
def test_the_loss_is_the_weighted_sum_of_the_chosen_terms(chosen, teacher):
    options = {key: value for name in chosen for key, value in OPTIONS[name].items()}
    given = teacher if set(chosen) & set(NEED_TEACHER) else None
    model, (images, targets) = built(given, ce_weight=0.1, **options), batch()
    losses = model.losses((images, targets))
    logits = model.backbone(model.normalize(images))
    naive = naive_terms(model, teacher, images, targets)
    weights = {"ce": 0.1, **{name: OPTIONS[name][f"{name}_weight"] for name in chosen}}
    assert losses.keys() == {"loss", "error", *(f"loss_{name}" for name in weights)}  # and no term of weight 0
    for name in weights:
        assert losses[f"loss_{name}"].item() == pytest.approx(naive[name].item(), rel=1e-3), name
    total = np.dot(list(weights.values()), [naive[name].item() for name in weights])
    assert losses["loss"].item() == pytest.approx(total, rel=1e-3)
    assert losses["error"].item() == pytest.approx((logits.argmax(1) != targets).double().mean().item())


def test_each_network_sees_images_its_own_way(teacher, tmp_path):
    """The same weights, handed over with other statistics, are another teacher."""
    images, targets = batch()
    plain = hand_over(tmp_path / "plain", cfg={"mean": (0.0,) * 3, "std": (1.0,) * 3}, depth=10, width=2)
    assert read_source(plain).sha256 == read_source(teacher).sha256
    values = [built(each, at_weight=1.0).losses((images, targets))["loss_at"].item() for each in (teacher, plain)]
    assert abs(values[0] - values[1]) > 1e-3 * values[0]
    changed = (images * torch.tensor(OWN["std"]).view(3, 1, 1)) + torch.tensor(OWN["mean"]).view(3, 1, 1)
    one, other = built(teacher, at_weight=1.0).teacher, built(plain, at_weight=1.0).teacher
    torch.testing.assert_close(one(changed)[0], other(images)[0])


def test_options_reach_the_losses(teacher):
    images, targets = batch()
    base = {"at_weight": 1.0, "kd_weight": 1.0, "hint_weight": 1.0}
    values = built(teacher, **base).losses((images, targets))
    for options, name in [
        ({"at_power": 4.0}, "at"), ({"at_reduce": "max"}, "at"), ({"at_form": "paper"}, "at"),
        ({"temperature": 1.0}, "kd"), ({"kd_form": "legacy"}, "kd"), ({"hint_normalize": True}, "hint"),
    ]:  # fmt: skip
        changed = built(teacher, **base, **options).losses((images, targets))
        different = [key for key in ("at", "kd", "hint") if changed[f"loss_{key}"] != values[f"loss_{key}"]]
        assert different == [name], options


def test_pairs_of_the_same_depth_and_of_different_sizes(teacher):
    images, targets = batch(height=18, width=13)
    blocks = [["group1.0", "group1.0"], ["group2.0", "group2.0"]]
    assert built(teacher, at_weight=1.0, pairs=blocks).losses((images, targets))["loss_at"] > 0
    model = built(teacher, at_weight=1.0, pairs=[["group2", "group1"]])  # 9 x 7 cells of 18 x 13
    ours = looked_at(model.backbone, images, model.backbone.pretrained_cfg, targets)[1][1].square().mean(1)
    theirs = looked_at(model.teacher.network, images, OWN, targets)[1][0].square().mean(1)
    theirs = F.adaptive_avg_pool2d(theirs, (9, 7))
    expected = [F.normalize(each.flatten(1)) for each in (ours, theirs)]
    torch.testing.assert_close(
        model.losses((images, targets))["loss_at"], (expected[0] - expected[1]).square().mean(), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_every_term_teaches_the_student_and_nobody_else(name, teacher):
    model = built(teacher if name in NEED_TEACHER else None, ce_weight=0.0, **OPTIONS[name]).train()
    model.losses(batch())["loss"].backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.backbone.stem.parameters())
    if model.teacher is not None:
        assert all(parameter.grad is None for parameter in model.teacher.network.parameters())
        assert all(not module.training for module in model.teacher.network.modules())


# --------------------------------------------------------------------------------------------------------- the teacher


def test_the_teacher_stays_bit_identical_and_out_of_everything(teacher, tmp_path):
    model = task(teacher, **ALL, optimizer=Optimizer("adamw", 0.01, weight_decay=0.1))
    modes, before = set(), state(load_backbone(teacher))
    path = tmp_path / "last.ckpt"

    class Watch(EMAWeightAveraging):
        def on_train_batch_end(self, runner, module, *args):
            super().on_train_batch_end(runner, module, *args)
            theirs = {id(parameter) for parameter in module.teacher.network.parameters()}
            assert theirs.isdisjoint(id(p) for group in runner.optimizers[0].param_groups for p in group["params"])
            assert theirs.isdisjoint(map(id, module.parameters()))
            modes.update(part.training for part in module.teacher.network.modules())

    runner = trainer(2, callbacks=[Watch(decay=0.5)])
    runner.fit(model, datamodule=Arrays(16, val=8))
    runner.save_checkpoint(path)
    assert modes == {False}
    assert same(before, state(model.teacher.network))
    saved = torch.load(path, weights_only=True)
    own = {f"backbone.{name}" for name in model.backbone.state_dict()}
    own |= {f"regressors.{index}.{kind}" for index in range(3) for kind in ("weight", "bias")}
    assert saved["state_dict"].keys() == own
    assert saved["hyper_parameters"]["teacher"] is None
    assert saved["baton"]["teacher"]["sha256"] == read_source(teacher).sha256


def test_evaluating_predicting_and_loading_need_no_teacher(teacher, tmp_path, monkeypatch):
    for one in (Task, Distillation):  # Lightning looks for arguments in frames, where jaxtyping stands
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    model = task(teacher, **ALL, start_epoch={"kd": 2}, final={"at": 0.0})
    path = checkpoint(model, tmp_path / "s.ckpt", epochs=2)
    shutil.rmtree(teacher)
    loaded = Distillation.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(state(loaded), state(model))
    data = Arrays(16, val=8, test=11)
    for one in (loaded, model):
        trainer().test(one, data, verbose=False)
    assert loaded.latest["test/error"] == model.latest["test/error"]
    loaded.eval()
    images, targets = data.test_set.__getitems__(range(11))
    logits = loaded.backbone(loaded.normalize(images.float() / 255))
    assert loaded.latest["test/loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    predicted = loaded.predict((images.float() / 255, targets))
    torch.testing.assert_close(predicted["probability"], logits.softmax(1).amax(1))
    assert torch.equal(predicted["prediction"], logits.argmax(1))
    with pytest.raises(ValueError, match="There is no teacher to learn from"):
        loaded.losses(batch())
    runner = trainer(3)
    with pytest.raises(FileNotFoundError, match="There is no"):  # its recorded source
        runner.fit(loaded, datamodule=Arrays(16, val=8), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("through", ["a new task", "the loaded task"])
def test_resuming_brings_back_the_same_teacher_or_refuses(through, teacher, tmp_path, monkeypatch):
    for one in (Task, Distillation):
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    whole = task(teacher, **ALL)
    fit(whole, Arrays(16, val=8), 2)
    half = trainer(2, max_steps=2)
    half.fit(task(teacher, **ALL), datamodule=Arrays(16, val=8))
    half.save_checkpoint(tmp_path / "h.ckpt")

    def go_on():
        model = task(teacher, **ALL)
        if through == "the loaded task":
            model = Distillation.load_from_checkpoint(tmp_path / "h.ckpt", map_location="cpu", weights_only=True)
        fit(model, Arrays(16, val=8), 2, ckpt_path=tmp_path / "h.ckpt")
        return model

    assert same(state(go_on()), state(whole))
    hand_over(Path(teacher), cfg=OWN, seed=8, depth=10, width=2)
    with pytest.raises(ValueError, match="is not the one this run began with"):
        go_on()


def test_a_teacher_that_does_not_fit_is_refused_before_training(teacher, tmp_path):
    def refused(message, model, data=None):
        with pytest.raises(ValueError, match=message):
            fit(model, data or Arrays(16))
        assert model.trainer.global_step == 0

    refused(r"model\.teacher is missing", task(kd_weight=1.0))
    data = Arrays(16, num_classes=5)
    refused("has 3 classes, the student has 5", task(teacher, kd_weight=1.0, num_classes=None), data)
    refused("has 3 classes, the student has 5", task(teacher, gradient_weight=1.0, num_classes=None), data)
    fit(task(teacher, at_weight=1.0, num_classes=None), Arrays(16, num_classes=5))  # its class scores are not looked at
    other = hand_over(tmp_path / "named", classes=["class 1", "class 0", "class 2"], depth=10, width=1)
    refused("knows the classes class 1, class 0, class 2, the data have class 0", task(other, kd_weight=1.0))
    refused(
        r"teacher \(WideResNet\) has no module 'group4'; the nearest are",
        task(teacher, at_weight=1.0, pairs=[["group1", "group4"]]),
    )
    refused("student's module 'fc' returns a Tensor", task(teacher, hint_weight=1.0, pairs=[["fc", "group1"]]))
    resnet = hand_over(tmp_path / "resnet", "test_resnet")
    refused("student has 3 groups of layers .* the teacher has 4", task(resnet, at_weight=1.0))
    headless = hand_over(tmp_path / "headless", classes=0, depth=10, width=1)
    refused("has no classifier", task(headless, at_weight=1.0))
    refused(
        "begin in epoch 9, but training ends after 1", task(teacher, at_weight=1.0, start_epoch={"at": 9}), Arrays(16)
    )


def test_options_that_make_no_sense_are_refused(teacher):
    for options, message in [
        ({"teacher": teacher}, r"model\.teacher is given, but no term looks at it: set model\.kd_weight"),
        ({"teacher": teacher, "symmetry_weight": 1.0}, "no term looks at it"),
        ({"teacher": teacher, "gradient_weight": 1.0, "compile": True}, "without second derivatives"),
        ({"teacher": teacher, "kd_weight": 1.0, "temperature": 0.0}, r"temperature must be above 0 .* but got 0\.0"),
        ({"teacher": teacher, "at_weight": 1.0, "at_power": 0.5}, r"at_power at least 1, but got 4\.0 and 0\.5"),
        ({"ce_weight": 0.0}, "All weights are 0"),
        ({"final": {"at": 0.0}}, r"schedules 'at', whose weight is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            task(**options)


# ------------------------------------------------------------------------------------------------------------- training


def test_terms_begin_and_fade_while_training(teacher):
    model = task(teacher, ce_weight=0.5, kd_weight=2.0, at_weight=1000.0, start_epoch={"at": 2}, final={"kd": 0.0})
    asked = []
    rows = fit(model, Arrays(16, batch_size=4), 3, log_every_n_steps=1)
    for step, row in rows.rows:
        asked.append("train/loss_at" in row)
        expected = 0.5 * row["train/loss_ce"] + 2 * (1 - (step - 1) / 12) * row["train/loss_kd"]
        expected += 1000 * row.get("train/loss_at", 0)
        assert row["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert asked == [False] * 4 + [True] * 8


def test_nobody_asks_a_teacher_before_its_terms_begin(teacher):
    model, calls = task(teacher, kd_weight=1.0, start_epoch={"kd": 2}), []
    model.configure_model()
    model.teacher.network.register_forward_hook(lambda *args: calls.append(model.current_epoch))
    fit(model, Arrays(16, batch_size=8, val=8), 3)
    assert calls == [1, 1, 2, 2]


def test_fitnets_are_two_runs(tmp_path, monkeypatch):
    """The first trains the student up to the hint, and the second starts from it."""
    for one in (Task, Distillation):
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    location = hand_over(tmp_path / "teacher", depth=10, width=2)
    first = task(location, ce_weight=0.0, hint_weight=1.0, pairs=[["group2", "group2"]])
    first.configure_model()
    before = state(first)
    path = checkpoint(first, tmp_path / "1.ckpt", epochs=3)
    after = dict(first.named_parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("backbone.")} == {"stem", "group1", "group2"}
    assert {"regressors.0.weight", "regressors.0.bias"} < moved
    second = Distillation(teacher=location, init_from=path, kd_weight=4.0, final={"kd": 0.25}, temperature=3.0)
    trunk = {name: value for name, value in state(first.backbone).items() if not name.startswith("fc.")}
    assert same(trunk, state(second.backbone))
    rows = fit(second, Arrays(16, val=8), 1)
    assert {"val/error", "val/accuracy"} <= set(rows.rows[-1][1])
    assert not len(second.regressors)
    assert second.parent["sha256"] == read_source(path).sha256
    assert second.parent["teacher"]["sha256"] == second.taught_by["sha256"] == read_source(location).sha256


def test_a_student_is_handed_over_and_fine_tuned(teacher, tmp_path):
    """It leaves with its own classifier alone, and says who taught it; regressors and teacher stay behind."""
    student = task(teacher, kd_weight=1.0, hint_weight=1.0)
    fit(student, Arrays(16))
    kwargs = {"backbone_kwargs": WRN["backbone_kwargs"], "config": {}, "metrics": {}}
    write_model(tmp_path / "student", student.backbone, parent=student.parent, teacher=student.taught_by, **kwargs)
    source = read_source(tmp_path / "student")
    assert len(student.regressors) == 3
    assert same(source.tensors, state(student.backbone))
    assert source.record["teacher"] == {"source": teacher, "sha256": read_source(teacher).sha256, "parent": None}
    tuned = Classification(init_from=str(tmp_path / "student"), optimizer=Optimizer("momentum", 0.02))
    trunk = {name: value for name, value in source.tensors.items() if not name.startswith("fc.")}
    assert same(trunk, {name: value for name, value in state(tuned.backbone).items() if not name.startswith("fc.")})
    rows = fit(tuned, Arrays(16, val=8), 1)
    assert "val/error" in rows.rows[-1][1]
    assert tuned.parent == {**source.lineage(), "teacher": source.record["teacher"]}
    assert tuned.taught_by is None


def test_a_student_learns_what_its_teacher_says(teacher):
    """Of a random teacher whose answers no label gives away."""
    model = task(teacher, ce_weight=0.0, kd_weight=1.0, at_weight=1000.0, optimizer=Optimizer("adamw", 0.02))
    rows = fit(model, small(32), 12, log_every_n_steps=4)
    for name in ("train/loss_kd", "train/loss_at"):
        values = rows.column(name)
        assert values[-1] < 0.7 * values[0], name


def test_channels_last_and_bf16_teach_the_same(teacher):
    def losses(precision="32-true", **options):
        model = task(teacher, kd_weight=1.0, at_weight=10.0, hint_weight=0.1, **options)
        rows = fit(model, small(16, val=8), 2, log_every_n_steps=1, precision=precision)
        return model, rows.column("train/loss")

    _, plain = losses()
    model, last = losses(channels_last=True)
    assert model.teacher.network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == pytest.approx(plain, rel=1e-3)
    _, half = losses("bf16-mixed")
    assert half == pytest.approx(plain, rel=0.1)
    assert half != plain


@pytest.mark.parametrize("cache", [False, True])
def test_the_teacher_runs_in_half_precision_where_the_student_does(cache, teacher):
    model, seen = task(teacher, kd_weight=1.0, at_weight=10.0, hint_weight=0.1, cache_teacher=cache), []
    watch(model, seen)
    fit(model, small(16), 1, precision="bf16-mixed")
    assert set(seen) == {(True, torch.bfloat16, False)}
    model, seen = task(teacher, gradient_weight=0.1), []
    watch(model, seen)
    fit(model, small(16), 1, precision="bf16-mixed")
    assert set(seen) == {(True, torch.bfloat16, True)}  # towards the images
    assert {value.dtype for value in model.teacher.network.parameters()} == {torch.float32}
    assert all(value.grad is None for value in model.teacher.network.parameters())


def watch(model, seen):
    """Note how the teacher runs: under autocast, in which precision, with gradients."""
    model.configure_model()
    model.teacher.network.register_forward_hook(
        lambda network, given, output: seen.append(
            (torch.is_autocast_enabled("cpu"), output.dtype, torch.is_grad_enabled() and output.requires_grad)
        )
    )


# ----------------------------------------------------------------------------------------------------------- the cache


KEPT = {**OPTIONS["kd"], **OPTIONS["at"], **OPTIONS["hint"]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_teacher_that_is_cached_teaches_the_same_and_looks_once(precision, teacher):
    states, counts = [], []
    for cache in (False, True):
        model, seen = task(teacher, **KEPT, **OPTIONS["symmetry"], cache_teacher=cache), []
        model.configure_model()
        model.teacher.network.register_forward_hook(lambda *args, seen=seen: seen.append(len(args[2])))
        fit(model, small(22, val=8), 3, precision=precision)
        states.append(state(model))
        counts.append(seen)
    assert counts == [[8, 8, 6] * 3, [8, 8, 6]]
    assert same(*states)
    assert model._cache is None  # its memory is free again


def test_images_that_come_late_are_asked_about_alone(teacher):
    """Of a batch that is dropped in the first epoch, and after a resumption."""
    data, seen = {"train": 22, "batch_size": 8, "drop_last": True}, []
    plain, cached = task(teacher, **KEPT), task(teacher, **KEPT, cache_teacher=True)
    cached.configure_model()
    cached.teacher.network.register_forward_hook(lambda *args: seen.append(len(args[2])))
    fit(plain, small(**data), 4)
    fit(cached, small(**data), 4)
    assert seen[:2] == [8, 8]
    assert sum(seen) <= 22
    close(state(plain), state(cached))


@pytest.mark.parametrize("steps", [2, 3])  # of three in an epoch
def test_a_resumed_run_fills_its_cache_again(steps, teacher, tmp_path):
    half = trainer(3, max_steps=steps)
    half.fit(task(teacher, **KEPT, cache_teacher=True), datamodule=small(22))
    half.save_checkpoint(tmp_path / "h.ckpt")
    models, seen = [task(teacher, **KEPT, cache_teacher=cache) for cache in (True, False)], []
    models[0].configure_model()
    models[0].teacher.network.register_forward_hook(lambda *args: seen.append(len(args[2])))
    for model in models:
        fit(model, small(22), 3, ckpt_path=tmp_path / "h.ckpt")
    assert sum(seen) == 22
    close(*map(state, models))


def test_other_data_have_a_cache_of_their_own(teacher):
    cached, plain = task(teacher, **KEPT, cache_teacher=True), task(teacher, **KEPT)
    for model in (cached, plain):
        for count in (16, 24):
            fit(model, small(count), 2)
    close(state(cached), state(plain))


def test_a_term_that_begins_later_finds_its_answers(teacher):
    models = [task(teacher, **KEPT, start_epoch={"at": 2, "hint": 3}, cache_teacher=cache) for cache in (False, True)]
    for model in models:
        fit(model, small(16), 3)
    assert same(*map(state, models))


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_cached_is_refused(teacher):
    for data, named in [({"flip": True}, "data.flip=true"), ({"crop_padding": 2}, "data.crop_padding=2")]:
        with pytest.raises(
            ValueError, match=rf"model\.cache_teacher needs the same images .* but {named} would vary them"
        ):
            fit(task(teacher, **KEPT, cache_teacher=True), Arrays(16, **data))
    with pytest.raises(ValueError, match=r"not the input gradient that model\.gradient_weight compares"):
        task(teacher, **KEPT, gradient_weight=1.0, cache_teacher=True)
    with pytest.raises(ValueError, match=r"model\.cache_teacher keeps .* no term listens"):
        task(cache_teacher=True)


@pytest.mark.slow
def test_compiled_networks_teach_the_same(teacher, monkeypatch):
    compiled, original = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or original(function))
    losses = {}
    for compile_it in (False, True):
        model = task(teacher, kd_weight=1.0, at_weight=10.0, hint_weight=0.1, compile=compile_it)
        losses[compile_it] = fit(model, Arrays(16, val=8), 1, log_every_n_steps=1).column("train/loss")
    assert compiled == ["forward_features", "forward_intermediates"] * 2
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_pictures_show_every_pair(teacher):
    model = built(teacher, at_weight=1.0, pairs=[["group1", "group1"], ["group3", "group2"]])
    picture = model.pictures(batch())["attention"]
    assert picture.shape[0] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    assert built(teacher, kd_weight=1.0).pictures(batch()) == {}  # no maps are compared
    assert built(symmetry_weight=1.0).pictures(batch()) == {}


def test_pictures_show_where_the_student_looked_before_it_was_trained(teacher, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        distillation, "draw_attention", lambda images, rows: drawn.append((images, rows)) or torch.zeros(3, 4, 4)
    )
    options = {"at_weight": 1000.0, "pairs": [["group1", "group1"], ["group3", "group2"]]}

    def run(epochs, **kwargs):
        model, data = task(teacher, **options), Arrays(16, val=20)
        runner = trainer(epochs, callbacks=[Pictures(folder=str(tmp_path))])
        runner.fit(model, datamodule=data, weights_only=True, **kwargs)
        return runner, data

    runner, data = run(1)
    runner.save_checkpoint(tmp_path / "1.ckpt")
    run(3, ckpt_path=tmp_path / "1.ckpt")
    assert len(drawn) == 3
    images, first = drawn[0]
    assert list(first) == [
        *("student before\ngroup1", "student\ngroup1", "teacher\ngroup1"),
        *("student before\ngroup3", "student\ngroup3", "teacher\ngroup2"),
    ]
    assert torch.equal(images, data.to_float(data.examples(8)))
    untrained = built(teacher, **options)
    _, features = untrained.student(untrained.normalize(images))
    for index, path in enumerate(("group1", "group3")):
        before = attention_map(features[index]).view(8, *features[index].shape[2:])
        for again, rows in drawn:
            assert torch.equal(again, images)
            torch.testing.assert_close(rows[f"student before\n{path}"], before)
            assert torch.equal(rows[f"teacher\n{path}"], first[f"teacher\n{path}"]) if path == "group1" else True
        assert not torch.allclose(drawn[2][1][f"student\n{path}"], before, rtol=1e-3)


def test_without_a_validation_split_training_images_are_shown(teacher):
    model, data = task(teacher, at_weight=1.0), Arrays(16)
    fit(model, data)
    assert torch.equal(model._before.images, data.train_set.images[::2])
