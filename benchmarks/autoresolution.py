"""Autoresolution on the paper's sizes: what tiling saves, what the task adds to its networks, and the memory of a step.

    python benchmarks/autoresolution.py [--rounds 5] [--threads 1] [--only tiled|step]

`tiled`: the patch tower unrolled over a 127 px super patch (47 x 47 predictions) against the same tower on separate
patches of 35 px (batches of 64), time per prediction. `step`: forward and backward of the task (averaging, random super
patches, both towers, head, loss) against a hand-written loop of the bare towers and the bare head on ready-made
low-resolution images and super patches; 256 px, batch 32. Both sides alternate in one process; medians of per-round
ratios with quartiles.
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from baton.backbones import create_backbone
from baton.ssl_tasks import Autoresolution
from racing import race, report

BATCH, SIZE, SUPER_PATCH, FIELD = 32, 256, 127, 35
TARGETS = {"tiled": 55.0, "step": 1.10}


def tiled() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One super patch, and 64 separate patches; both return the number of their predictions."""
    tower: Any = create_backbone("autoresolution_patch", num_classes=0).eval()
    super_patch, patches = torch.randn(1, 3, SUPER_PATCH, SUPER_PATCH), torch.randn(64, 3, FIELD, FIELD)

    def run(images: torch.Tensor) -> int:
        with torch.inference_mode():
            found = tower.forward_features(images)
        return len(found) * found.shape[2] * found.shape[3]

    return lambda: run(super_patch), lambda: run(patches)


def step() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The task's step, and the networks alone on ready-made views."""
    task = Autoresolution(backbone="autoresolution_image", channels_last=True)
    task.configure_model()
    task.train()
    images, targets = torch.rand(BATCH, 3, SIZE, SIZE), torch.zeros(BATCH, dtype=torch.long)
    low, patches = task.low_resolution(images), task.tiling.crop(images, *task.tiling.draw(images))
    low, patches = (x.contiguous(memory_format=torch.channels_last) for x in (low, patches))
    backbone, tower, head = task.backbone, task.patch_tower, task.head
    labels = torch.cat([torch.ones(BATCH, 47, 47), torch.zeros(BATCH, 47, 47)]).long()

    def bare() -> int:
        embedding = backbone.forward_features(low).mean((2, 3))
        logits = head(tower.forward_features(patches), embedding, (0, 1))
        F.cross_entropy(logits, labels).backward()
        task.zero_grad()
        return 1

    def ours() -> int:
        task.losses((images, targets))["loss"].backward()
        task.zero_grad()
        return 1

    return ours, bare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["tiled", "step"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    passed = True
    for name in [arguments.only] if arguments.only else list(TARGETS):
        ours, other = race(*{"tiled": tiled, "step": step}[name](), arguments.rounds)
        if name == "tiled":
            ratios = [theirs / own for own, theirs in zip(ours, other, strict=True)]
            passed &= report("separate patches / tiled, a prediction", ratios, TARGETS[name], at_least=True)
        else:
            ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
            what = f"task / bare networks, a step (of {statistics.median(ours):.2f} s)"
            passed &= report(what, ratios, TARGETS[name])
    print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
