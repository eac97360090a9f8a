"""Which samples a split keeps: stratified, seeded, independent of the machine."""

import torch
from jaxtyping import Int
from torch import Tensor


def split_stratified(
    targets: Int[Tensor, " samples"], size: float, *, seed: int
) -> tuple[Int[Tensor, " rest"], Int[Tensor, " taken"]]:
    """Take `size` samples so that every class keeps its share; both parts stay in the original order.

    Args:
        targets: class of every sample; unlabelled samples (-1) count as one class.
        size: a number of samples, or a fraction below 1.
        seed: draws the samples.

    Returns:
        Indices of the rest and of the taken samples.

    Raises:
        ValueError: if `size` does not leave at least one sample on both sides.
    """
    total = len(targets)
    count = round(size * total) if size < 1 else int(size)
    if not 0 < count < total:
        raise ValueError(f"Expected to take between 1 and {total - 1} of {total} samples, got {size:g}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    order = order[targets[order].argsort(stable=True)]
    # Systematic sampling: every (total / count)-th sample of the classes laid end to end, from a random start. Every
    # sample is equally likely, and no class is off its share by a whole sample.
    start = torch.randint(total, (1,), generator=generator)
    positions = (torch.arange(count) * total + start) // count
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[positions]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def take_per_class(targets: Int[Tensor, " samples"], count: int, *, seed: int) -> Int[Tensor, " kept"]:
    """Take `count` samples of each class, in the original order.

    Args:
        targets: class of every sample; unlabelled samples (-1) are never taken.
        count: samples a class.
        seed: draws the samples.

    Raises:
        ValueError: if a class has fewer than `count` samples, or there are no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    labels = targets[order]
    kept = []
    for label in labels[labels >= 0].unique().tolist():
        members = order[labels == label]
        if len(members) < count:
            raise ValueError(f"labels_per_class asks for {count} samples, but class {label} has only {len(members)}.")
        kept.append(members[:count])
    if not kept or count < 1:
        raise ValueError(f"labels_per_class={count} needs labelled samples and a count of at least 1.")
    return torch.cat(kept).sort().values
