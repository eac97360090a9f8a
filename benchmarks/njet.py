"""N-Jet layers: both evaluations against each other and a plain convolution, and networks in network with and without.

    python benchmarks/njet.py [--rounds 7] [--threads 1] [--batch 8] [--device cpu]
                              [--what layers rule memory networks synchronisation] [--precision 32 | tf32 | bf16]

A layer's step is forward and backward, a network's is cross-entropy, too, on images of 32 pixels. Whoever is compared
alternates in one process; medians of the ratios of neighbours, with quartiles. `layers` also prints what `auto` takes
and the factor at which its rule would be indifferent: the larger, the better filters are; `rule` asks it of maps of
several sides, and what `auto` costs where it is wrong. `synchronisation` needs a GPU: a training step in which any look
at σ is an error. A GPU does ten steps in a row before anyone waits for it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import baton  # noqa: F401
from baton.layers import NJetConv2d
from racing import race, report

SIGMAS = (0.5, 1.0, 1.5, 2.0, 3.0)
#: Separable evaluation of order 2 against filters, σ = 2.
LAYER_TARGETS = {64: 0.65, 192: 0.35}
#: A network's step against the plain one's, by order.
NETWORK_TARGETS = {2: 1.20, 3: 1.60}


def repeated(step: Callable[[], None], device: torch.device, precision: str) -> Callable[[], int]:
    """Take the step in a precision, on a GPU ten times."""
    count = 1 if device.type == "cpu" else 10

    def run() -> int:
        for _ in range(count):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                step()
        return count

    return run


def layer_step(layer: nn.Module, x: torch.Tensor, precision: str) -> Callable[[], int]:
    """Forward and backward."""
    layer.to(x.device)

    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad()
        x.grad = None

    return repeated(step, x.device, precision)


def network_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Callable[[], int]:
    """A training step."""
    network.to(images.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return repeated(step, images.device, precision)


def layers(arguments: Any) -> bool:
    """Filters, separable and auto against a 3 x 3 convolution."""
    passed = True
    for channels in (16, 64, 192):
        x = torch.randn(arguments.batch, channels, 32, 32, device=arguments.device, requires_grad=True)
        for order in (2, 3):
            for sigma in SIGMAS:
                ways = [
                    NJetConv2d(channels, channels, order, sigma, evaluation=way)
                    for way in ("filters", "separable", "auto")
                ]
                chosen = "separable" if ways[2]._is_separable(32, 32, ways[2].kernel_size) else "filters"
                base = layer_step(nn.Conv2d(channels, channels, 3, padding=1), x, arguments.precision)
                steps = [layer_step(layer, x, arguments.precision) for layer in ways]
                races = [race(step, base, arguments.rounds) for step in steps]
                of_conv = [statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in races]
                what = f"{channels} channels, order {order}, σ = {sigma}"
                filters, separable = ways[0]._multiplications(32, 32, ways[0].kernel_size)
                factor = filters / separable * of_conv[1] / of_conv[0]
                print(f"{what}: filters {of_conv[0]:.2f}, separable {of_conv[1]:.2f}, auto {of_conv[2]:.2f} "
                      f"({chosen}), indifferent at {factor:.2f}", flush=True)  # fmt: skip
                if order == 2 and sigma == 2.0 and channels in LAYER_TARGETS:
                    pair = race(steps[1], steps[0], arguments.rounds)
                    ratios = [own / theirs for own, theirs in zip(*pair, strict=True)]
                    passed &= report(f"{what}: separable / filters", ratios, LAYER_TARGETS[channels])
    return passed


def rule(arguments: Any) -> bool:
    """What `auto` takes, against the better of both evaluations."""
    losses = []
    for side, channels in ((28, 8), (32, 16), (32, 64), (64, 8), (64, 16), (64, 64), (112, 8), (112, 64), (224, 16)):
        batch = max(1, arguments.batch * 2**16 // (side**2 * channels))
        x = torch.randn(batch, channels, side, side, device=arguments.device, requires_grad=True)
        for order in (2, 3):
            for sigma in (0.5, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 5.0):
                pair = [NJetConv2d(channels, channels, order, sigma, evaluation=w) for w in ("filters", "separable")]
                steps = [layer_step(layer, x, arguments.precision) for layer in pair]
                times = [statistics.median(times) for times in race(*steps, arguments.rounds)]
                auto = NJetConv2d(channels, channels, order, sigma, device=arguments.device)
                separable = auto._is_separable(side, side, auto.kernel_size)
                losses.append(times[separable] / min(times))
                print(f"{side} px, {channels} channels, order {order}, σ = {sigma}: filters / separable "
                      f"{times[0] / times[1]:.2f}, auto takes {'separable' if separable else 'filters'}, "
                      f"{losses[-1]:.2f} x the better", flush=True)  # fmt: skip
    print(f"auto / the better evaluation: {max(losses):.2f} at most")
    return report("auto / the better evaluation, geometric mean", [statistics.geometric_mean(losses)] * 2, 1.05)


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out."""
    sizes: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in layer.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


def memory(arguments: Any) -> bool:
    """Bytes kept for the backward pass, of what a 3 x 3 convolution keeps."""
    passed = True
    for channels in (16, 64, 192):
        x = torch.randn(32, channels, 32, 32, device=arguments.device, requires_grad=True)
        base = kept(nn.Conv2d(channels, channels, 3, padding=1, device=arguments.device), x)
        for order in (2, 3, 4):
            for way in ("filters", "separable"):
                layer = NJetConv2d(channels, channels, order, 2.0, evaluation=way, device=arguments.device)
                ratio = kept(layer, x) / base
                passed &= report(
                    f"bytes kept, {channels} channels, order {order}, {way} / convolution", [ratio] * 2, 2.0
                )
    return passed


def networks(arguments: Any) -> bool:
    """N-Jet-NIN with its poolings kept against NIN."""
    passed = True
    images = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
    labels = torch.arange(arguments.batch, device=arguments.device) % 10
    for order in (2, 3):
        for sigma in (0.5, 1.0, 2.0, 3.0):
            pair = [
                timm.create_model("njet_nin", subsample="pool", order=order, sigma=sigma),
                timm.create_model("njet_nin_plain"),
            ]
            ours, theirs = race(
                *(network_step(network, images, labels, arguments.precision) for network in pair), arguments.rounds
            )
            ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
            what = f"step of njet_nin / njet_nin_plain, order {order}, σ = {sigma}"
            passed &= report(what, ratios, NETWORK_TARGETS[order])
    return passed


def synchronisation(arguments: Any) -> bool:
    """A step in which the host must not wait for the device."""
    if torch.device(arguments.device).type != "cuda":
        print("synchronisation: needs --device cuda")
        return True
    images = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
    labels = torch.arange(arguments.batch, device=arguments.device) % 10
    step = network_step(timm.create_model("njet_nin", subsample="pool"), images, labels, "32")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print("synchronisation: none in 100 steps, and three looks at each σ")
    return True


WHAT = {"layers": layers, "rule": rule, "memory": memory, "networks": networks, "synchronisation": synchronisation}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("32", "tf32", "bf16"), default="32")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high" if arguments.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = arguments.precision == "tf32"
    torch.set_num_threads(arguments.threads)
    return 0 if all([WHAT[name](arguments) for name in arguments.what]) else 1


if __name__ == "__main__":
    sys.exit(main())
