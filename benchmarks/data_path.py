"""How fast Baton brings CIFAR-size batches to floats: against per-sample PIL transforms and against kornia.

All contestants run in one process, in turns; a ratio is the median of the rounds' ratios, so that a machine that
slows down meanwhile slows all of them. With one thread its CPU time counts, which other programs hardly disturb; with
more, the time on the wall, which means little unless the machine is idle. Images are generated: nothing is downloaded.

    python benchmarks/data_path.py [--rounds 15] [--threads 1 2]

Exits 1 if a target is missed.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import kornia.augmentation as kornia
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from baton.data.images import ArraySet, ImageData

SAMPLES, BATCH = 10_240, 128
TARGETS = {"PIL per sample": 40.0, "kornia batches": 3.5}
"""How many times faster Baton has to be."""


class Generated(ImageData):
    """Random images in the shape of CIFAR-10."""

    classes = [str(label) for label in range(10)]

    def sources(self) -> tuple[ArraySet, None, None]:
        """Return the training split alone."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ArraySet(images, torch.randint(0, 10, (SAMPLES,), generator=generator)), None, None


class PerSample(Dataset):
    """What most projects do: one PIL image at a time, through torchvision's v1 transforms."""

    def __init__(self, images: np.ndarray, targets: list[int]) -> None:
        self.images, self.targets = images, targets
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def seconds_per_image(batches: Any, augment: Callable[[torch.Tensor], torch.Tensor], count: int) -> float:
    """Time `count` batches after two that do not count."""
    iterator = iter(batches)
    for _ in range(2):
        augment(next(iterator)[0])
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    images = sum(len(augment(next(iterator)[0])) for _ in range(count))
    return (clock() - start) / images


def race(rounds: int) -> dict[str, list[float]]:
    """Seconds per image of each contestant, by round."""
    data = Generated(batch_size=BATCH, crop_padding=4, flip=True)
    data.setup()
    arrays = data.train_set.images.permute(0, 2, 3, 1).contiguous().numpy()
    slow = DataLoader(PerSample(arrays, data.train_set.targets.tolist()), batch_size=BATCH, shuffle=True)
    batchwise = torch.nn.Sequential(
        kornia.RandomCrop((32, 32), padding=4, padding_mode="reflect", same_on_batch=False),
        kornia.RandomHorizontalFlip(same_on_batch=False),
    )
    contestants = {
        "Baton": lambda: seconds_per_image(data.train_dataloader(), data.augment, 40),
        "PIL per sample": lambda: seconds_per_image(slow, lambda images: images, 2),
        "kornia batches": lambda: seconds_per_image(
            data.train_dataloader(), lambda images: batchwise(data.to_float(images)), 10
        ),
    }
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            results[name].append(run())
    return {name: times[1:] for name, times in results.items()}  # the first round warms up


def report(threads: int, results: dict[str, list[float]]) -> bool:
    """Print a table of rates and ratios; whether all targets are met."""
    print(f"\nCIFAR-size batches of {BATCH}: index, random crop, flip, to float; {threads} thread(s)")
    print(f"{'path':<16}{'images/s':>12}{'Baton is':>12}{'quartiles':>16}{'target':>10}")
    print(f"{'Baton':<16}{1 / statistics.median(results['Baton']):>12,.0f}")
    passed = True
    for name, target in TARGETS.items():
        ratios = [other / own for other, own in zip(results[name], results["Baton"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        verdict = "pass" if middle >= target else "FAIL"
        passed &= middle >= target
        rate = f"{1 / statistics.median(results[name]):,.0f}"
        spread = f"{low:.1f} - {high:.1f}"
        print(f"{name:<16}{rate:>12}{f'{middle:.1f} x':>12}{spread:>16}{f'{target:g} x':>10}  {verdict}")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="kornia")
    passed = True
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        passed &= report(threads, race(arguments.rounds))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
