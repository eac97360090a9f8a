"""Task: the LightningModule every recipe is. It owns the backbone, the optimiser, the logging and exact resumption."""

import copy
import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MetricCollection

from baton import handover
from baton.backbones import create_backbone
from baton.data.images import Batch
from baton.freezing import modules_to_freeze
from baton.layers.njet import njet_layers
from baton.optim import LRScheduler, Optimizer, keep_equal_values
from baton.random_state import fixed_randomness, gather_random_state, set_random_state

_COMPILED = ("forward_features", "forward_intermediates")


class Task(LightningModule):
    """Base of all recipes. A recipe implements `losses` and is final: no recipe subclasses another.

    Args:
        backbone: name of a timm model (`baton list backbones`); left out where `init_from` says it.
        backbone_kwargs: further arguments of the backbone.
        init_from: where the backbone's weights come from: a model folder, a run directory, a Lightning checkpoint,
            `wandb:entity/project/name:alias`, or `timm:<model>.<tag>`. The trunk is taken, and the classifier is fresh
            unless `keep_classifier` is set.
        keep_classifier: take the classifier of `init_from` as well.
        tolerate: patterns of tensor names that may differ between `init_from` and the backbone; all others must match.
        freeze: paths of modules of the backbone that are not trained and stay bit-identical, such as `[conv1, layer1]`.
        freeze_batchnorm: nor is any BatchNorm of the backbone, with its running statistics.
        optimizer: see `baton.optim.Optimizer`.
        lr_scheduler: see `baton.optim.LRScheduler`.
        channels_last: run the backbone in channels-last memory format.
        compile: compile the backbone with `torch.compile`.
    """

    backbone: Any  # a timm model: nn.Module does not know the protocol
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        init_from: str | None = None,
        keep_classifier: bool = False,
        tolerate: list[str] | None = None,
        freeze: list[str] | None = None,
        freeze_batchnorm: bool = False,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        lr_scheduler: LRScheduler = LRScheduler(),  # noqa: B008 (frozen)
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = Optimizer(**optimizer) if isinstance(optimizer, dict) else optimizer
        self.lr_scheduler = LRScheduler(**lr_scheduler) if isinstance(lr_scheduler, dict) else lr_scheduler
        self.channels_last, self.compile_backbone = channels_last, compile
        self.parent: dict[str, Any] | None = None  # lineage of the weights it started from
        self.taught_by: dict[str, Any] | None = None  # lineage of the teacher it learns from
        self.classes: list[str] | None = None
        self.metrics: MetricCollection | None = None
        if keep_classifier and init_from is None:
            raise ValueError("model.keep_classifier keeps that of model.init_from: name one.")
        self._kept_classifier = keep_classifier
        self.backbone = self._create_backbone(backbone, backbone_kwargs, init_from, tolerate or [])
        self._make_hyperparameters_plain()
        config = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)
        self._frozen: list[nn.Module] = []
        self._to_freeze: dict[str, Any] = {"paths": freeze or [], "batchnorm": freeze_batchnorm}
        self._built = False
        self._batches = 0
        self._checked_gradients = False
        # Losses since the last log with their step, on the device: no synchronisation.
        self._window: list[tuple[int, dict[str, Tensor]]] = []
        self.latest: dict[str, float] = {}  # last value of every recorded metric
        self._sums: list[tuple[dict[str, Tensor], int]] = []
        self._random_state: list[dict[str, Any]] | None = None

    # What a recipe says

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalars for one training batch; `"loss"` is minimised, the rest is logged."""
        raise NotImplementedError

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scalars of one evaluation batch, means over its samples; may update `self.metrics`."""
        return self.losses(batch)

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `self.metrics` computed over a split, possibly with values derived from it."""
        return values

    def build(self) -> None:
        """Create what depends on the data (`self.trainer.datamodule` is there), such as a classifier."""

    def networks(self) -> list[nn.Module]:
        """Return the networks that `channels_last` and `compile` are meant for."""
        return [self.backbone]

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return predictions of a batch, each (B, ...)."""
        raise ValueError(f"{type(self).__name__} makes no predictions; `baton predict` needs a task that does.")

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Return images in [0, 1] worth looking at, by name."""
        return {}

    # What a recipe uses

    def normalize(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Bring images from [0, 1] to the backbone's own mean and standard deviation."""
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f gh gw"]:
        """Return the backbone's last spatial map for images in [0, 1].

        Raises:
            ValueError: if the backbone has none.
        """
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(f"The backbone {self.hparams['backbone']!r} gives no spatial map; choose another.")
        return self.backbone.forward_intermediates(
            self.normalize(images), indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )[-1]

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        """Return the backbone's pooled features, what its classifier would see, for images in [0, 1]."""
        return self.backbone.forward_head(self.backbone.forward_features(self.normalize(images)), pre_logits=True)

    def need_classifier(self, classes: int) -> None:
        """Give the backbone a fresh classifier, or make sure that the one it kept has as many classes.

        Raises:
            ValueError: it has not.
        """
        if not self._kept_classifier:
            self.backbone.reset_classifier(classes)
        elif self.backbone.num_classes != classes:
            raise ValueError(
                f"The classifier that model.keep_classifier kept has {self.backbone.num_classes} classes, but "
                f"{classes} are needed: leave keep_classifier out, or use the data it was trained on."
            )

    def freeze_modules(self, *modules: nn.Module) -> None:
        """Freeze modules for good: no gradients, and evaluation mode, so that buffers stay bit-identical."""
        for module in modules:
            module.requires_grad_(False)
            module.eval()
        self._frozen.extend(modules)

    # Lightning's hooks

    def configure_model(self) -> None:
        """Build what depends on the data, once."""
        for callback in self.trainer.callbacks if self._trainer is not None else []:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):  # calls this before it copies the task
                callback._kwargs = keep_equal_values(callback._kwargs)
        if self._built:
            return
        self._built = True
        # DDP resets the seed before this, one process does not: the draws in here must not depend on it.
        with fixed_randomness(torch.initial_seed() + 1):
            self.build()
        self.freeze_modules(*modules_to_freeze(self.backbone, **self._to_freeze))
        for network in self.networks():
            if self.channels_last:
                network.to(memory_format=torch.channels_last)
            if self.compile_backbone:
                for name in _COMPILED:
                    if hasattr(network, name):
                        setattr(network, name, torch.compile(getattr(network, name)))

    def configure_optimizers(self) -> Any:
        """Build the optimiser and the schedule from their descriptions."""
        optimizer = self.optimizer.build(self, self.backbone)
        scheduler = self.lr_scheduler.build(optimizer, self._training_length)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _training_length(self) -> tuple[float, float]:
        """Optimiser steps an epoch, and epochs. Known once training runs: `Trainer.estimated_stepping_batches` would
        set up the loaders before a checkpoint is restored, and Lightning then forgets their position in the epoch.
        """
        trainer = self.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        by_steps = trainer.max_steps / per_epoch if trainer.max_steps > 0 else math.inf
        by_epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
        return per_epoch, min(by_steps, by_epochs)

    def train(self, mode: bool = True) -> "Task":
        """Set the mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def on_train_start(self) -> None:
        """Continue the random numbers of an interrupted run, or part those of the processes: all began alike."""
        if self._random_state is not None:
            set_random_state(self._random_state, self.global_rank)
            self._random_state = None
        elif self.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_train_epoch_start(self) -> None:
        """Forget the optimiser's momentum where the schedule says so; look at the scales of N-Jet layers."""
        for _, layer in njet_layers(self):
            layer.refresh()
        if self.lr_scheduler.resets_in(self.current_epoch):
            self.trainer.optimizers[0].state.clear()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the losses and remember them on the device; read them every `log_every_n_steps` batches."""
        losses = self.losses(batch)
        self._window.append((self.global_step + 1, {name: value.detach() for name, value in losses.items()}))
        self._batches += 1
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.is_last_batch or (every and self._batches % every == 0):
            self._log_window()
        return losses["loss"]

    def on_after_backward(self) -> None:
        """Say in one sentence what DDP would say in twenty lines one step later."""
        if not self._checked_gradients:
            self._checked_gradients = True
            self._check_all_learn()

    def on_train_epoch_end(self) -> None:
        """Log what `max_steps` left unlogged in the middle of an epoch."""
        if self._window:
            self._log_window()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the scalars of a batch; they are weighted by its size."""
        self._sums.append((self.evaluate(batch), len(batch[0])))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the scalars of a batch; they are weighted by its size."""
        self._sums.append((self.evaluate(batch), len(batch[0])))

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the predictions of a batch."""
        return self.predict(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation split, over all processes."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over the test split, over all processes."""
        self._log_evaluation("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: random state, unlogged losses, what the hand-over needs. Refuse bad losses."""
        window = self._read_window() if self._window else []
        # A checkpoint stands alone: it names the backbone itself, not where the weights once came from.
        alone = {"init_from": None, "keep_classifier": False}
        checkpoint["hyper_parameters"] = {**checkpoint.get("hyper_parameters", {}), **alone}
        checkpoint["baton"] = {
            "batches": self._batches,
            "window": window,
            "latest": dict(self.latest),
            "random_state": gather_random_state(),
            **handover.checkpoint_entry(self.backbone, self.parent, self.classes),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added."""
        state = checkpoint.get("baton", {})
        self._batches = state.get("batches", 0)
        self._window = [
            (step, {name: torch.tensor(value, device=self.device) for name, value in losses.items()})
            for step, losses in state.get("window", [])
        ]
        self.latest = dict(state.get("latest", {}))
        self._random_state = state.get("random_state")
        self.parent = state.get("parent", self.parent)
        self.classes = state.get("classes", self.classes)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this one twenty times a step; nn.Module's own __setattr__ makes it a seventh of the overhead.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # Inside

    def _create_backbone(
        self, name: str | None, kwargs: dict[str, Any] | None, init_from: str | None, tolerate: list[str]
    ) -> nn.Module:
        if (kwargs or {}).get("in_chans", 3) != 3:
            raise ValueError("Images are always RGB (grey ones are repeated): leave in_chans out of backbone_kwargs.")
        if init_from is None:
            if name is None:
                raise ValueError("model.backbone is missing: name a backbone (`baton list backbones`) or init_from.")
            self.hparams.update(backbone=name, backbone_kwargs=dict(kwargs or {}))
            return create_backbone(name, **{"num_classes": 0, **(kwargs or {})})
        source = handover.read_source(init_from)
        kwargs = handover.check_restated(source, name, kwargs)
        kept = self._kept_classifier
        if kept and not source.num_classes:
            raise ValueError(f"{init_from!r} has no classifier that model.keep_classifier could keep.")
        backbone = handover.build_backbone(source, num_classes=None if kept else 0, overrides=kwargs)
        report = handover.load_weights(backbone, source, classifier=kept, tolerate=tolerate)
        if is_first_process():
            print(f"{init_from}: {source.architecture}, {report}", flush=True)
        self.parent = source.lineage()
        classifier = {"num_classes": source.num_classes} if kept else {}
        self.hparams.update(backbone=source.architecture, backbone_kwargs={**kwargs, **classifier})
        return backbone

    def _make_hyperparameters_plain(self) -> None:
        """Keep plain values only, so that `torch.load(weights_only=True)` always reads a checkpoint."""
        self.hparams.update(optimizer=dataclasses.asdict(self.optimizer))
        self.hparams.update(lr_scheduler=dataclasses.asdict(self.lr_scheduler))
        self._hparams_initial = copy.copy(self._hparams)

    def _log_window(self) -> None:
        rows = self._read_window()
        self._window.clear()
        means = {f"train/{name}": math.fsum(row[name] for _, row in rows) / len(rows) for name in rows[0][1]}
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._write_row({**means, "lr": learning_rate}, step=rows[-1][0])
        self.log_dict(means, logger=False, prog_bar=True)

    def record(self, values: dict[str, float]) -> None:
        """Record metrics of the present step: to the loggers, the progress bar, and callbacks that monitor them."""
        if not self.trainer.sanity_checking:
            self._write_row(values, step=self.global_step)
        self.log_dict(values, logger=False, prog_bar=True)

    def _write_row(self, values: dict[str, float], step: int) -> None:
        """Write at once; Lightning would write after the checkpoint that must not lose it. Epochs count from 1."""
        epoch = self.current_epoch + (self.trainer.state.fn == "fit")
        self.latest.update(values)
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": epoch}, step=step)

    def _read_window(self) -> list[tuple[int, dict[str, float]]]:
        """Read the losses since the last log, means over all processes: the one synchronisation with the device."""
        names, steps = list(self._window[0][1]), [step for step, _ in self._window]
        table = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in self._window])
        table = self.trainer.strategy.reduce(table, reduce_op="mean").cpu()
        rows = [(step, dict(zip(names, row, strict=True))) for step, row in zip(steps, table.tolist(), strict=True)]
        for step, row in rows:
            if not math.isfinite(row["loss"]):
                raise ValueError(
                    f"The loss became {row['loss']} at step {step} (epoch {self.current_epoch + 1}); the last "
                    "checkpoint is from before: lower the learning rate or clip the gradients, and start again."
                )
        return rows

    def _check_all_learn(self) -> None:
        """DDP waits for the gradient of every parameter."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters"):
            return
        idle = [name for name, value in self.named_parameters() if value.requires_grad and value.grad is None]
        if idle:
            raise ValueError(
                f"{len(idle)} parameters get no gradient (the first is {idle[0]}), and DDP would wait for it: use "
                "--trainer.strategy=ddp_find_unused_parameters_true."
            )

    def _log_evaluation(self, stage: str) -> None:
        values: dict[str, Any] = {}
        if self._sums:
            names = list(self._sums[0][0])
            weights = torch.tensor([count for _, count in self._sums], dtype=torch.float64)
            table = torch.stack([torch.stack([part[name].float() for name in names]) for part, _ in self._sums])
            table = table.cpu().double()  # Apple's GPUs have no double
            totals = torch.cat([(table * weights[:, None]).sum(0), weights.sum()[None]])
            if self.trainer.world_size > 1:
                totals = self.trainer.strategy.reduce(totals.to(self.device), reduce_op="sum")
            values = {name: totals[index] / totals[-1] for index, name in enumerate(names)}
            self._sums.clear()
        if self.metrics is not None:
            values.update(self.summarize(self.metrics.compute()))
            self.metrics.reset()
        self.record({f"{stage}/{name}": float(value) for name, value in values.items()})


def is_first_process() -> bool:
    """Whether this process writes and prints; Lightning sets the rank from the environment."""
    return getattr(rank_zero_only, "rank", 0) == 0
