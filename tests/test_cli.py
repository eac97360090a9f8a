import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from baton import cli, run
from baton.task import Task

TINY = [
    "--model=Classification", "--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1}",
    "--data=Shapes", "--data.size=16", "--data.length=32", "--data.val_length=9", "--data.test_length=11",
    "--data.batch_size=8", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--run.wandb=false",
]  # fmt: skip


def baton(*args: str) -> int:
    return cli.main(args)


def fit(*more: str, name: str = "r") -> int:
    return baton("fit", *TINY, f"--run.name={name}", *more)


def metrics(root: Path, name: str = "r") -> dict[str, float]:
    return json.loads((root / "runs" / name / "model/config.json").read_text())["baton"]["metrics"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["baton"])  # restored afterwards: a run leaves its own there
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("BATON_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `runs/r`."""
    root = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(root)
    try:
        assert fit("--run.test=true") == 0
    finally:
        os.chdir(before)
    return root


# Fast answers


@pytest.mark.parametrize(
    ("args", "code", "shown"),
    [
        ([], 0, "baton fit"),
        (["--help"], 0, "baton chain"),
        (
            ["fit", "--help"],
            0,
            "tasks (--model): Autoresolution, Classification, Denoising, Distillation, LinearProbes, Reconstruction, "
            "Segmentation, SplitBrain",
        ),
        (["predict", "-h"], 0, "usage: baton predict"),
        (["list"], 0, "baton list backbones"),
        (["list", "backbones", "wrn_*"], 0, "wrn_16_1"),
        (["fitt"], 2, "did you mean `baton fit`?"),
        (["frobnicate"], 2, "the commands are fit, validate"),
    ],
)
def test_answers_without_torch(args: list[str], code: int, shown: str) -> None:
    program = (
        "import sys; sys.argv = ['baton', *sys.argv[1:]]; from baton.cli import main; code = main();"
        "assert not {'torch', 'timm', 'lightning', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert shown in (done.stderr if code else done.stdout)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["fit", "--help-all"], "--trainer.accumulate_grad_batches"),
        (["fit", "--model.help", "Denoising"], "--model.noise"),
        (["fit", "--data.help=Shapes"], "--data.picture_seed"),
        (["fit", *TINY, "--print_config"], "class_path: baton.supervised.Classification"),
    ],
)
def test_long_help_exits_zero(args: list[str], shown: str, capsys: pytest.CaptureFixture) -> None:
    assert baton(*args) == 0
    assert shown in capsys.readouterr().out


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Task, "training_step", lambda *_: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        fit()


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRACEBACK", "1")
    with pytest.raises(ValueError, match="did you mean"):
        baton("fitt")


# One run, from training to predictions


def test_fit_leaves_everything(finished: Path) -> None:
    folder = finished / "runs/r"
    for name in ("config.yaml", "metrics.csv", "model/model.safetensors", "model/config.json"):
        assert (folder / name).is_file(), name
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone_kwargs"] == {"depth": 10, "width": 1}
    assert config["run"]["name"] == "r"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["val/loss"]] == ["4", "8"]
    assert len([row for row in rows if row["test/loss"]]) == 1
    assert {"val/accuracy", "test/accuracy", "train/loss"} <= metrics(finished).keys()


def test_every_checkpoint_is_plain_tensors(finished: Path) -> None:
    for path in (finished / "runs/r/checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["hyper_parameters"]["backbone"] == "wide_resnet"


def test_test_alone_repeats_the_numbers(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(finished)
    before = (finished / "runs/r/model/config.json").read_bytes()
    assert baton("test", "--run.name", "r") == 0
    rows = list(csv.DictReader((finished / "runs/r/metrics.csv").open()))
    tested = [row for row in rows if row["test/loss"]]
    assert len(tested) == 2
    assert tested[0] == tested[1]
    assert float(tested[1]["test/loss"]) == metrics(finished)["test/loss"]
    assert (finished / "runs/r/model/config.json").read_bytes() == before


def test_validate_alone_repeats_the_numbers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert baton("validate", "--run.name=r") == 0
    validated = [row for row in csv.DictReader((finished / "runs/r/metrics.csv").open()) if row["val/loss"]]
    assert float(validated[-1]["val/loss"]) == metrics(finished)["val/loss"]


def test_predict_writes_a_row_an_image(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert baton("predict", "--run.name=r") == 0
    rows = list(csv.DictReader((finished / "runs/r/predictions/predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(11))
    right = np.mean([row["prediction"] == row["target"] for row in rows])
    assert right == pytest.approx(metrics(finished)["test/accuracy"])


def test_predict_on_own_images(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(finished)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"image{number}.png")
    assert baton(
        "predict", "--run.name=r", "--data=ImageFolder", f"--data.root={tmp_path}", "--data.image_size=16",
        "--data.num_workers=0",
    ) == 0  # fmt: skip
    rows = list(csv.DictReader((finished / "runs/r/predictions/predictions.csv").open()))
    assert len(rows) == 5
    assert {row["target"] for row in rows} == {"-1"}
    # The classes are the run's, not those of the folder, which has none.
    names = json.loads((finished / "runs/r/model/config.json").read_text())["label_names"]
    assert [row["class"] for row in rows] == [names[int(row["prediction"])] for row in rows]
    assert [Path(row["path"]).name for row in rows] == [f"image{number}.png" for number in range(5)]


def test_other_classes_are_not_measured(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.chdir(finished)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "image.png")
    folder = ["--run.name=r", "--data=ImageFolder", f"--data.root={tmp_path}", "--data.image_size=16"]
    assert baton("validate", *folder) == 2
    assert "those of the data cat, dog" in capsys.readouterr().err
    assert baton("test", *folder) == 2


# A recorded configuration is a recipe


def test_a_resumed_run_can_be_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert fit("--run.resume=true", "--run.test=true") == 0  # nothing left to train
    assert baton("fit", "--config=runs/r/config.yaml", "--run.name=again") == 0
    steps = [row["step"] for row in csv.DictReader((finished / "runs/again/metrics.csv").open())]
    assert steps[0] == "4"  # from the start, not from r's checkpoint
    assert metrics(finished, "again") == metrics(finished)


# What may go wrong while it runs


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run a command and press Ctrl-C in a training step; returns the exit code."""

    def run_until(step: int, command: list[str]) -> int:
        original, calls = Task.training_step, [0]

        def counting(self, *args):
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Task, "training_step", counting)
            return cli.main(command)

    handler = signal.getsignal(signal.SIGINT)
    yield run_until
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored


def test_ctrl_c_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["fit", *TINY, "--run.checkpoint_every=1", "--run.resume=true"]
    assert cli.main([*command, "--run.name=whole"]) == 0
    capsys.readouterr()
    assert interrupted_at(6, [*command, "--run.name=r"]) == 130
    error = capsys.readouterr().err
    assert error.strip() == "baton: interrupted; continue with the same command and --run.resume=true."
    assert not (tmp_path / "runs/r/model").exists()
    assert cli.main([*command, "--run.name=r"]) == 0
    assert metrics(tmp_path) == metrics(tmp_path, "whole")


@pytest.mark.slow
def test_ctrl_c_from_outside(tmp_path: Path) -> None:
    """A real process, interrupted while it trains, ends with one sentence; the same command then finishes."""
    command = [sys.executable, "-m", "baton", "fit", *TINY, "--run.name=r", "--run.resume=true", "--trainer.max_epochs"]
    process = subprocess.Popen([*command, "10000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/r/checkpoints/last.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("baton: interrupted;")
    assert "Traceback" not in error
    done = torch.load(tmp_path / "runs/r/checkpoints/last.ckpt", weights_only=True)["epoch"] + 1
    again = subprocess.run([*command, str(done + 2)], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs/r/model/model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    steps, original = [0], Task.training_step

    def explode(self, *args):  # after a good first epoch
        steps[0] += 1
        if steps[0] == 6:
            for parameter in self.parameters():
                parameter.data.fill_(float("nan"))
        return original(self, *args)

    monkeypatch.setattr(Task, "training_step", explode)
    assert fit() == 2
    assert "The loss became nan at step 6 (epoch 2)" in capsys.readouterr().err
    assert torch.load(tmp_path / "runs/r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not (tmp_path / "runs/r/model").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert fit("--run.resume=true") == 0


def test_a_learning_rate_that_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit("--model.optimizer.lr=1e30") == 2
    assert "at step 2 (epoch 1)" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_full_disk_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    original, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        if "last.ckpt" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            calls[0] += 1
            if calls[0] == 2:
                raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(run.os, "fsync", fsync)
    assert fit() == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the previous checkpoint is kept" in error
    checkpoints = tmp_path / "runs/r/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = ["fit", *(arg for arg in TINY if "wandb" not in arg), "--run.name=r", "--run.resume=true"]
    assert interrupted_at(6, command) == 130
    identity = (tmp_path / "runs/r/wandb_id.txt").read_text()
    assert cli.main(command) == 0
    folders = sorted(path.name for path in (tmp_path / "runs/r/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(name.endswith(f"-{identity}") for name in folders)
    assert len(list((tmp_path / "runs/r/wandb").glob("offline-run-*/*.wandb"))) == 2
