"""A run killed at any moment and continued ends exactly where an undisturbed one ends."""

import functools
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from baton import cli, run
from baton.data import Shapes
from baton.task import Task
from tiny import hand_over

TASKS = {
    "denoising": ["--model", "Denoising", "--model.noise=gaussian"],
    "classification": ["--model", "Classification", "--model.head_drop_rate=0.5", "--model.head_only_steps=3"],
    "autoresolution": [
        "--model", "Autoresolution", "--model.super_patch=12", "--model.low_resolution_factor=2",
        "--model.patch_backbone=autoresolution_patch_rf9", "--model.patch_backbone_kwargs={width: 0.1}",
    ],
    "reconstruction": [
        "--model", "Reconstruction", "--model.backbone=nin", "--model.backbone_kwargs={width: 0.1, drop_rate: 0.3}",
        "--model.classification_weight=1",
    ],
    "split_brain": [
        "--model", "SplitBrain", "--model.backbone=split_brain", "--model.size=4",
        "--model.backbone_kwargs={base: wide_resnet, base_kwargs: {depth: 10, width: 1, drop_rate: 0.3}}",
    ],
    "linear_probes": ["--model", "LinearProbes", "--model.max_features=600"],
    "segmentation": [
        "--model", "Segmentation", "--model.class_weights=inverse_frequency", "--model.backbone=njet_unet",
        "--model.backbone_kwargs={width: 4, drop_rate: 0.3, norm: true}",
    ],
    "distillation": [  # TEACHER stands for a folder
        "--model", "Distillation", "--model.teacher=TEACHER", "--model.kd_weight=0.9", "--model.at_weight=100",
        "--model.hint_weight=0.1", "--model.gradient_penalty_weight=0.001", "--model.start_epoch={hint: 2}",
        "--model.final={at: 0.0}",
    ],
}  # fmt: skip

DATA = {"segmentation": "ShapesMasks"}


@pytest.fixture(scope="module", autouse=True)
def _path():
    """The server that children are forked from knows the environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


@pytest.fixture(scope="module", autouse=True)
def _teacher(tmp_path_factory):
    folder = hand_over(tmp_path_factory.mktemp("teacher"), classes=Shapes().num_classes, depth=10, width=2)
    TASKS["distillation"] = [option.replace("TEACHER", folder) for option in TASKS["distillation"]]


def command(task: str, root: Path, *more: str) -> list[str]:
    return [
        "fit", "--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1, drop_rate: 0.3}",
        *TASKS[task],
        "--model.optimizer.lr=0.05", "--model.lr_scheduler={name: cosine, warmup_epochs: 1.0}",
        f"--data={DATA.get(task, 'Shapes')}",
        "--data.size=16", "--data.length=60", "--data.val_length=12", "--data.test_length=12",
        "--data.batch_size=8",
        "--trainer.max_epochs=3", "--trainer.log_every_n_steps=3", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.9",
        "--trainer.callbacks+=OnlineKNN",
        f"--run.root={root}", "--run.name=r", "--run.test=true", "--run.wandb=false", "--run.checkpoint_every=3",
        *more,
    ]  # fmt: skip


def in_child(argv: list[str], kill_at: tuple[str, int] | None = None) -> int:
    """Run the command in a process of its own, which kills itself before the n-th call of a function."""
    context = multiprocessing.get_context("forkserver")  # warm, and without the threads that other tests leave behind
    context.set_forkserver_preload(["warm"])
    child = context.Process(target=_body, args=(argv, kill_at))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _body(argv: list[str], kill_at: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    if kill_at is not None:
        _kill_before(*kill_at)
    os._exit(cli.main(argv))


def _kill_before(name: str, count: int) -> None:
    owner, attribute = (run, name) if hasattr(run, name) else (Task, name)
    original, calls = getattr(owner, attribute), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, counting)


def outcome(root: Path) -> tuple[str, dict, str]:
    record = json.loads((root / "r/model/config.json").read_text())["baton"]
    return record["sha256"], record["metrics"], (root / "r/metrics.csv").read_text()


MOMENTS = [
    ("training_step", 1), ("training_step", 5), ("training_step", 8), ("training_step", 9), ("training_step", 14),
    ("training_step", 22), ("validation_step", 1), ("validation_step", 4), ("on_validation_epoch_end", 2),
    ("replace_file", 4), ("replace_file", 9), ("replace_file", 13), ("on_save_checkpoint", 6), ("test_step", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed run of a task ends with; run once."""

    @functools.cache
    def run_once(task: str) -> tuple[str, dict, str]:
        root = tmp_path_factory.mktemp(task)
        assert in_child(command(task, root)) == 0
        return outcome(root)

    return run_once


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]}_{moment[1]}")
@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task == "denoising" else pytest.mark.slow) for task in TASKS]
)
def test_a_killed_run_ends_as_an_undisturbed_one(task: str, moment: tuple[str, int], undisturbed, tmp_path) -> None:
    assert in_child(command(task, tmp_path, "--run.resume=true"), moment) == -signal.SIGKILL
    assert in_child(command(task, tmp_path, "--run.resume=true")) == 0
    assert outcome(tmp_path) == undisturbed(task)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "denoising"])
def test_a_run_killed_in_an_epoch_in_validation_and_between_files(task: str, undisturbed, tmp_path) -> None:
    """The machinery is that of denoising, of which every moment is tried; what a task keeps is its own."""
    for moment in [("training_step", 5), ("validation_step", 2), ("replace_file", 4)]:
        assert in_child(command(task, tmp_path, "--run.resume=true"), moment) == -signal.SIGKILL
    assert in_child(command(task, tmp_path, "--run.resume=true")) == 0
    assert outcome(tmp_path) == undisturbed(task)


def test_one_run_killed_again_and_again(tmp_path: Path) -> None:
    assert in_child(command("denoising", tmp_path / "whole")) == 0
    for moment in [("training_step", 4)] * 4 + [("on_validation_epoch_end", 1), ("training_step", 2), ("test_step", 1)]:
        in_child(command("denoising", tmp_path / "broken", "--run.resume=true"), moment)
    assert in_child(command("denoising", tmp_path / "broken", "--run.resume=true")) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
