"""What do autoresolution networks look at? Held-out results when the low-resolution image loses something.

    baton chain configs/chains/autoresolution_table_1_small.yaml     # once, leaves the runs
    python benchmarks/autoresolution_shortcuts.py [--runs runs/autoresolution_table_1_small] [--data data]

For every seed of both objectives: its own validation images of CIFAR-10 at fixed places; the low-resolution image as
trained, upside down, with its pixels shuffled (one shuffle for all images), grey, or its mean colour everywhere; the
patches stay as they are. Accuracy (chance 0.5) of classification, error in pixels (and that of always answering the
centre) of regression.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baton.data import CIFAR10
from baton.ssl_tasks import Autoresolution

BATCH = 100


def shuffled(low: Tensor) -> Tensor:
    order = torch.randperm(low[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    return low.flatten(2)[:, :, order].view_as(low)


VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as trained": lambda low: low,
    "upside down": lambda low: low.flip(2),
    "its own pixels shuffled": shuffled,
    "grey": lambda low: low.mean(1, keepdim=True).expand_as(low),
    "its mean colour everywhere": lambda low: low.mean((2, 3), keepdim=True).expand_as(low),
}


@torch.inference_mode()
def measure(run: Path, images: Tensor) -> dict[str, float]:
    """Result of every variant; the last entry is chance."""
    task = Autoresolution.load_from_checkpoint(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    task.eval()
    average, metric = task.low_resolution, "accuracy" if task.objective == "classification" else "error_px"
    results = {}
    for name, change in VARIANTS.items():
        task.low_resolution = lambda images, change=change: change(average(images))
        parts = [task.evaluate((batch, torch.zeros(len(batch)))) for batch in images.split(BATCH)]
        results[name] = statistics.fmean(float(part[metric]) for part in parts)
    chance = [float(part.get("chance_error_px", torch.tensor(0.5))) for part in parts]
    return {**results, "chance": statistics.fmean(chance)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/autoresolution_table_1_small"))
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: sorted(arguments.runs.glob(f"{name}/seed_*/model")) for name in ("classification", "regression")}
    if not all(found.values()):
        print(f"There are no finished runs of both objectives in {arguments.runs}: run the chain first (see --help).")
        return 2
    for objective, models in found.items():
        rows = []
        for model in models:
            seed = int(model.parent.name.removeprefix("seed_"))
            data = CIFAR10(root=arguments.data, val_size=1000, seed=seed)
            data.setup()
            rows.append(measure(model.parent, data.to_float(data.val_set.__getitems__(range(len(data.val_set)))[0])))
        for name in rows[0]:
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            print(f"{objective:<16}{name:<28}{statistics.fmean(values):.3f}{spread}  (n = {len(values)})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
