"""Tiny data, trainers and a logger that remembers, for tests that train."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from baton.backbones import create_backbone
from baton.data.images import ArraySet, ImageData
from baton.data.masks import IGNORE, MaskArraySet, MaskData
from baton.handover import write_model

WRN = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1}}


def random_set(count: int, size: tuple[int, int], classes: int, seed: int) -> ArraySet:
    """Images whose red channel knows their class; every class occurs."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randperm(count, generator=draw) % max(classes, 1)
    images = torch.randint(0, 256, (count, 3, *size), generator=draw, dtype=torch.uint8)
    images[:, 0] = (images[:, 0] // 2 + (targets * 127 // max(classes - 1, 1)).view(-1, 1, 1)).to(torch.uint8)
    return ArraySet(images, targets if classes else torch.full((count,), -1))


class Arrays(ImageData):
    """Random images in memory."""

    def __init__(
        self,
        train: int = 20,
        val: int = 0,
        test: int = 0,
        size: tuple[int, int] = (16, 16),
        num_classes: int = 3,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.lengths, self.size = (train, val, test), size
        self.classes = [f"class {number}" for number in range(num_classes)]

    def sources(self):
        train, val, test = (
            random_set(count, self.size, self.num_classes, seed) if count else None
            for seed, count in enumerate(self.lengths)
        )
        return train, val, test


def random_masks(count: int, size: tuple[int, int], classes: int, seed: int) -> MaskArraySet:
    """Images whose red channel knows each pixel's class; a ninth of the pixels is ignored."""
    draw = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, classes, (count, *size), generator=draw, dtype=torch.uint8)
    images = torch.randint(0, 256, (count, 3, *size), generator=draw, dtype=torch.uint8)
    images[:, 0] = images[:, 0] // (2 * classes) + masks * (255 // classes)
    masks[torch.rand(masks.shape, generator=draw) < 1 / 9] = IGNORE
    return MaskArraySet(images, masks)


class MaskArrays(MaskData):
    """Random images in memory with random masks; the first class is the background."""

    def __init__(
        self,
        train: int = 20,
        val: int = 0,
        test: int = 0,
        size: tuple[int, int] = (16, 16),
        num_classes: int = 3,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.lengths, self.size = (train, val, test), size
        self.classes = ["background", *(f"class {number}" for number in range(1, num_classes))][:num_classes]

    def sources(self):
        train, val, test = (
            random_masks(count, self.size, self.num_classes, seed) if count else None
            for seed, count in enumerate(self.lengths)
        )
        return train, val, test


class Rows(Logger):
    """Remembers what is logged: (step, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self):
        return "rows"

    @property
    def version(self):
        return ""

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def column(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]


def trainer(epochs: int = 1, **kwargs: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": Rows(),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": epochs,
    }
    return Trainer(**{**quiet, **kwargs})


def fit(task: Any, data: Any, epochs: int = 1, ckpt_path: Any = None, **kwargs: Any) -> Rows:
    """Train and return what was logged."""
    runner = trainer(epochs, **kwargs)
    runner.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return runner.logger


def state(module: Any) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def hand_over(
    folder: Path,
    backbone: str = "wide_resnet",
    classes: list[str] | int = 3,
    cfg: Any = None,
    seed: int = 7,
    **kwargs: Any,
) -> str:
    """Write a model folder of an untrained network with its classifier, and return where it is."""
    names = classes if isinstance(classes, list) else None
    count = len(classes) if isinstance(classes, list) else classes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = create_backbone(backbone, num_classes=count, pretrained_cfg_overlay=cfg or {}, **kwargs)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # as if it had seen something
                torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
                torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    write_model(
        folder, network, backbone_kwargs=kwargs, config={}, metrics={}, parent=None, classes=names, replace=True
    )
    return str(folder)


def undrawn() -> AbstractContextManager:
    """For networks on the meta device: to draw numbers that are nowhere would be most of building them."""
    return mock.patch.multiple(torch.Tensor, normal_=_as_it_is, uniform_=_as_it_is)


def _as_it_is(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor
