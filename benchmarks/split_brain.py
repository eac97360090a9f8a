"""Split-brain at the poster's size (96 px, batch 64, 12 x 12 cells): what the targets cost, and what the task adds.

    python benchmarks/split_brain.py [--rounds 5] [--threads 1] [--base fc_resnet18] [--device cpu] [--only step]

`targets`: the quantizer alone against a whole training step of the pair (task, backward, Adam). `step`: forward and
backward of the task (colour conversion, targets, both halves, losses, metrics) against the two bare halves on
ready-made channels and ready-made targets. Both sides alternate in one process; medians with quartiles.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from baton.ssl_tasks import SplitBrain
from racing import race, report

BATCH, SIZE, CELLS = 64, 96, 12


def make(base: str, space: Any, device: str) -> tuple[SplitBrain, torch.Tensor]:
    """The task in training mode, and images."""
    task = SplitBrain(space, size=CELLS, backbone="split_brain", backbone_kwargs={"base": base}, channels_last=True)
    task.configure_model()
    return task.to(device).train(), torch.rand(BATCH, 3, SIZE, SIZE, device=device)


def targets(task: SplitBrain, images: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The targets, and a training step."""
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-4)
    batch = images, torch.zeros(len(images), device=images.device)

    def quantize() -> int:
        task.quantizer(images)
        return 1

    def step() -> int:
        task.losses(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1

    return quantize, step


def step(task: SplitBrain, images: torch.Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The task's forward and backward, and the halves' alone."""
    batch = images, torch.zeros(len(images), device=images.device)
    first, rest = (seen.contiguous(memory_format=torch.channels_last) for seen in task.backbone.see(images))
    of_first, of_rest = task.quantizer(images)

    def ours() -> int:
        task.losses(batch)["loss"].backward()
        task.zero_grad()
        return 1

    def bare() -> int:
        to_rest = F.adaptive_avg_pool2d(task.backbone.first.forward_features(first), CELLS)
        to_first = F.adaptive_avg_pool2d(task.backbone.rest.forward_features(rest), CELLS)
        (F.cross_entropy(to_rest, of_rest) + F.cross_entropy(to_first, of_first)).backward()
        task.zero_grad()
        return 1

    return ours, bare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--base", default="fc_resnet18")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["targets", "step"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    passed = True
    for space in () if arguments.only == "step" else ("rgb", "lab", "lab_rescaled", "lab_gamut"):
        task, images = make(arguments.base, space, arguments.device)
        ours, other = race(*targets(task, images), arguments.rounds)
        ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
        cost = f"{1000 * statistics.median(ours):.1f} ms of {statistics.median(other):.3f} s"
        passed &= report(f"{space}: targets / training step ({cost})", ratios, 0.10)
    if arguments.only == "targets":
        return 0 if passed else 1
    task, images = make(arguments.base, "lab_rescaled", arguments.device)
    ours, other = race(*step(task, images), arguments.rounds)
    ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
    passed &= report(f"lab_rescaled: task / bare halves ({statistics.median(ours):.3f} s)", ratios, 1.10)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
