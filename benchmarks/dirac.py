"""DiracNets against their plain twins: what composing the weights adds to a training step.

    python benchmarks/dirac.py [--rounds 9] [--threads 1] [--sizes 16_1 34_1] [--batches 64 32 8] [--device cpu]

A step is forward, cross-entropy and backward on images of 32 pixels, channels last. Both networks alternate in one
process; medians of the ratios of neighbours, with quartiles. The cost does not depend on the batch, so that it shows
most in small ones.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

import baton  # noqa: F401
from racing import race, report

TARGETS = {64: 1.10, 32: 1.10, 8: 1.20}


def step(name: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    """A training step without the optimiser."""
    model = timm.create_model(name).to(images.device, memory_format=torch.channels_last).train()

    def run() -> int:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
        return 1

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["16_1", "34_1"])
    parser.add_argument("--batches", nargs="+", type=int, default=sorted(TARGETS, reverse=True))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    passed = True
    for size in arguments.sizes:
        for batch in arguments.batches:
            images = torch.randn(batch, 3, 32, 32, device=arguments.device).to(memory_format=torch.channels_last)
            labels = torch.arange(batch, device=arguments.device) % 10
            steps = [step(f"{kind}_{size}", images, labels) for kind in ("diracnet", "plain")]
            ours, other = race(*steps, arguments.rounds)
            ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
            cost = f"{1000 * statistics.median(ours):.0f} and {1000 * statistics.median(other):.0f} ms"
            what = f"batch {batch}: diracnet_{size} / plain_{size} ({cost})"
            passed &= report(what, ratios, TARGETS.get(batch, 1.20))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
