"""One stage: LightningCLI with Baton's run directory, resumption, checkpoints, loggers and hand-over around it."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import baton.backbones
import baton.data
import baton.distill
import baton.ssl_tasks
import baton.supervised
from baton import handover
from baton.callbacks import Pictures, ProgressBar  # with these, the short names of all
from baton.callbacks.drawing import Drawing
from baton.callbacks.predictions import PredictionWriter
from baton.data.images import ImageData
from baton.mistakes import check_recipes, explain
from baton.run import AtomicCheckpointIO, MetricsCSV, Run, Saver
from baton.task import Task


def run_stage(command: str, args: Sequence[str]) -> int:
    """Run `baton fit|validate|test|predict` and return the exit code."""
    _quiet()
    args = [command, *_with_recorded_config(command, list(args))]
    check_recipes(args)
    sys.argv = [sys.argv[0], *args]  # what Lightning starts further processes with
    finished = False
    try:
        with contextlib.ExitStack() as BatonCLI.locks:
            _command_line(BatonCLI)
        finished = True
    finally:
        # Not left to the interpreter's exit: a stage of a chain ends without one.
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=0 if finished else 1)
    return 0


def check(argv: Sequence[str]) -> dict[str, Any]:
    """Parse a stage's command and build its backbone without memory, so that a mistake shows before hour three.

    Args:
        argv: the command, such as `["fit", "--config", "recipe.yaml"]`.

    Returns:
        The whole configuration.

    Raises:
        ValueError: one sentence about the first mistake.
    """
    _quiet()
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        parsed = _command_line(_ParseOnly)
    finally:
        sys.argv = before
    config = yaml.safe_load(parsed._parser(parsed.subcommand).dump(parsed.config[parsed.subcommand], format="yaml"))
    model = config["model"]["init_args"]
    if model.get("backbone") and not model.get("init_from"):
        with torch.device("meta"):
            baton.backbones.create_backbone(
                model["backbone"], **{"num_classes": 0, **(model.get("backbone_kwargs") or {})}
            )
    return config


def _command_line(kind: "type[BatonCLI]") -> "BatonCLI":
    return kind(
        Task,
        ImageData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,  # metrics.csv's logger writes config.yaml
        seed_everything_default=0,
        trainer_defaults={"num_sanity_val_steps": 0, "max_epochs": 10, "log_every_n_steps": 50},
        parser_class=Parser,
        parser_kwargs={"prog": "baton", "allow_abbrev": False},
    )


class Parser(LightningArgumentParser):
    """A parser whose errors are one sentence with the nearest names; half an option's name is not the option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what the command prints."""
        if not self.exit_on_error:  # of one class's arguments: the parser around it reports the whole
            super().error(message, ex)
        raise ValueError(explain(message, self))


class BatonCLI(LightningCLI):
    """Adds `--run.*`, opens the run directory, and hands the weights over at the end."""

    run: Run
    locks: ClassVar[contextlib.ExitStack]  # held until the command ends, however it ends

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those whose options are read: the one asked for, as the parser of each takes a while to build."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in sys.argv[1:2] if name in every} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the run."""
        parser.add_class_arguments(Run, "run")

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint of another task; never let its hyper-parameters override what the user asked for."""
        config = self.config[self.config.subcommand]
        self.run = Run(**vars(config.run))
        self.run.choose_name(_name_parts(config))
        config.run.name = self.run.name
        self._resume_from = self._find_checkpoint(config)
        if self._resume_from is not None:
            self._adopt(config, self._resume_from)

    def _find_checkpoint(self, config: Any) -> Path | None:
        given = config.get("ckpt_path")
        fitting = self.config.subcommand == "fit"
        if given in ("last", "best"):
            given = self.run.checkpoint(given)
        if given is not None and not Path(given).is_file():
            raise FileNotFoundError(f"--ckpt_path {given} does not exist; runs keep theirs in {self.run.path}.")
        if given is None:
            own = self.run.checkpoint("last" if fitting else self.run.keep)
            given = own if own.is_file() and (self.run.resume or not fitting) else None
        if given is None and not fitting:
            raise FileNotFoundError(
                f"`baton {self.config.subcommand}` needs a trained run: {self.run.checkpoint(self.run.keep)} does not "
                "exist; name the run with --run.name or a checkpoint with --ckpt_path."
            )
        config.ckpt_path = None if given is None else str(given)
        return None if given is None else Path(given)

    def _adopt(self, config: Any, path: Path) -> None:
        """Check that the checkpoint is of this task; to look at it, build the network it holds."""
        checkpoint = handover.load_checkpoint(path)
        theirs = checkpoint.get("hyper_parameters", {}).get("_class_path")
        ours = config.model.class_path
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"The checkpoint {path} is of {theirs}, the model is {ours}: --ckpt_path and --run.resume continue the "
                "same task; to start another from its weights, use --model.init_from."
            )
        self._resume_step = checkpoint["global_step"]
        self._classes = checkpoint.get("baton", {}).get("classes")
        self._looked_at = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"] + 1}
        if self.config.subcommand != "fit":
            held = checkpoint["hyper_parameters"]
            init = config.model.init_args
            if init.backbone is not None and init.backbone != held["backbone"]:
                raise ValueError(
                    f"The checkpoint {path} holds backbone {held['backbone']!r}, but {init.backbone!r} was asked for; "
                    "leave the backbone out."
                )
            # Normalisation travels with the weights, also where they came from a file with its own.
            statistics = {name: checkpoint["baton"]["pretrained_cfg"][name] for name in ("mean", "std")}
            kwargs = {**(held["backbone_kwargs"] or {}), "pretrained_cfg_overlay": statistics}
            init.init_from, init.keep_classifier = None, False
            init.backbone, init.backbone_kwargs = held["backbone"], kwargs
            if "num_classes" in init:
                init.num_classes = held["num_classes"]
            for source in ("decoder_from", "trunk_from"):
                if source in init:
                    init[source] = None

    def before_instantiate_classes(self) -> None:
        """Open the run directory before anything is built in it."""
        config = self.config[self.subcommand]
        if config.trainer.sync_batchnorm and not torch.cuda.is_available():
            raise ValueError("trainer.sync_batchnorm needs CUDA devices, and there are none here: leave it out.")
        if self.subcommand == "fit":
            self._recorded = yaml.safe_load(self._parser("fit").dump(config, skip_unset=False, format="yaml"))
            # What a run is, not how it was started: as a recipe it must neither resume nor take up a checkpoint.
            self._recorded["ckpt_path"] = None
            self._recorded["run"]["resume"] = False
            lock = self.run.open(self._recorded)
            if lock is not None:
                self.locks.enter_context(lock)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: its checkpoints, loggers, pictures and a cheap progress bar."""
        fitting = self.subcommand == "fit"
        given = dict(vars(self._get(self.config_init, "trainer")))
        barebones = given.get("barebones")
        if not fitting:
            kwargs["logger"] = (
                MetricsCSV(self.run.path, 2**62, self._looked_at) if self.subcommand != "predict" else False
            )
        elif not barebones:
            kwargs["logger"] = self.run.loggers(self._resume_step if self._resume_from else None, self._recorded)
        callbacks: list[Callback] = [] if barebones else self._callbacks(given)
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        config = {**given, **kwargs}
        if not fitting and not any(isinstance(callback, Checkpoint) for callback in given.get("callbacks") or []):
            config["enable_checkpointing"] = False  # Lightning would add one that looks for its folder
        if barebones:
            config["log_every_n_steps"] = config["num_sanity_val_steps"] = None  # the defaults; it allows no others
        else:
            # Lightning's own default is a bar and a summary, also in a log file.
            shows_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
            config["enable_progress_bar"] = shows_bar
            config["enable_model_summary"] = bool(config.get("enable_model_summary"))
        return self._instantiate_trainer(config, callbacks)

    def _callbacks(self, given: dict[str, Any]) -> list[Callback]:
        own = given.get("callbacks") or []
        callbacks: list[Callback] = []
        if given.get("enable_progress_bar") or (given.get("enable_progress_bar") is None and sys.stdout.isatty()):
            callbacks.append(ProgressBar())
        if self.subcommand == "predict":
            return [*callbacks, PredictionWriter(str(self.run.path / "predictions"))]
        for callback in own:
            if isinstance(callback, Pictures | Drawing):
                callback.folder = callback.folder or str(self.run.path / "pictures")
        if not any(isinstance(callback, Pictures) for callback in own):
            callbacks.append(Pictures(folder=str(self.run.path / "pictures")))
        if self.subcommand == "fit" and given.get("enable_checkpointing") is not False:
            callbacks += self._checkpoints()
        return callbacks

    def _checkpoints(self) -> list[Callback]:
        where: dict[str, Any] = {"dirpath": self.run.path / "checkpoints", "enable_version_counter": False}
        best: dict[str, Any] = {"monitor": self.run.monitor, "mode": self.run.mode, "save_on_train_epoch_end": False}
        saves: list[Callback] = [Saver(filename="best", save_weights_only=False, **best, **where)]
        if self.run.checkpoint_every:
            saves.append(Saver(filename="last", every_n_train_steps=self.run.checkpoint_every, **where))
        # After every epoch, and last of all, so that it knows what the others did.
        saves.append(Saver(filename="last", save_on_train_epoch_end=True, every_n_epochs=1, **where))
        return saves

    def fit(self, model: Task, **kwargs: Any) -> None:
        """Train, test once if asked, and hand over."""
        kwargs |= {"ckpt_path": str(self._resume_from) if self._resume_from else None, "weights_only": True}
        with _interruptible():
            self.trainer.fit(model, **kwargs)
        metrics = self._take_kept_weights(model)
        if self.run.test:
            with _interruptible():
                self.trainer.test(model, datamodule=self.datamodule, verbose=False)
            metrics |= {name: value for name, value in model.latest.items() if name.startswith("test/")}
        if self.trainer.is_global_zero and not self.config_init[self.subcommand].trainer.fast_dev_run:
            self._hand_over(model, metrics)
        self.trainer.strategy.barrier()

    def validate(self, model: Task, **kwargs: Any) -> None:
        """Measure the validation split."""
        self._check_classes()
        if not self.trainer.validate(model, **(kwargs | {"verbose": False})):
            raise ValueError(f"{type(self.datamodule).__name__} has no validation split here; set data.val_size.")
        self._show(model, "val/")

    def test(self, model: Task, **kwargs: Any) -> None:
        """Measure the test split."""
        self._check_classes()
        self.trainer.test(model, **(kwargs | {"verbose": False}))
        self._show(model, "test/")

    def predict(self, model: Task, **kwargs: Any) -> None:
        """Write predictions."""
        self.trainer.predict(model, **(kwargs | {"return_predictions": False}))
        if self.trainer.is_global_zero:
            print(f"{self.run.path / 'predictions'}: predictions of {self._resume_from} are written")

    def _check_classes(self) -> None:
        """Other images may have other classes; their labels would silently mean something else."""
        theirs = self.datamodule.classes
        if self._classes and theirs and list(theirs) != self._classes:
            raise ValueError(
                f"The run's classes are {', '.join(self._classes)}, those of the data {', '.join(theirs)}: measure "
                "it on data of the same classes, or look at its predictions (`baton predict`)."
            )

    def _show(self, model: Task, prefix: str) -> None:
        values = {name: value for name, value in model.latest.items() if name.startswith(prefix)}
        if self.trainer.is_global_zero:
            print(f"{self._resume_from}: {_listed(values)}")

    def _take_kept_weights(self, model: Task) -> dict[str, float]:
        """Load what the kept checkpoint holds (the averaged weights, where they are averaged) and its metrics."""
        kept = self.run.checkpoint(self.run.keep)
        if not kept.exists():
            if self.run.keep == "best":
                raise ValueError("run.keep=best needs a validation split, and the data have none; set data.val_size.")
            return {name: value for name, value in model.latest.items() if name != "lr"}
        checkpoint = handover.load_checkpoint(kept)
        model.load_state_dict(checkpoint["state_dict"])
        return {name: value for name, value in checkpoint["baton"]["latest"].items() if name != "lr"}

    def _hand_over(self, model: Task, metrics: dict[str, float]) -> None:
        # Not those of a classifier that stays behind.
        classes = model.classes if len(model.classes or []) == getattr(model.backbone, "num_classes", 0) else None
        sha256 = handover.write_model(
            self.run.model,
            model.backbone,
            backbone_kwargs=model.hparams["backbone_kwargs"],
            config=self._recorded,
            metrics=metrics,
            parent=model.parent,
            teacher=model.taught_by,
            classes=classes,
            replace=self.run.resume,
        )
        self.run.publish(self.trainer.loggers, sha256, [each for each in (model.parent, model.taught_by) if each])
        print(f"{self.run.model}: handed over ({_listed(metrics)})")


class _ParseOnly(BatonCLI):
    """Reads the command line and does nothing."""

    def _parse_ckpt_path(self) -> None: ...
    def _set_seed(self) -> None: ...
    def _add_instantiators(self) -> None: ...
    def before_instantiate_classes(self) -> None:
        """Open nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


class _interruptible:
    """Lightning turns Ctrl-C into exit code 1; give it back its name."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is SystemExit and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error


def _listed(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def _name_parts(config: Any) -> list[str]:
    model, data = config.get("model"), config.get("data")
    task = model.class_path.rpartition(".")[2] if model else ""
    backbone = (model.init_args.get("backbone") or "") if model else ""
    return [task, backbone, data.class_path.rpartition(".")[2] if data else ""]


def _with_recorded_config(command: str, args: list[str]) -> list[str]:
    """To look at a run, its own configuration is the start: `baton test --run.name NAME` is enough."""
    flat = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--run.") else [arg])]
    if command == "fit" or any(
        arg in ("-c", "--config", "-h", "--help") or arg.startswith("--config=") for arg in args
    ):
        return args
    if "--run.name" not in flat[:-1]:
        return args
    root = flat[flat.index("--run.root") + 1] if "--run.root" in flat[:-1] else "runs"
    recorded = Path(root) / flat[flat.index("--run.name") + 1] / "config.yaml"
    return ["--config", str(recorded), *args] if recorded.is_file() else args


def _quiet() -> None:
    """Leave the terminal to what the user must know."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")  # Lightning's own
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*Couldn't infer the batch indices.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what a task logs is reduced already
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
