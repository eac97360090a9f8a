"""The run directory: one folder per run, never shared, never silently overwritten, and what is recorded in it."""

import csv
import fcntl
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from baton.task import is_first_process


@dataclass
class Run:
    """Where a run lives, what it keeps, and how it starts.

    The weights it starts from, in this order: its own `checkpoints/last.ckpt` if `resume`, else `model.init_from`,
    else random.

    Args:
        name: folder of the run below `root`; by default task, backbone and data with the first free number.
        root: folder of all runs.
        resume: continue an existing run exactly where its last checkpoint left it; a run without one starts.
        keep: which weights are tested and handed over, those of the `last` epoch or of the `best` one by `monitor`.
        monitor: metric that decides what is best, over the validation split.
        mode: whether the best is the `min` or the `max`.
        test: run the test split once after training.
        checkpoint_every: also save a checkpoint every so many steps, not only after every epoch.
        chain: the chain this run is a stage of (Weights & Biases: group).
        stage: the stage (Weights & Biases: job type).
        project: Weights & Biases project.
        wandb: record to Weights & Biases (offline without a login; `wandb sync` uploads later).
    """

    name: str | None = None
    root: str = "runs"
    resume: bool = False
    keep: Literal["last", "best"] = "last"
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    test: bool = False
    checkpoint_every: int | None = None
    chain: str | None = None
    stage: str | None = None
    project: str = "baton"
    wandb: bool = True

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.name is not None
        return Path(self.root) / self.name

    @property
    def model(self) -> Path:
        """The folder that is handed over; it exists once the run has finished."""
        return self.path / "model"

    def checkpoint(self, which: str) -> Path:
        """Path of the `last` or `best` checkpoint."""
        return self.path / "checkpoints" / f"{which}.ckpt"

    def choose_name(self, parts: list[str]) -> None:
        """Name an unnamed run after its parts, with the first number that is free; refuse one outside `root`."""
        if self.name is not None and (Path(self.name).is_absolute() or ".." in Path(self.name).parts):
            raise ValueError(f"run.name is a folder below run.root, got {self.name!r}: use --run.root for the rest.")
        if self.name is None and not is_first_process():
            # Processes that Lightning starts for further devices must find the same folder.
            self.name = os.environ.get("BATON_RUN_NAME")
            if self.name is None:
                raise ValueError("Processes that SLURM or torchrun start must agree on a folder: give --run.name.")
        if self.name is None:
            stem = "-".join(part.lower() for part in parts if part)
            number = 1
            while (Path(self.root) / f"{stem}-{number}" / "config.yaml").exists():
                number += 1
            self.name = os.environ["BATON_RUN_NAME"] = f"{stem}-{number}"

    def open(self, config: Mapping[str, Any]) -> TextIO | None:
        """Create or re-open the folder for training and lock it; returns the lock, to be kept until the end.

        Args:
            config: the run's whole configuration, compared with the recorded one when it is resumed.

        Raises:
            ValueError: if the folder belongs to another run, to a running one, or to one with another configuration.
        """
        if not is_first_process():
            return None
        existing = self.path / "config.yaml"
        if not self.resume and existing.exists():
            raise ValueError(
                f"The run {self.path} exists: continue it with --run.resume=true, or choose another --run.name."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Cannot create the run {self.path}: {error.strerror}; choose another --run.root or --run.name."
            ) from error
        lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"Another process is writing the run {self.path}: wait for it, or end it.") from error
        if self.resume and existing.exists() and self.checkpoint("last").exists():
            try:
                self._check_same(yaml.safe_load(existing.read_text()), config)
            except ValueError:
                lock.close()  # else the error's traceback would hold it
                raise
        return lock

    def _check_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Refuse to resume a run of another model, other data, or another seed."""
        before, now = _flatten(_compared(old)), _flatten(_compared(new))
        different = sorted(key for key in before | now if before.get(key) != now.get(key))
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more settings differ)" if len(different) > 1 else ""
            raise ValueError(
                f"The run {self.path} was started with {key}={before.get(key)!r}, now it is {now.get(key)!r}{more}: "
                "resume it unchanged, or start a new run with another --run.name."
            )

    def loggers(self, resume_step: int | None, config: Mapping[str, Any] | None = None) -> list[Logger]:
        """Return the loggers of a training run: metrics.csv always, Weights & Biases where wanted.

        Args:
            resume_step: step of the checkpoint the run continues from; later rows of metrics.csv are dropped.
            config: the run's whole configuration, recorded when training starts.
        """
        loggers: list[Logger] = [MetricsCSV(self.path, resume_step, config=config)]
        if self.wandb and os.environ.get("WANDB_MODE") != "disabled":
            loggers.append(self._wandb_logger(config))
        return loggers

    def _wandb_logger(self, config: Mapping[str, Any] | None) -> WandbLogger:
        import secrets

        identity = self.path / "wandb_id.txt"
        if not identity.exists() and is_first_process():
            identity.write_text(secrets.token_hex(4))
        return WandbLogger(
            project=self.project,
            name=self.name,
            id=identity.read_text().strip() if identity.exists() else None,
            save_dir=self.path,
            group=self.chain,
            job_type=self.stage,
            mode="online" if is_logged_in() else "offline",
            resume="allow",
            config=config,
            settings={"console": "off", "silent": True},
        )

    def publish(self, loggers: list[Logger], sha256: str, origins: Sequence[Mapping[str, Any]]) -> None:
        """Log `model/` as an artifact, with those it started from and learned from as its inputs; only when online.

        Args:
            loggers: of the run.
            sha256: of the handed-over tensors; artifacts are named after it.
            origins: lineages of the weights the run started from, and of its teacher.
        """
        online = [logger for logger in loggers if isinstance(logger, WandbLogger)] if is_logged_in() else []
        for logger in online:
            import wandb

            for origin in origins:
                try:
                    logger.experiment.use_artifact(f"backbone-{origin['sha256'][:16]}:latest")
                except (wandb.errors.CommError, ValueError):
                    print(f"Weights & Biases does not know {origin['source']}: the lineage starts here.")
            artifact = wandb.Artifact(f"backbone-{sha256[:16]}", type="model", metadata={"run": self.name})
            artifact.add_dir(str(self.model))
            logger.experiment.log_artifact(artifact)


def is_logged_in() -> bool:
    """Whether runs can go to Weights & Biases right away."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    import wandb

    return bool(wandb.login(prompt=False))


class MetricsCSV(Logger):
    """`metrics.csv`: one row a log, one column a metric, continued by a resumed run.

    Every row reaches the disk at once, so that a killed run has all rows up to its last checkpoint; rows after the
    checkpoint a run resumes from are dropped, since that run will write them again.

    Args:
        folder: where the file lies.
        resume_step: last step whose rows are kept; `None` starts a new file.
        looked_at: step and epoch of the checkpoint that is looked at; in every row, as Lightning would write 0.
        config: the run's whole configuration, written to config.yaml when training starts.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        looked_at: Mapping[str, int] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._looked_at, self._config = dict(looked_at or {}), config
        self.file = folder / "metrics.csv"
        self._columns: list[str] = ["step", "epoch"]
        self._rows: list[dict[str, Any]] = []
        if is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            self._start(resume_step)

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one file a run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write config.yaml: Lightning calls this when training starts; a resumed run writes its present one."""
        if self._config is not None:
            text = yaml.safe_dump(dict(self._config), sort_keys=False)
            replace_file(self.file.with_name("config.yaml"), text.encode())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a new column rewrites the file."""
        row = {"step": step, **{name: value for name, value in metrics.items() if name != "step"}, **self._looked_at}
        new = [name for name in row if name not in self._columns]
        self._rows.append(row)
        if new:
            self._columns += new
            self._write()
        else:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def _start(self, resume_step: int | None) -> None:
        if resume_step is not None and self.file.exists():
            text = self.file.read_text()
            lines = text[: text.rfind("\n") + 1]  # the last line may be half written
            rows = [row for row in csv.DictReader(io.StringIO(lines)) if None not in row.values()]
            self._rows = [row for row in rows if int(row["step"]) <= resume_step]
            self._columns = list(self._rows[0]) if self._rows else self._columns
        self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        replace_file(self.file, text.getvalue().encode())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place and renames it, so that a full disk or a kill keeps the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; raises a ValueError that names the file where the disk refuses."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_file(path, buffer.getbuffer())
        except OSError as error:
            kept = "the previous checkpoint is kept" if path.exists() else "there is no earlier checkpoint"
            raise ValueError(f"Cannot write {path}: {error.strerror}; {kept}; free some space and resume.") from error


class Saver(ModelCheckpoint):
    """Lightning's checkpoint callback, free in steps that save nothing, and never after the last batch of an epoch.

    From there Lightning would resume with the next epoch and skip the validation of this one.
    """

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Name of this callback in a checkpoint; Lightning's own is put together a dozen times a step."""
        return super().state_key

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save where it is due."""
        if self._every_n_train_steps and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it is either the old or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_MAY_DIFFER = (
    "data.init_args.root",
    "data.init_args.num_workers",
    "model.init_args.compile",
    "model.init_args.cache_teacher",
)


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides the result; the trainer may change (more epochs, other devices)."""
    return {key: config.get(key) for key in ("model", "data", "seed_everything")}


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {} if prefix in _MAY_DIFFER else {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
