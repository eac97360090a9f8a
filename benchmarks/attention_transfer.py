"""Attention transfer and distillation, WRN-16-2 to WRN-16-1 at batch 128, 32 px: what the terms add to a step.

    python benchmarks/attention_transfer.py [--rounds 9] [--threads 1] [--batch 128] [--device cpu]

Ours: attention transfer over the three groups and knowledge distillation, forward and backward to maps and class scores
that are there already. The other: the teacher's forward pass, the student's forward and backward pass with the
cross-entropy alone. Both sides alternate in one process; the median of the ratios of rounds with its quartiles.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F

from baton.backbones import create_backbone
from baton.losses import attention_map, attention_transfer, knowledge_distillation
from racing import race, report

BETA, ALPHA, TEMPERATURE = 1000.0, 0.9, 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    student = create_backbone("wrn_16_1", num_classes=10).to(arguments.device).train()
    teacher = create_backbone("wrn_16_2", num_classes=10).to(arguments.device).eval().requires_grad_(False)
    images = torch.rand(arguments.batch, 3, 32, 32, device=arguments.device)
    targets = torch.arange(arguments.batch, device=arguments.device) % 10

    with torch.no_grad():
        features, maps = student.forward_intermediates(images)
        their_features, their_maps = teacher.forward_intermediates(images)
        logits, their_logits = student.forward_head(features), teacher.forward_head(their_features)
    leaves = [logits.requires_grad_(), *(each.requires_grad_() for each in maps)]

    def terms() -> int:
        ours, theirs = ([attention_map(each) for each in features] for features in (leaves[1:], their_maps))
        loss = ALPHA * knowledge_distillation(leaves[0], their_logits, TEMPERATURE)
        (loss + BETA * attention_transfer(ours, theirs)).backward()
        for leaf in leaves:
            leaf.grad = None
        return 1

    def step() -> int:
        with torch.no_grad():
            teacher(images)
        F.cross_entropy(student(images), targets).backward()
        student.zero_grad()
        return 1

    ours, other = race(terms, step, arguments.rounds)
    ratios = [own / theirs for own, theirs in zip(ours, other, strict=True)]
    cost = f"{1000 * statistics.median(ours):.1f} ms of {1000 * statistics.median(other):.0f} ms"
    return 0 if report(f"attention transfer and distillation / teacher and student ({cost})", ratios, 0.04) else 1


if __name__ == "__main__":
    sys.exit(main())
