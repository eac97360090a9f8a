"""What the reconstruction pathway costs: a joint step of SAE and SWWAE against the classifier's own step.

    python benchmarks/reconstruction.py [--rounds 7] [--threads 1] [--backbone vgg16_small] [--batch 32] [--device cpu]

`step`: forward and backward of the task (encoder, decoder, reconstruction losses, classification) against forward and
backward of the same backbone with its classifier. `saved`: bytes of all different tensors that autograd keeps for the
backward, parameters and buffers left out. The mirrored decoder alone doubles the convolutions. Both sides alternate in
one process; medians with quartiles.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from baton.ssl_tasks import Reconstruction
from racing import race, report

Batch = tuple[torch.Tensor, torch.Tensor]


def make(autoencoder: Any, variant: Any, arguments: argparse.Namespace) -> tuple[Reconstruction, Batch]:
    """The task in training mode, and a batch."""
    kwargs = {"drop_rate": 0.5} if arguments.backbone in ("vgg16", "vgg16_bn") else {}
    task = Reconstruction(autoencoder, variant, classification_weight=1.0, num_classes=10, backbone=arguments.backbone,
                          backbone_kwargs=kwargs, channels_last=arguments.channels_last)  # fmt: skip
    task.configure_model()
    side = task.backbone.pretrained_cfg["input_size"][-1]
    images = torch.rand(arguments.batch, 3, side, side, device=arguments.device)
    return task.to(arguments.device).train(), (images, torch.arange(arguments.batch, device=arguments.device) % 10)


def sides(task: Reconstruction, batch: Batch) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """The losses of the augmented network, and of the classifier alone."""
    images, labels = batch
    return lambda: task.losses(batch)["loss"], lambda: F.cross_entropy(task.backbone(task.normalize(images)), labels)


def step(task: Reconstruction, loss: Callable[[], torch.Tensor]) -> Callable[[], int]:
    """Forward and backward."""

    def run() -> int:
        loss().backward()
        task.zero_grad()
        return 1

    return run


def saved(task: Reconstruction, loss: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*task.parameters(), *task.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()
    del graph
    return sum(kept.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backbone", default="vgg16_small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    passed = True
    for autoencoder in ("sae", "swwae"):
        for variant in ("first", "all", "layerwise"):
            task, batch = make(autoencoder, variant, arguments)
            joint, bare = sides(task, batch)
            bytes_of = saved(task, joint), saved(task, bare)
            name = f"{autoencoder}-{variant}"
            passed &= report(f"{name}: bytes saved / classifier ({bytes_of[0] / 2**20:.0f} MiB)",
                             [bytes_of[0] / bytes_of[1]] * 2, 2.0)  # fmt: skip
            ours, other = race(step(task, joint), step(task, bare), arguments.rounds)
            ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
            passed &= report(f"{name}: step / classifier ({statistics.median(ours):.3f} s)", ratios, 2.25)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
