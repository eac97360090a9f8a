"""Two processes do what one does: weights, metrics, one record, resumption, and they end together."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from baton.data import Shapes
from baton.handover import read_source
from tiny import hand_over

pytestmark = pytest.mark.slow

#: Every task without random draws; without batch norm, steps do not depend on who sees which sample.
TASKS = {
    "Classification": [],
    "Denoising": ["--model.noise=gaussian", "--model.amount=0"],
    # the super patch is the image, so that no place is drawn; see below for negatives
    "Autoresolution": [
        "--model.objective=regression", "--model.super_patch=32", "--model.low_resolution_factor=1",
        "--model.norm=false", "--model.patch_backbone=autoresolution_patch_rf9",
        "--model.patch_backbone_kwargs={norm: false, width: 0.2}", "--model.head_width=8",
    ],
    "Reconstruction": [
        "--model.backbone=nin", "--model.backbone_kwargs={norm: false, width: 0.1}", "--model.classification_weight=1",
    ],
    "SplitBrain": [
        "--model.backbone=split_brain", "--model.backbone_kwargs={base: test_vit, base_kwargs: {img_size: 32}}",
        "--model.bins=[10, 4]", "--model.size=4",
    ],
    "LinearProbes": ["--model.max_features=600"],
    "Segmentation": [
        "--model.class_weights=inverse_frequency", "--model.per_class=true", "--model.backbone=njet_unet",
        "--model.backbone_kwargs={norm: false, width: 4}",
    ],
    # every term at once; TEACHER stands for a folder
    "Distillation": [
        "--model.teacher=TEACHER", "--model.backbone=nin", "--model.backbone_kwargs={norm: false, width: 0.1}",
        "--model.kd_weight=0.9", "--model.at_weight=10", "--model.hint_weight=0.1", "--model.gradient_weight=0.01",
        "--model.symmetry_weight=0.01", "--model.gradient_penalty_weight=0.01", "--model.final={at: 0.0}",
    ],
}  # fmt: skip
DATA = {"Segmentation": "ShapesMasks"}
NORM_FREE = ["--model.backbone=test_vit", "--model.backbone_kwargs={img_size: 32}"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
UNUSED = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]
FAILING = """
import os
import lightning.pytorch as pl

class SecondFails(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            raise RuntimeError("the second process fails")

class SecondDies(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            os.kill(os.getpid(), 9)

class SecondDiverges(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            batch[0].mul_(float("nan"))
"""

DRAWING = """
import torch
import lightning.pytorch as pl

class Draw(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            print("drawn", trainer.global_rank, torch.rand(1).item(), flush=True)
"""


def argv(root: Path, *more: str, task: str = "Classification", name: str = "r") -> list[str]:
    return [
        sys.executable, "-m", "baton", "fit", f"--model={task}", "--model.optimizer={name: momentum, lr: 0.02}",
        f"--data={DATA.get(task, 'Shapes')}",
        "--data.size=32", "--data.length=32", "--data.val_length=21", "--data.test_length=13",
        "--data.crop_padding=0", "--data.flip=false",
        "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=3",
        "--trainer.enable_progress_bar=false",
        f"--run.root={root}", f"--run.name={name}", "--run.wandb=false", "--run.test=true", *more,
    ]  # fmt: skip


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """Both processes are of one session of their own, so that nothing of them can outlive a test."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment}
    for name in ("BATON_RUN_NAME", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    return subprocess.Popen(
        command, env=variables, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s:\n{output}")
    return process.returncode, output


def run(command: list[str], **environment: str) -> str:
    code, output = finish(start(command, **environment))
    assert code == 0, output
    return output


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Same tensors, same metrics, same rows, to float tolerance."""
    one, two = load_file(first / "model/model.safetensors"), load_file(second / "model/model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name].double() - two[name].double()).abs().max() < tolerance, name
    record = read_source(first).record["metrics"]
    assert read_source(second).record["metrics"] == pytest.approx(record, rel=1e-4)
    ours, theirs = rows(first), rows(second)
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert {name for name in row if row[name]} == {name for name in other if other[name]}
        for name, value in row.items():
            assert float(value or 0) == pytest.approx(float(other[name] or 0), rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a task's run as 1 x 8 and as 2 x 4, and what the latter printed."""

    @functools.cache
    def both(task: str) -> tuple[Path, Path, str]:
        root = tmp_path_factory.mktemp(task)
        teacher = hand_over(tmp_path_factory.mktemp("teacher"), "nin", classes=Shapes().num_classes, width=0.2)
        options = [option.replace("TEACHER", teacher) for option in (*NORM_FREE, *TASKS[task], "--run.wandb=true")]
        run(argv(root, "--data.batch_size=8", *options, task=task, name="one"))
        printed = run(argv(root, "--data.batch_size=4", *TWO, *options, task=task, name="two"))
        return root / "one", root / "two", printed

    return both


def test_every_task_is_here():
    from contracts.test_tasks import TASKS as ALL

    assert TASKS.keys() == ALL.keys()


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_of_four_are_one_of_eight(task, pair):
    one, two, _ = pair(task)
    assert_close(one, two)
    config = json.loads((two / "model/config.json").read_text())
    arguments = config["model_args"]
    assert "test_vit" in (config["architecture"], arguments.get("base")) or arguments["norm"] is False


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_leave_one_record(task, pair):
    _, two, printed = pair(task)
    steps = [(int(row["step"]), row["epoch"]) for row in rows(two) if row.get("train/loss")]
    assert steps == [(3, "1"), (4, "1"), (6, "2"), (8, "2")]
    assert len(list((two / "wandb").glob("offline-run-*"))) == 1
    identity = (two / "wandb_id.txt").read_text()
    assert next((two / "wandb").glob("offline-run-*")).name.endswith(identity)
    assert sorted(path.name for path in two.parent.iterdir()) == ["one", "two"]
    assert printed.count("handed over") == 1
    assert {path.name for path in (two / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_a_cached_teacher_teaches_two_processes_the_same(tmp_path):
    """Each keeps what it saw itself; the samples of a process are others in every epoch."""
    teacher = hand_over(tmp_path / "teacher", "nin", classes=Shapes().num_classes, width=0.2)
    options = [option.replace("TEACHER", teacher) for option in TASKS["Distillation"] if "gradient" not in option]
    options += ["--data.batch_size=4", *TWO, "--trainer.max_epochs=3"]
    run(argv(tmp_path, *options, task="Distillation", name="asked"))
    printed = run(argv(tmp_path, *options, "--model.cache_teacher=true", task="Distillation", name="cached"))
    assert printed.count("its answers are kept") == 1
    assert_close(tmp_path / "asked", tmp_path / "cached")


def test_negatives_are_rolled_within_each_process(tmp_path):
    """One process that rolls within the halves two processes would have, sample by sample, gives the same weights."""
    from lightning import seed_everything

    from baton.optim import Optimizer
    from baton.ssl_tasks import Autoresolution

    options = [option for option in TASKS["Autoresolution"] if "objective" not in option]
    run(argv(tmp_path, "--data.batch_size=4", *TWO, *NORM_FREE, *options, task="Autoresolution"))
    seed_everything(0, verbose=False)
    task = Autoresolution(
        backbone="test_vit", backbone_kwargs={"img_size": 32}, super_patch=32, low_resolution_factor=1, norm=False,
        patch_backbone="autoresolution_patch_rf9", patch_backbone_kwargs={"norm": False, "width": 0.2}, head_width=8,
        optimizer=Optimizer("momentum", lr=0.02),
    )  # fmt: skip
    data = Shapes(size=32, length=32, val_length=21, batch_size=8, crop_padding=0, flip=False)
    data.setup()
    optimizer, loader = task.configure_optimizers(), data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for images, targets in loader:
            halves = [(data.to_float(images[rank::2]), targets[rank::2]) for rank in range(2)]
            (sum(task.losses(half)["loss"] for half in halves) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    handed = load_file(tmp_path / "r/model/model.safetensors")
    for name, value in task.backbone.state_dict().items():
        assert (handed[name] - value).abs().max() < 1e-5, name


def test_an_unnamed_run_has_one_folder(tmp_path):
    command = [option for option in argv(tmp_path, *NORM_FREE, *TWO) if not option.startswith("--run.name")]
    run([*command, "--trainer.max_epochs=1"])
    assert [path.name for path in tmp_path.iterdir()] == ["classification-test_vit-shapes-1"]


RANDOM = [
    "--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1, drop_rate: 0.3}",
    "--model.head_drop_rate=0.5", "--data.crop_padding=4", "--data.flip=true", "--data.batch_size=4",
    "--data.length=160", "--trainer.max_epochs=4", "--run.checkpoint_every=7", "--trainer.log_every_n_steps=5",
]  # fmt: skip


def test_both_killed_and_resumed_end_as_undisturbed(tmp_path):
    run(argv(tmp_path / "whole", *TWO, *RANDOM))
    command = argv(tmp_path / "broken", *TWO, *RANDOM, "--run.resume=true")
    for wanted in (9, 35):
        process = start(command)
        folder = tmp_path / "broken/r"
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "checkpoints/last.ckpt").exists() and int(
                rows(folder)[-1]["step"] if rows(folder) else 0
            ) > wanted:
                break
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        _, output = finish(process)
        assert not (folder / "model").exists(), output
    run(command)
    whole, broken = (read_source(tmp_path / name / "r").record for name in ("whole", "broken"))
    assert broken["metrics"] == whole["metrics"]
    assert broken["sha256"] == whole["sha256"]
    assert rows(tmp_path / "broken/r") == rows(tmp_path / "whole/r")


def test_the_head_alone_needs_ddp_to_know(tmp_path):
    options = [*NORM_FREE, "--model.head_only_steps=3", "--data.batch_size=4"]
    code, output = finish(start(argv(tmp_path, *TWO, *options)))
    assert code == 2
    assert "use --trainer.strategy=ddp_find_unused_parameters_true" in output
    assert "Traceback" not in output
    run(argv(tmp_path, *UNUSED, *options, name="two"))
    run(argv(tmp_path, *NORM_FREE, "--model.head_only_steps=3", "--data.batch_size=8", name="one"))
    assert_close(tmp_path / "one", tmp_path / "two")


def test_parameters_without_gradient_are_named(tmp_path):
    options = ["--model.backbone=test_convnext", *TASKS["Denoising"], "--data.batch_size=4"]
    code, output = finish(start(argv(tmp_path, *TWO, *options, task="Denoising")))
    assert code == 2
    assert "2 parameters get no gradient (the first is backbone.head.norm.weight)" in output
    assert "Traceback" not in output
    run(argv(tmp_path, *UNUSED, *options, task="Denoising", name="two"))


@pytest.mark.parametrize("callback", ["SecondFails", "SecondDies"])
def test_the_end_of_the_second_process_is_the_end_of_both(callback, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = argv(
        tmp_path / "runs", *TWO, *NORM_FREE, f"--trainer.callbacks+=failing.{callback}", "--data.batch_size=4"
    )
    process = start(command, PYTHONPATH=str(tmp_path))
    code, output = finish(process, timeout=120)  # the end of the output is the end of both, who share it
    assert code != 0, output
    if callback == "SecondFails":
        assert "the second process fails" in output
    assert not (tmp_path / "runs/r/model").exists()


def test_a_bad_loss_of_the_second_process_is_seen(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    options = [*NORM_FREE, "--trainer.callbacks+=failing.SecondDiverges", "--data.batch_size=4"]
    code, output = finish(start(argv(tmp_path / "runs", *TWO, *options), PYTHONPATH=str(tmp_path)))
    assert code == 2
    assert "The loss became nan at step 3 (epoch 1)" in output
    assert "Traceback" not in output


def test_sync_batchnorm_needs_cuda(tmp_path):
    code, output = finish(start(argv(tmp_path, *TWO, *NORM_FREE, "--trainer.sync_batchnorm=true")))
    assert code == 2
    assert "trainer.sync_batchnorm needs CUDA devices" in output
    assert "Traceback" not in output


def test_processes_draw_different_random_numbers(tmp_path):
    (tmp_path / "drawing.py").write_text(DRAWING)
    options = [*NORM_FREE, "--trainer.callbacks+=drawing.Draw", "--data.batch_size=4", "--trainer.max_epochs=1"]
    output = run(argv(tmp_path / "runs", *TWO, *options), PYTHONPATH=str(tmp_path))
    drawn = [line.split() for line in output.splitlines() if line.startswith("drawn ")]
    assert {rank for _, rank, _ in drawn} == {"0", "1"}
    assert len({number for *_, number in drawn}) == 2
