"""One contract for every task: it trains, hands over its backbone bit by bit, and every task can go on from there."""

import functools
import inspect
import itertools
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import baton.distill
import baton.ssl_tasks
import baton.supervised
from baton import cli
from baton.handover import read_source
from baton.task import Task
from tiny import same, state

FAMILIES = (baton.ssl_tasks, baton.supervised, baton.distill)
TASKS = {
    name: cls
    for family in FAMILIES
    for name, cls in vars(family).items()
    if inspect.isclass(cls) and issubclass(cls, Task) and cls is not Task
}
#: What a task needs beyond a backbone; `{Classification}` is the folder of that task's run.
NEEDS: dict[str, list[str]] = {
    "Autoresolution": [
        "--model.patch_backbone=autoresolution_patch_rf9", "--model.patch_backbone_kwargs={{width: 0.2}}",
        "--model.super_patch=12", "--model.low_resolution_factor=2", "--model.head_width=8",
    ],
    "Distillation": ["--model.teacher={Classification}", "--model.kd_weight=0.9", "--model.ce_weight=0.1"],
    "SplitBrain": ["--model.space=lab", "--model.bins=[10, 4]", "--model.size=4"],
}  # fmt: skip
#: Data of tasks that need more than images.
DATA = {"Segmentation": "ShapesMasks"}
KWARGS = {"depth": 10, "width": 1, "drop_rate": 0.1}
#: Every pair of tasks hands over one of these; only some tasks need a pair of networks.
BACKBONES = {
    "wide_resnet": KWARGS,
    "split_brain": {"base": "wide_resnet", "base_kwargs": KWARGS, "space": "lab"},
    "nin": {"width": 0.1},
}
#: Tasks that need a certain kind of network: a pair, or a plain row of layers; no network is both.
NEEDS_BACKBONE = {"SplitBrain": "split_brain", "Reconstruction": "nin"}
PAIRS = [
    (first, second)
    for first, second in itertools.product(TASKS, TASKS)
    if len({NEEDS_BACKBONE[name] for name in (first, second) if name in NEEDS_BACKBONE}) < 2
]


def test_there_are_tasks_and_all_are_final():
    assert {"Denoising", "Classification"} <= TASKS.keys()
    for one, other in itertools.permutations(TASKS.values(), 2):
        assert not issubclass(one, other)
    assert {cls for cls in _below(Task) if cls.__module__.startswith("baton.")} == set(TASKS.values())


def _below(cls):
    return set(cls.__subclasses__()).union(*(map(_below, cls.__subclasses__())))


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """The folder of a task's run: one epoch on tiny images, through the command."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, backbone: str = "") -> Path:
        return made(name, backbone or backbone_of(name))

    @functools.cache
    def made(name: str, backbone: str) -> Path:
        chosen = [f"--model.backbone={backbone}", f"--model.backbone_kwargs={BACKBONES[backbone]}"]
        needs = [option.format_map(_Runs(run)) for option in NEEDS.get(name, [])]
        assert cli.main([
            "fit", f"--model={name}", *chosen, *needs, "--model.optimizer.lr=0.01",
            f"--data={DATA.get(name, 'Shapes')}",
            "--data.size=16", "--data.length=20", "--data.val_length=9", "--data.test_length=9",
            "--data.batch_size=8", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
            f"--run.root={root}", f"--run.name={name}-{backbone}", "--run.wandb=false", "--run.test=true",
        ]) == 0  # fmt: skip
        return root / f"{name}-{backbone}"

    return run


def backbone_of(*names: str) -> str:
    return next((NEEDS_BACKBONE[name] for name in names if name in NEEDS_BACKBONE), "wide_resnet")


class _Runs(dict):
    def __init__(self, run):
        self.run = run

    def __missing__(self, name):
        return self.run(name)


def in_memory(run: Path) -> dict[str, torch.Tensor]:
    """The backbone as training left it, read from the checkpoint with torch alone."""
    tensors = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}


def test_a_student_names_its_teacher(run_of):
    taught = read_source(run_of("Distillation")).record["teacher"]
    teacher = run_of("Classification")
    assert taught == {"source": str(teacher), "sha256": read_source(teacher).sha256, "parent": None}
    assert "teacher" not in read_source(teacher).record


@pytest.mark.parametrize("name", TASKS)
def test_a_run_leaves_what_it_should(name, run_of):
    run = run_of(name)
    header, *rows = (run / "metrics.csv").read_text().splitlines()
    assert {"step", "epoch", "lr", "train/loss", "val/loss", "test/loss"} <= set(header.split(","))
    assert len(rows) >= 3
    record = read_source(run).record
    assert record["metrics"].keys() >= {"train/loss", "val/loss", "test/loss"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"].endswith(f".{name}")
    assert record["config"] == config
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("name", TASKS)
def test_the_handed_over_bytes_are_the_trained_ones(name, run_of):
    run = run_of(name)
    handed = load_file(run / "model/model.safetensors")
    assert same(handed, in_memory(run))
    theirs = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    assert same(handed, state(theirs))
    backbone = backbone_of(name)
    fresh = timm.create_model(backbone, **BACKBONES[backbone], num_classes=theirs.num_classes)
    assert not same(state(fresh), handed)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_task_goes_on_from_every_task(first, second, run_of, capsys):
    backbone = backbone_of(first, second)
    run = run_of(first, backbone)
    needs = [option.format_map(_Runs(run_of)) for option in NEEDS.get(second, [])]
    options = {key.removeprefix("--model."): yaml.safe_load(value) for key, value in (n.split("=", 1) for n in needs)}
    capsys.readouterr()
    task = TASKS[second](init_from=str(run), **options)
    before = in_memory(run)
    classifier = set(before) - set(state(task.backbone))
    assert classifier <= {"fc.weight", "fc.bias"}
    assert same({name: value for name, value in before.items() if name not in classifier}, state(task.backbone))
    count = len(before) - len(classifier)
    assert f"{count} of {count} tensors" in capsys.readouterr().out
    assert task.hparams["backbone"] == backbone
    assert task.hparams["backbone_kwargs"] == BACKBONES[backbone]
    assert task.parent["sha256"] == read_source(run).sha256


@pytest.mark.parametrize("name", TASKS)
def test_a_checkpoint_of_the_command_loads_without_it(name, run_of):
    path = run_of(name) / "checkpoints/last.ckpt"
    task = TASKS[name].load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert same(state(task), torch.load(path, weights_only=True)["state_dict"])
    assert task.optimizer.lr == 0.01


@pytest.mark.parametrize("name", TASKS)
def test_every_option_is_explained(name):
    documented = inspect.getdoc(TASKS[name])
    for option in inspect.signature(TASKS[name].__init__).parameters:
        if option != "self":
            assert f"    {option}: " in documented, option
