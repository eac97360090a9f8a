"""The optimiser claims to be the Wide ResNet code's, and the schedules to be what their formulas say."""

import copy
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from baton import cli, handover
from baton.backbones import create_backbone
from baton.optim import LRScheduler, Optimizer
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, random_set, same, state

WRN_CODE = LRScheduler(name="step", milestones=[60, 120, 160], factor=0.2, reset_momentum=True)
SGD = Optimizer("momentum", lr=0.1, weight_decay=5e-4, decay_all=True)


class Watch(Callback):
    """What the optimiser looks like right before every step: (lr of every group, momentum buffers there are)."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        buffers = sum("momentum_buffer" in entry for entry in optimizer.state.values())
        self.seen.append(([group["lr"] for group in optimizer.param_groups], buffers))


def lrs(watch):
    return [groups[0] for groups, _ in watch.seen]


def classification(optimizer=SGD, scheduler=None, **kwargs):
    torch.manual_seed(3)
    return Classification(num_classes=3, optimizer=optimizer, lr_scheduler=scheduler or LRScheduler(), **WRN | kwargs)


# ---------------------------------------------------------------------------------------------------- the WRN code


def test_wide_resnet_schedule_drops_inside_the_named_epoch():
    wanted = {1: 0.1, 59: 0.1, 60: 0.02, 61: 0.02, 119: 0.02, 120: 0.004, 159: 0.004, 160: 0.0008, 200: 0.0008}
    watch = Watch()
    task = classification(scheduler=WRN_CODE, backbone_kwargs={"depth": 10, "width": 1, "block": "B(3)"})
    task.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 3))  # only the schedule matters here
    task.build = lambda: None
    task.logits = lambda images: task.backbone(images)
    fit(task, Arrays(4, size=(2, 2), batch_size=2), 200, callbacks=[watch])
    parameters = len(list(task.parameters()))
    assert len(watch.seen) == 400
    for epoch in range(1, 201):
        (first, before), (second, after) = watch.seen[2 * epoch - 2 : 2 * epoch]
        assert first == second
        dropped = sum(epoch >= milestone for milestone in (60, 120, 160))
        assert first[0] == pytest.approx(0.1 * 0.2**dropped, rel=1e-12)
        if epoch in wanted:
            assert first[0] == pytest.approx(wanted[epoch], rel=1e-12)
        assert before == (0 if epoch in (1, 60, 120, 160) else parameters), epoch
        assert after == parameters


def test_training_is_a_hand_written_loop_bit_for_bit():
    epochs, milestones, count, batch = 6, (2, 5), 21, 8
    scheduler = LRScheduler(name="step", milestones=list(milestones), factor=0.2, reset_momentum=True)
    task = classification(scheduler=scheduler)
    task.configure_model()
    model = copy.deepcopy(task.backbone)
    rows = fit(task, Arrays(count, batch_size=batch, seed=7), epochs, log_every_n_steps=1)

    data = random_set(count, (16, 16), 3, 0)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    lr, losses = 0.1, []
    for epoch in range(1, epochs + 1):
        model.train()
        if epoch in milestones:
            lr *= 0.2
        if epoch == 1 or epoch in milestones:
            optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(7 + epoch - 1))
        for start in range(0, count, batch):
            chosen = order[start : start + batch]
            loss = F.cross_entropy(model((data.images[chosen].float() / 255 - mean) / std), data.targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert same(state(task.backbone), state(model))
    assert rows.column("train/loss") == losses


def test_sgd_has_plain_momentum_and_nesterov_by_name():
    net = nn.Linear(2, 2)
    plain, nesterov = (Optimizer(name, lr=0.1, momentum=0.8).build(net, net) for name in ("momentum", "sgd"))
    assert type(plain) is type(nesterov) is torch.optim.SGD
    assert [group["nesterov"] for group in plain.param_groups + nesterov.param_groups] == [False, False, True, True]
    assert {group["momentum"] for group in plain.param_groups} == {0.8}
    assert {group["dampening"] for group in plain.param_groups} == {0}


def test_a_run_resumed_within_an_epoch_of_a_drop_keeps_its_momentum(tmp_path):
    scheduler = LRScheduler(name="step", milestones=[2], factor=0.2, reset_momentum=True)

    def run(saver=None, **kwargs):
        torch.manual_seed(0)
        task = classification(scheduler=scheduler)
        fit(task, Arrays(24), 3, callbacks=saver, enable_checkpointing=saver is not None, **kwargs)
        return state(task)

    within = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    after = ModelCheckpoint(tmp_path / "epochs", filename="{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = run([within, after])
    for path in [tmp_path / name for name in ("epochs/step=3.ckpt", "step=4.ckpt", "step=5.ckpt")]:
        assert same(run(ckpt_path=path), whole), path


# ------------------------------------------------------------------------------------------------------------ groups


class Net(nn.Module):
    """A task with a backbone of timm's that leaves parameters out by name, and a head of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_vit", img_size=32, num_classes=0)
        self.decoder = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))


def by_name(module, optimizer):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_biases_norms_and_what_the_backbone_names_are_not_decayed(layer_decay):
    net = Net()
    assert net.backbone.no_weight_decay() >= {"pos_embed", "cls_token"}
    groups = by_name(net, Optimizer("adamw", 1e-3, 0.05, layer_decay=layer_decay).build(net, net.backbone))
    assert groups.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        left_out = parameter.ndim == 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert groups[name]["weight_decay"] == (0.0 if left_out else 0.05), name
    assert {0.0, 0.05} == {group["weight_decay"] for group in groups.values()}


def test_decay_all_decays_everything():
    net = Net()
    groups = by_name(net, Optimizer("momentum", 0.1, 5e-4, decay_all=True).build(net, net.backbone))
    assert groups.keys() == dict(net.named_parameters()).keys()
    assert {group["weight_decay"] for group in groups.values()} == {5e-4}


def test_frozen_parameters_are_absent():
    net = Net()
    net.backbone.requires_grad_(False)
    for layer_decay in (None, 0.7):
        optimizer = Optimizer("adamw", 1e-3, layer_decay=layer_decay).build(net, net.backbone)
        assert set(by_name(net, optimizer)) == {f"decoder.{name}" for name, _ in net.decoder.named_parameters()}


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_layer_decay_scales_the_learning_rate_as_timm_groups_it():
    net, decay = Net(), 0.7
    optimizer = Optimizer("momentum", lr=0.5, weight_decay=0.05, momentum=0.0, layer_decay=decay).build(
        net, net.backbone
    )
    groups = by_name(net, optimizer)
    theirs = timm.optim.param_groups_layer_decay(
        net.backbone, weight_decay=0.05, no_weight_decay_list=tuple(net.backbone.no_weight_decay()), layer_decay=decay
    )
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for group in theirs:
        for parameter in group["params"]:
            own = groups[names[id(parameter)]]
            assert own["lr"] == pytest.approx(0.5 * group["lr_scale"], rel=1e-12)
            assert own["weight_decay"] == group["weight_decay"]
    # In words: the stem is furthest away, each block is one layer (the last one with the final norm) and a decoder
    # learns at full speed.
    depth = len(net.backbone.blocks)
    assert groups["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(0.5 * decay**depth)
    assert groups["backbone.blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(0.5 * decay ** (depth - 1))
    assert groups["backbone.norm.weight"]["lr"] == pytest.approx(0.5)
    assert groups["decoder.0.weight"]["lr"] == 0.5

    before = state(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    scheduler = LRScheduler(name="exponential", factor=0.5).build(optimizer, lambda: (1.0, 9.0))["scheduler"]
    scheduler.step()  # what a schedule does keeps the ratios
    optimizer.step()
    for name, parameter in net.named_parameters():
        rate, wd = 0.25 * groups[name]["initial_lr"] / 0.5, groups[name]["weight_decay"]
        assert torch.allclose(before[name] - parameter, rate * (1 + wd * before[name]), atol=1e-6), name


def test_layer_decay_needs_groups():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer_decay needs a backbone with a group_matcher"):
        Optimizer(layer_decay=0.7).build(net, net)


# --------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("decay_all", [False, True])
def test_overrides_change_what_they_name_and_nothing_else(layer_decay, decay_all):
    net = Net()
    plain = Optimizer("adamw", 1e-3, 0.05, decay_all=decay_all, layer_decay=layer_decay)
    wanted = {
        "*.bias": {"lr_factor": 0.5, "weight_decay": 0.01},
        "blocks.0.*.bias": {"lr_factor": 3.0},  # on top of the first
        "decoder.0.weight": {"weight_decay": 0.0},
        "backbone.pos_embed": {"lr_factor": 0.1},
    }
    usual = by_name(net, plain.build(net, net.backbone))
    optimizer = dataclasses.replace(plain, overrides=wanted).build(net, net.backbone)
    groups = by_name(net, optimizer)
    assert groups.keys() == usual.keys() == dict(net.named_parameters()).keys()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    for name, group in groups.items():
        rate, decay = usual[name]["lr"], usual[name]["weight_decay"]
        if name.endswith(".bias"):
            rate, decay = rate * (3.0 if name.startswith("backbone.blocks.0.") else 0.5), 0.01
        decay = 0.0 if name == "decoder.0.weight" else decay
        rate *= 0.1 if name == "backbone.pos_embed" else 1.0
        assert group["lr"] == pytest.approx(rate, rel=1e-12), name
        assert group["weight_decay"] == decay, name
    assert len({id(group) for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_without_overrides_groups_are_what_they_were():
    """The order in which a checkpoint holds the optimiser's state: by group, in the order of the parameters."""
    net = Net()
    first, second = Optimizer("adamw", 1e-3, 0.05).build(net, net.backbone).param_groups
    skip = {"backbone.pos_embed", "backbone.cls_token"}
    parts = [], []
    for name, parameter in net.named_parameters():
        parts[parameter.ndim == 1 or name in skip].append(parameter)
    for group, part, decay in zip((first, second), parts, (0.05, 0.0), strict=True):
        assert all(a is b for a, b in zip(group["params"], part, strict=True))
        assert (group["lr"], group["weight_decay"]) == (1e-3, decay)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_schedules_keep_the_ratio_of_overridden_learning_rates():
    net = Net()
    optimizer = Optimizer("momentum", 0.4, overrides={"decoder.*": {"lr_factor": 0.25}}).build(net, net.backbone)
    schedule = LRScheduler(name="cosine", warmup_epochs=1).build(optimizer, lambda: (4.0, 3.0))["scheduler"]
    for _ in range(10):
        groups = by_name(net, optimizer)
        rates = groups["backbone.norm.weight"]["lr"], groups["decoder.0.weight"]["lr"]
        assert rates[1] == pytest.approx(0.25 * rates[0], rel=1e-12)
        schedule.step()


def test_any_name_of_a_shared_parameter_counts():
    net = Net()
    net.second = nn.Module()
    net.second.other = net.decoder[0].weight
    optimizer = Optimizer(overrides={"second.*": {"lr_factor": 0.0}}).build(net, net.backbone)
    (still,) = (group for group in optimizer.param_groups if group["lr"] == 0)
    assert still["params"][0] is net.decoder[0].weight
    assert len(still["params"]) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"*.log2_sigma": {"lr_factor": 0.1}},
            r"optimizer.overrides\['\*.log2_sigma'\] matches no parameter that learns; such are backbone\.",
        ),
        ({"decoder.0.wieght": {"lr_factor": 0.1}}, r"matches no parameter that learns; such are .*decoder.0.weight"),
        ({"backbone.norm.*": {"lr_factor": 0.1}}, r"'backbone.norm.\*'\] matches no parameter that learns"),
        ({"*": {"lr": 0.1}}, r"overrides\['\*'\] sets 'lr'; it can set lr_factor and weight_decay"),
        ({"*": {"lr_factor": -0.1}}, r"overrides\['\*'\] needs lr_factor of 0 or more, but has -0.1"),
    ],
)
def test_overrides_that_mean_nothing_are_one_sentence(overrides, message):
    net = Net()
    net.backbone.norm.requires_grad_(False)
    with pytest.raises(ValueError, match=message) as caught:
        Optimizer(overrides=overrides).build(net, net.backbone)
    assert "\n" not in str(caught.value)


def test_overrides_from_recipe_and_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe = {
        "data": {"class_path": "Shapes", "init_args": {"size": 16, "length": 8, "val_length": 8, "test_length": 8}},
        "model": {
            "class_path": "Classification",
            "init_args": {
                **WRN,
                "optimizer": {
                    "name": "momentum", "lr": 0.1, "weight_decay": 0.001, "decay_all": True,
                    "overrides": {"*.norms.*": {"lr_factor": 0.1, "weight_decay": 0}, "fc.bias": {"lr_factor": 2}},
                },
            },
        },
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
        "run": {"wandb": False},
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))

    def groups(name, *arguments):
        monkeypatch.setattr(sys, "argv", ["baton"])
        code = cli.main(["fit", "--config", "recipe.yaml", "--run.name", name, *arguments])
        if code:
            return code
        held = handover.load_checkpoint(Path("runs", name, "checkpoints/last.ckpt"))["optimizer_states"][0]
        return [(group["lr"], group["weight_decay"], len(group["params"])) for group in held["param_groups"]]

    count = len(list(create_backbone("wide_resnet", depth=10, width=1, num_classes=3).parameters()))
    norms = sum(
        1 for name, _ in create_backbone("wide_resnet", depth=10, width=1).named_parameters() if ".norms." in name
    )
    own = [(pytest.approx(0.01), 0, norms), (0.2, 0.001, 1)]
    assert groups("first") == [(0.1, 0.001, count - norms - 1), *own]
    second = groups("second", '--model.optimizer.overrides={"fc.*": {lr_factor: 0.5}}')
    assert second == [(0.1, 0.001, count - 2), (0.05, 0.001, 2)]
    assert groups("third", '--model.optimizer.overrides={"*.bn7.*": {lr_factor: 0.5}}') == 2
    assert "optimizer.overrides['*.bn7.*'] matches no parameter that learns" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ errors


def test_unknown_optimiser_and_option_are_one_sentence():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"optimizer.name='adamv' is not .*nearest: .*adam") as caught:
        Optimizer("adamv").build(net, net)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'adamw' does not take these options: .*beta1"):
        Optimizer("adamw", options={"beta1": 0.9}).build(net, net)
    with pytest.raises(ValueError, match="'sgd' does not take these options: Nesterov momentum requires a momentum"):
        Optimizer("sgd", momentum=0.0).build(net, net)
    assert tuple(Optimizer("adamw", options={"betas": [0.8, 0.9]}).build(net, net).defaults["betas"]) == (0.8, 0.9)


# --------------------------------------------------------------------------------------------------------- schedules


def test_values_of_the_schedules():
    cosine = LRScheduler(name="cosine", final=0.1, warmup_epochs=2.5)
    for epoch in [0.0, 1.0, 2.4]:
        assert cosine.multiplier(epoch, 12) == pytest.approx(epoch / 2.5)
    assert cosine.multiplier(2.5, 12) == 1.0
    for epoch in [3.0, 7.25, 11.99, 12.0]:
        naive = 0.1 + 0.9 * (1 + math.cos(math.pi * (epoch - 2.5) / 9.5)) / 2
        assert cosine.multiplier(epoch, 12) == pytest.approx(naive, abs=1e-12)
    assert cosine.multiplier(13, 12) == pytest.approx(0.1)
    poly = LRScheduler(name="poly", power=0.7, final=0.1, warmup_epochs=2.5)
    assert poly.multiplier(1.0, 12) == pytest.approx(1 / 2.5)
    for epoch in [2.5, 3.0, 7.25, 11.99, 12.0]:
        assert poly.multiplier(epoch, 12) == pytest.approx(0.1 + 0.9 * ((12 - epoch) / 9.5) ** 0.7, abs=1e-12)
    assert poly.multiplier(13, 12) == pytest.approx(0.1)
    rmsprop = LRScheduler(name="exponential", factor=0.94, every=2)
    assert [rmsprop.multiplier(epoch, 9) for epoch in range(6)] == pytest.approx(
        [1, 1, 0.94, 0.94, 0.94**2, 0.94**2], rel=1e-12
    )
    assert [LRScheduler().multiplier(epoch, 5) for epoch in range(5)] == [1.0] * 5
    optimizer = torch.optim.SGD(create_backbone("wrn_16_1").parameters(), 0.1)
    assert LRScheduler().build(optimizer, lambda: (1.0, 1.0)) is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warm_up_and_cosine_count_optimiser_steps(accumulate):
    epochs, batches = 3, 5
    steps = math.ceil(batches / accumulate)
    watch, schedule = Watch(), LRScheduler(name="cosine", warmup_epochs=1)
    fit(
        classification(scheduler=schedule), Arrays(batches * 4, batch_size=4), epochs,
        callbacks=[watch], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    for number, lr in enumerate(lrs(watch)):
        step = number // batches * steps + number % batches // accumulate
        epoch = step / steps
        naive = epoch if epoch < 1 else (1 + math.cos(math.pi * (epoch - 1) / (epochs - 1))) / 2
        assert lr == pytest.approx(0.1 * naive, abs=1e-12), number


def test_cosine_ends_where_max_steps_ends():
    watch = Watch()
    task = classification(scheduler=LRScheduler(name="cosine"))
    rows = fit(task, Arrays(20, batch_size=4), -1, max_steps=7, callbacks=[watch], log_every_n_steps=1)
    assert lrs(watch) == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 7)) for step in range(7)], abs=1e-12)
    assert rows.column("lr") == lrs(watch)


def test_poly_falls_at_every_step_as_deeplabs():
    steps, watch = 9, Watch()
    task = classification(scheduler=LRScheduler(name="poly"))
    fit(task, Arrays(20, batch_size=4), -1, max_steps=steps, callbacks=[watch])
    assert lrs(watch) == pytest.approx([0.1 * (1 - step / steps) ** 0.9 for step in range(steps)], abs=1e-12)


def test_poly_continues_where_it_was(tmp_path):
    def run(**kwargs):
        watch = Watch()
        task = classification(scheduler=LRScheduler(name="poly"))
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(task, Arrays(20, batch_size=4), 2, callbacks=[watch, saver], enable_checkpointing=True, **kwargs)
        return lrs(watch)

    whole = run()
    assert run(ckpt_path=tmp_path / "step=4.ckpt") == whole[4:]


def test_steps_count_epochs_also_with_accumulation():
    watch = Watch()
    schedule = LRScheduler(name="step", milestones=[2, 3], factor=0.5)
    fit(classification(scheduler=schedule), Arrays(12, batch_size=4), 3, callbacks=[watch], accumulate_grad_batches=2)
    assert lrs(watch) == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 3)


def test_rmsproptf_is_tensorflows_formula_with_the_settings_of_autoresolution():
    """TF: ms starts at one, ε = 1 lies inside the root, the learning rate inside the momentum."""
    recipe = Path(__file__).parents[1] / "configs/ssl_tasks/autoresolution_classification.yaml"
    settings = Optimizer(**yaml.safe_load(recipe.read_text())["model"]["init_args"]["optimizer"])
    assert (settings.name, settings.lr, settings.options) == ("rmsproptf", 0.003, {"alpha": 0.9, "eps": 1.0})
    layer = nn.Linear(5, 3, bias=False).double()
    optimizer = settings.build(layer, layer)
    weight = layer.weight.detach().clone()
    mean_square, momentum = torch.ones_like(weight), torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(0)
    for rate in (0.003, 0.003, 0.00282):
        optimizer.param_groups[0]["lr"] = rate
        layer.weight.grad = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 3
        gradient = layer.weight.grad + 4e-5 * weight
        mean_square = 0.9 * mean_square + 0.1 * gradient**2
        momentum = 0.9 * momentum + rate * gradient / (mean_square + 1.0).sqrt()
        weight = weight - momentum
        optimizer.step()
        assert torch.allclose(layer.weight, weight, atol=1e-12)
