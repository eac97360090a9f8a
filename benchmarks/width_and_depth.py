"""Wide against thin residual networks: what a training step of each takes, as figure 5.4 of Zagoruyko's thesis.

    python benchmarks/width_and_depth.py [--rounds 3] [--threads 1] [--batch 8] [--device cpu] [--picture FILE.png]
                                         [--networks ResNet-164 ResNet-1001 WRN-40-4 WRN-16-10 WRN-28-10]

A step is forward, cross-entropy and backward on images of 32 pixels, channels last. Every network alternates with
WRN-40-4 in one process; medians of the ratios of neighbours, with quartiles. On a Titan X with batches of 32 the thesis
finds that ResNet-1001 takes 8 times as long as WRN-40-4, whose error is about the same, and 1.6 times as long as
WRN-28-10. (`--batch 32` takes about 8 GB here for the activations of ResNet-1001 alone.)

The thin networks have the bottlenecks, layers and parameters of pre-activation ResNet-164 and ResNet-1001, but
BatchNorm and ReLU behind the convolutions instead of before them: `resnet_cifar(depth=6n + 2)`, n = 18 and n = 111.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from baton.backbones import create_backbone
from racing import race, report


class Network(NamedTuple):
    """A network of the figure, and its test error on CIFAR-10 in the thesis (tables 5.4 and 5.5)."""

    name: str
    kwargs: dict[str, Any]
    error: float


THIN = {"block": "bottleneck", "shortcut": "B"}
NETWORKS = {
    "ResNet-164": Network("resnet_cifar", {"depth": 110, **THIN}, 5.46),
    "ResNet-1001": Network("resnet_cifar", {"depth": 668, **THIN}, 4.92),
    "WRN-40-4": Network("wide_resnet", {"depth": 40, "width": 4}, 4.65),
    "WRN-16-10": Network("wide_resnet", {"depth": 16, "width": 10}, 4.56),
    "WRN-28-10": Network("wide_resnet", {"depth": 28, "width": 10}, 4.15),
}
REFERENCE = "WRN-40-4"
#: of a step of ResNet-1001 in steps of WRN-40-4
TARGET = 2.0


def step(network: Network, images: torch.Tensor, labels: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """A training step without the optimiser, and the network's number of parameters."""
    model = create_backbone(network.name, num_classes=10, **network.kwargs)
    model = model.to(images.device, memory_format=torch.channels_last).train()

    def run() -> int:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
        return 1

    return run, sum(parameter.numel() for parameter in model.parameters())


def draw(times: dict[str, float], title: str, path: Path) -> None:
    """Bars like the figure's: milliseconds on top, the thesis's error on CIFAR-10 inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(times) + 1.5, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colors = ["C0" if name.startswith("ResNet") else "C1" for name in times]
    bars = axis.bar(list(times), list(times.values()), color=colors)
    axis.bar_label(bars, [f"{milliseconds:.0f} ms" for milliseconds in times.values()], padding=2)
    axis.bar_label(bars, [f"{NETWORKS[name].error:.2f} %" for name in times], label_type="center", color="white")
    axis.set_ylabel("milliseconds a batch, forward and backward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    axis.tick_params("x", labelsize=9)
    axis.set_title(f"thin (blue) and wide: {title}\ninside: test error on CIFAR-10 in the thesis", fontsize=9)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="draw the bars into this file")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device).to(memory_format=torch.channels_last)
    labels = torch.arange(arguments.batch, device=arguments.device) % 10
    reference, size = step(NETWORKS[REFERENCE], images, labels)

    ratios: dict[str, list[float]] = {}
    sizes, times, theirs = {REFERENCE: size}, {}, []
    for name in [name for name in arguments.networks if name != REFERENCE]:
        run, sizes[name] = step(NETWORKS[name], images, labels)
        ours, other = race(run, reference, arguments.rounds)
        ratios[name] = [own / its for own, its in zip(ours, other, strict=True)]
        times[name] = 1000 * statistics.median(ours)
        theirs += other
    if not theirs:
        parser.error(f"--networks needs one besides {REFERENCE}, which all are compared with")
    times[REFERENCE], ratios[REFERENCE] = 1000 * statistics.median(theirs), [1.0, 1.0]

    print(f"{'network':12} {'parameters':>11} {'ms a batch':>11} {'ratio to ' + REFERENCE:>18}")
    for name in [name for name in NETWORKS if name in times]:
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        print(f"{name:12} {sizes[name]:11,} {times[name]:11.0f} {middle:8.3g} ({low:.3g} - {high:.3g})", flush=True)
    if arguments.picture is not None:
        title = f"batch {arguments.batch}, {arguments.device}"
        draw({name: times[name] for name in NETWORKS if name in times}, title, arguments.picture)
    if "ResNet-1001" not in ratios:
        return 0
    return 0 if report(f"ResNet-1001 / {REFERENCE}", ratios["ResNet-1001"], TARGET, at_least=True) else 1


if __name__ == "__main__":
    sys.exit(main())
