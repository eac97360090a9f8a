"""The run directory: nothing clashes, nothing is lost, nothing is overwritten silently."""

import csv
import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from baton import run as run_module
from baton.run import AtomicCheckpointIO, MetricsCSV, Run, replace_file
from test_resume import command, in_child, outcome


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.delenv("BATON_RUN_NAME", raising=False)
    yield
    os.environ.pop("BATON_RUN_NAME", None)


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fork(body) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    return child


# --------------------------------------------------------------------------------------------------------- metrics.csv


def test_every_row_is_on_disk_at_once_and_columns_grow(tmp_path):
    logger = MetricsCSV(tmp_path, None)
    assert (tmp_path / "metrics.csv").read_bytes() == b"step,epoch\r\n"
    logger.log_metrics({"loss": 0.5, "epoch": 1}, step=3)
    assert table(tmp_path) == [{"step": "3", "epoch": "1", "loss": "0.5"}]
    logger.log_metrics({"loss": 0.25, "epoch": 1}, step=6)
    logger.log_metrics({"val/error": 1 / 3, "epoch": 1}, step=6)
    assert table(tmp_path) == [
        {"step": "3", "epoch": "1", "loss": "0.5", "val/error": ""},
        {"step": "6", "epoch": "1", "loss": "0.25", "val/error": ""},
        {"step": "6", "epoch": "1", "loss": "", "val/error": repr(1 / 3)},
    ]


def filled(folder, steps=5):
    logger = MetricsCSV(folder, None)
    for step in range(1, steps + 1):
        logger.log_metrics({"loss": step / 7, "epoch": 1}, step=step)
        if step % 2 == 0:
            logger.log_metrics({"val/error": step / 9, "epoch": 1}, step=step)
    return (folder / "metrics.csv").read_bytes()


@pytest.mark.parametrize("resume_step", [0, 1, 2, 4, 99])
def test_a_resumed_run_drops_later_rows_and_ends_with_the_same_file(tmp_path, resume_step):
    whole = filled(tmp_path)
    logger = MetricsCSV(tmp_path, resume_step)
    assert [int(row["step"]) for row in table(tmp_path)] == [s for s in (1, 2, 2, 3, 4, 4, 5) if s <= resume_step]
    for step in range(resume_step + 1, 6):
        logger.log_metrics({"loss": step / 7, "epoch": 1}, step=step)
        if step % 2 == 0:
            logger.log_metrics({"val/error": step / 9, "epoch": 1}, step=step)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize("lost", range(1, 14))
def test_a_half_written_last_line_is_dropped(tmp_path, lost):
    whole = filled(tmp_path, 3)
    file = tmp_path / "metrics.csv"
    last = len(whole.splitlines(keepends=True)[-1])
    assert last >= 14
    file.write_bytes(whole[:-lost])
    MetricsCSV(tmp_path, 99)
    rows = table(tmp_path)
    assert [row["step"] for row in rows] in (["1", "2", "2"], ["1", "2", "2", "3"])
    if len(rows) == 4:  # only the end of the line was missing
        assert lost == 1
        assert rows[-1]["loss"] == repr(3 / 7)


def test_a_new_run_starts_a_new_file_and_other_processes_write_nothing(tmp_path, monkeypatch):
    filled(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    before = (tmp_path / "metrics.csv").read_bytes()
    MetricsCSV(tmp_path, None).log_metrics({"loss": 1.0}, step=1)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    MetricsCSV(tmp_path, None)
    assert table(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------- names


def test_an_unnamed_run_gets_the_first_free_number(tmp_path):
    for number in (1, 2, 4):
        folder = tmp_path / f"denoising-wrn_16_1-shapes-{number}"
        folder.mkdir()
        (folder / "config.yaml").touch()
    run = Run(root=str(tmp_path))
    run.choose_name(["Denoising", "wrn_16_1", "Shapes"])
    assert run.path == tmp_path / "denoising-wrn_16_1-shapes-3"
    run.path.mkdir()
    (run.path / "config.yaml").touch()
    second = Run(root=str(tmp_path))
    second.choose_name(["Denoising", "wrn_16_1", "Shapes"])  # a second run of the same process
    assert second.name == "denoising-wrn_16_1-shapes-5"
    without = Run(root=str(tmp_path))
    without.choose_name(["Denoising", "", "Shapes"])
    assert without.name == "denoising-shapes-1"


def test_further_processes_take_the_name_of_the_first(tmp_path, monkeypatch):
    first = Run(root=str(tmp_path))
    first.choose_name(["A", "b"])
    first.path.mkdir()
    (first.path / "config.yaml").touch()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    second = Run(root=str(tmp_path))
    second.choose_name(["A", "b"])
    assert second.name == first.name == "a-b-1"
    monkeypatch.delenv("BATON_RUN_NAME")
    with pytest.raises(ValueError, match=r"SLURM or torchrun start must agree on a folder: give --run.name"):
        Run(root=str(tmp_path)).choose_name(["A", "b"])
    named = Run(name="mine", root=str(tmp_path))
    named.choose_name(["A", "b"])
    assert named.name == "mine"


# ------------------------------------------------------------------------------------------------------ opening, locks

CONFIG = {
    "model": {
        "class_path": "Denoising",
        "init_args": {"amount": 0.5, "backbone_kwargs": {"depth": 10}, "compile": False},
    },
    "data": {"class_path": "Shapes", "init_args": {"root": "data", "size": 48, "num_workers": 0}},
    "seed_everything": 0,
    "trainer": {"max_epochs": 3},
}


def started(root, name="r", checkpoint=True):
    run = Run(name=name, root=str(root))
    lock = run.open(CONFIG)
    (run.path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    if checkpoint:
        run.checkpoint("last").parent.mkdir()
        run.checkpoint("last").touch()
    return run, lock


def changed(path, value):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    *parents, last = path.split("/")
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


def resumed(root, config):
    return Run(name="r", root=str(root), resume=True).open(config)


def test_an_existing_run_is_continued_or_refused(tmp_path):
    run, lock = started(tmp_path)
    lock.close()
    with pytest.raises(ValueError, match=r"exists: continue it with --run.resume=true, or choose another --run.name"):
        Run(name="r", root=str(tmp_path)).open(CONFIG)
    resumed(tmp_path, CONFIG).close()
    assert run.model == tmp_path / "r/model"
    assert Run(name="new", root=str(tmp_path), resume=True).open(CONFIG) is not None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/init_args/amount", 0.4, r"model.init_args.amount=0.5, now it is 0.4:"),
        ("model/init_args/backbone_kwargs", {"depth": 16}, "backbone_kwargs.depth=10, now it is 16:"),
        ("model/init_args/backbone_kwargs", {"depth": 10, "width": 2}, "backbone_kwargs.width=None, now it is 2:"),
        ("model/init_args/backbone_kwargs", {}, "backbone_kwargs.depth=10, now it is None"),
        ("model/class_path", "Classification", "class_path='Denoising', now it is 'Classification'"),
        ("data/init_args/size", 32, "data.init_args.size=48, now it is 32"),
        ("seed_everything", 1, "seed_everything=0, now it is 1"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path, path, value, message):
    _, lock = started(tmp_path)
    lock.close()
    with pytest.raises(ValueError, match=message) as caught:
        resumed(tmp_path, changed(path, value))
    assert "resume it unchanged, or start a new run with another --run.name" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "r/checkpoints/last.ckpt").unlink()
    resumed(tmp_path, changed(path, value)).close()  # nothing to continue: it starts


def test_all_differences_are_counted(tmp_path):
    started(tmp_path)[1].close()
    config = changed("model/init_args/amount", 0.4) | {"seed_everything": 5}
    with pytest.raises(ValueError, match=r"\(and 1 more settings differ\)"):
        resumed(tmp_path, config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trainer/max_epochs", 9), ("data/init_args/root", "/elsewhere"), ("data/init_args/num_workers", 4),
        ("model/init_args/compile", True),
    ],
)  # fmt: skip
def test_what_does_not_change_the_result_may_change(tmp_path, path, value):
    started(tmp_path)[1].close()
    resumed(tmp_path, changed(path, value)).close()


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def hold():
        _, lock = started(tmp_path)
        writer.send("locked")
        signal.pause()
        lock.close()

    child = fork(hold)
    try:
        assert reader.recv() == "locked"
        with pytest.raises(ValueError, match=r"Another process is writing the run .*: wait for it, or end it"):
            resumed(tmp_path, CONFIG)
    finally:
        child.kill()
        child.join()
    resumed(tmp_path, CONFIG).close()  # a lock dies with its process


def test_only_the_first_process_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert Run(name="r", root=str(tmp_path)).open(CONFIG) is None
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """With a real limit on the size of files, in a process of its own."""
    path = tmp_path / "checkpoints/last.ckpt"
    saver = AtomicCheckpointIO()
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for _ in range(2):
            try:
                saver.save_checkpoint({"large": torch.zeros(100_000)}, path)
            except ValueError as error:
                writer.send(str(error))
            saver.save_checkpoint({"small": torch.ones(3)}, path)

    child = fork(limited)
    child.join()
    assert child.exitcode == 0
    first, second = reader.recv(), reader.recv()
    assert first.startswith(f"Cannot write {path}: File too large; there is no earlier checkpoint; free some space")
    assert "the previous checkpoint is kept" in second
    assert torch.equal(torch.load(path, weights_only=True)["small"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_disk_that_fills_at_any_moment_changes_nothing(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "write":
        monkeypatch.setattr(Path, "open", full)
    elif moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=r"No space left on device; the previous checkpoint is kept; free some space"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_old_or_new(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def killed():
        run_module.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        replace_file(path, b"new" * 1000)

    child = fork(killed)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    replace_file(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"


# ------------------------------------------------------------------------------------------------------- weights&biases


def test_the_identity_of_a_run_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(name="r", root=str(tmp_path), chain="c", stage="s", project="p")
    run.path.mkdir()
    loggers = [run.loggers(None)[1] for _ in range(2)]
    options = [logger._wandb_init for logger in loggers]
    identity = (run.path / "wandb_id.txt").read_text()
    assert {option["id"] for option in options} == {identity}
    assert (options[0]["group"], options[0]["job_type"], options[0]["project"]) == ("c", "s", "p")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(run.loggers(None)) == 1
    assert len(Run(name="r", root=str(tmp_path), wandb=False).loggers(None)) == 1


# --------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("moment", [("validation_step", 1), ("on_validation_epoch_end", 2)])
def test_a_kill_between_the_last_batch_and_the_end_of_validation(moment, tmp_path):
    """Where an epoch's last batch is one after which a checkpoint is due: 8 batches, one every 4."""
    more = "--run.checkpoint_every=4"
    assert in_child(command("denoising", tmp_path / "whole", more)) == 0
    broken = command("denoising", tmp_path / "broken", more, "--run.resume=true")
    assert in_child(broken, moment) == -signal.SIGKILL
    assert in_child(broken) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../b", "/tmp/x"])
def test_a_name_stays_below_the_root(name):
    with pytest.raises(ValueError, match=r"run\.name is a folder below run\.root"):
        Run(name=name).choose_name([])
