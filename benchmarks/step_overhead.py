"""What Baton adds to a training step, as a ratio to what Lightning's own `Trainer(barebones=True)` adds.

    python benchmarks/step_overhead.py [--rounds 7] [--epoch]

Three ways to train one network on the same batches, alternating in one process: a hand-written PyTorch loop,
Lightning's barebones trainer, and `baton fit` with all it does by default (losses and errors accumulated and logged
every 50 steps to metrics.csv, progress bar, pictures, checkpoints). The first comparison uses a network of one linear
layer, so that the step is nothing but overhead. `--epoch` adds WRN-16-1 on CIFAR-sized images through the whole data
path, against the hand-written loop with the same data path. One thread; medians of per-round ratios.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton import cli
from baton.data.images import ArraySet, ImageData
from baton.stage import BatonCLI  # noqa: F401 (imports everything before the clock starts)

WARM_UP = 50
CLOCK: list[float] = []


class _OneLayer(nn.Module):
    """The smallest network that obeys timm's protocol."""

    def __init__(self, num_classes: int = 10, **ignored: Any) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 48
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(48, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


default_cfgs = generate_default_cfgs(
    {"one_layer": {"input_size": (3, 4, 4), "mean": (0.0,) * 3, "std": (1.0,) * 3, "classifier": "fc"}}
)


@register_model
def one_layer(pretrained: bool = False, **kwargs: Any) -> _OneLayer:
    """Register the network under a name."""
    return build_model_with_cfg(_OneLayer, "one_layer", pretrained, **kwargs)


class Repeated:
    """The same batch again and again; reads the clock after the warm-up and at the end."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.rand(8, 3, 4, 4, generator=generator), torch.randint(10, (8,), generator=generator)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        CLOCK.clear()
        for step in range(self.steps):
            if step in (WARM_UP, self.steps - 1):
                CLOCK.append(time.perf_counter())
            yield self.batch


class Repeating(ImageData):
    """A data module around `Repeated`.

    Args:
        steps: batches an epoch.
    """

    classes = [str(number) for number in range(10)]

    def __init__(self, steps: int = 100) -> None:
        super().__init__()
        self.steps = steps

    def setup(self, stage: str | None = None) -> None:
        """Nothing to read."""

    def train_dataloader(self) -> Any:
        return Repeated(self.steps)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Noise(ImageData):
    """CIFAR-sized noise through Baton's whole data path.

    Args:
        length: number of images.
    """

    classes = [str(number) for number in range(10)]

    def __init__(self, length: int = 3840) -> None:
        super().__init__(batch_size=128, crop_padding=4, flip=True)
        self.length = length

    def sources(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.length, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return ArraySet(images, torch.randint(10, (self.length,), generator=generator)), None, None


class Plain(LightningModule):
    """The same step as a plain LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("one_layer")
        self.mean, self.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.backbone((batch[0] - self.mean) / self.std), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def bare_loop(steps: int) -> float:
    model = timm.create_model("one_layer")
    mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, targets in Repeated(steps):
        optimizer.zero_grad()
        F.cross_entropy(model((images - mean) / std), targets).backward()
        optimizer.step()
    return CLOCK[1] - CLOCK[0]


def barebones(steps: int) -> float:
    with _silent():
        Trainer(barebones=True, max_epochs=1, accelerator="cpu").fit(Plain(), Repeated(steps))
    return CLOCK[1] - CLOCK[0]


def baton_fit(steps: int) -> float:
    _fit("--data", f"{__name__}.Repeating", f"--data.steps={steps}", "--model.backbone=one_layer")
    return CLOCK[1] - CLOCK[0]


def _fit(*args: str) -> None:
    with tempfile.TemporaryDirectory() as root, _silent():
        code = cli.main(
            ["fit", "--model=Classification", *args, "--model.optimizer={name: momentum, lr: 0.01}",
             "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=true",
             f"--run.root={root}", "--run.name=r", "--run.wandb=false"]
        )  # fmt: skip
    assert code == 0


def _silent() -> Any:
    return contextlib.redirect_stdout(io.StringIO())


def epoch_bare() -> float:
    data = Noise()
    data.setup()
    model = timm.create_model("wrn_16_1", num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    start = time.perf_counter()
    for images, targets in data.train_dataloader():
        images = (data.augment(images) - mean) / std
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return time.perf_counter() - start


def epoch_baton() -> float:
    from baton.task import Task

    times = []
    hooks = Task.on_train_start, Task.on_train_end
    Task.on_train_start = lambda self: (hooks[0](self), times.append(time.perf_counter()))[0]  # type: ignore[method-assign]
    Task.on_train_end = lambda self: times.append(time.perf_counter())  # type: ignore[method-assign]
    try:
        _fit("--data", f"{__name__}.Noise", "--model.backbone=wrn_16_1")
    finally:
        Task.on_train_start, Task.on_train_end = hooks  # type: ignore[method-assign]
    return times[1] - times[0]


def alternate(ways: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Time every way once a round, in rotated order."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(ways[name]())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1050)
    parser.add_argument("--epoch", action="store_true", help="also a WRN-16-1 epoch (30 steps a round)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    ways = {"bare": bare_loop, "barebones": barebones, "baton": baton_fit}
    times = alternate({name: lambda way=way: way(args.steps) for name, way in ways.items()}, args.rounds)
    measured = args.steps - 1 - WARM_UP
    micros = {name: [1e6 * value / measured for value in values] for name, values in times.items()}
    added = {
        name: [value - bare for value, bare in zip(micros[name], micros["bare"], strict=True)]
        for name in ("barebones", "baton")
    }
    ratios = [ours / theirs for ours, theirs in zip(added["baton"], added["barebones"], strict=True)]
    print(f"bare loop                {statistics.median(micros['bare']):8.0f} us a step")
    print(f"Trainer(barebones=True) +{statistics.median(added['barebones']):8.0f} us")
    print(f"baton fit               +{statistics.median(added['baton']):8.0f} us")
    _verdict("baton adds / barebones adds", ratios, 1.2)
    if args.epoch:
        times = alternate({"bare": epoch_bare, "baton": epoch_baton}, args.rounds)
        ratios = [ours / bare for ours, bare in zip(times["baton"], times["bare"], strict=True)]
        print(f"WRN-16-1, 30 steps of 128: bare {statistics.median(times['bare']):.2f} s")
        _verdict("WRN-16-1 epoch, baton / bare loop", ratios, 1.05)


def _verdict(what: str, ratios: list[float], target: float) -> None:
    low, middle, high = statistics.quantiles(ratios, n=4)
    verdict = "pass" if middle <= target else "FAIL"
    print(f"{what}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}; target {target}) {verdict}")


if __name__ == "__main__":
    main()
