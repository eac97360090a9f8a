"""Attention maps of features, and how far a student's are from its teacher's.

Source: Zagoruyko, "Weight parameterizations in deep neural networks" (thesis, 2018), section 6.3.1, which is Zagoruyko
and Komodakis, "Paying More Attention to Attention" (ICLR 2017), and its public code.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention_map(
    features: Float[Tensor, "batch channels height width"],
    power: float = 2,
    reduce: Literal["sum", "max"] = "sum",
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "batch cells"]:
    """Where a network looks: F_sum^p (A) = sum_i |A_i|^p or F_max^p (A) = max_i |A_i|^p over the channels i.

    Each sample's map is flattened row by row and divided by its L2 norm, so that the mean over channels, which is
    taken as in the public code, is as good as the sum. Half precision is widened first: squares would overflow.

    Args:
        features: signed activations of a layer.
        power: p of at least 1; F_sum of the thesis has p = 1, its experiments p = 2.
        reduce: over the channels.
        size: height and width that the map is averaged down to before it is normalised; None keeps its own.

    Returns:
        Rows of L2 norm 1, of height x width cells; zeros where all features are 0.

    Raises:
        ValueError: for a power below 1 or an unknown `reduce`.
    """
    if power < 1 or reduce not in ("sum", "max"):
        raise ValueError(f"Expected a power of at least 1 and reduce 'sum' or 'max', but got {power!r} and {reduce!r}.")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if reduce == "max":
        maps = features.abs().amax(1).pow(power)
    elif power == 2:
        maps = (features * features).mean(1)  # one pass; a norm over channels takes several times as long
    else:
        maps = features.abs().pow(power).mean(1)
    if size is not None and size != maps.shape[1:]:
        maps = F.adaptive_avg_pool2d(maps, size)
    return F.normalize(maps.flatten(1), dim=1, eps=1e-12)


def attention_transfer(
    student_maps: Sequence[Float[Tensor, "_ _"]],
    teacher_maps: Sequence[Float[Tensor, "_ _"]],
    form: Literal["code", "paper"] = "code",
) -> Float[Tensor, ""]:
    """How far the student's attention maps are from the teacher's: the sum over the pairs of a mean over the batch.

    The thesis and its public code disagree. With Q the normalised map of one sample, N cells:

        code    ||Q_S - Q_T||_2 squared, divided by N                  to be weighted with beta = 1000
        paper   ||Q_S - Q_T||_2 (equation 6.1, p = 2), not squared     to be weighted with beta / 2

    The default is the code's, with which the published numbers were made; the beta of "about 0.1" in the text of the
    thesis is the code's 1000 over cells and batch size. Weights do not carry over from one form to the other.

    Where maps differ in size, the larger is averaged down to the smaller: averages miss none of its attention, as
    interpolated points would, and invent none, as enlarging the smaller one would. Rows do not tell their height and
    width, so both must be squares then; others are given the same size by `attention_map(size=...)`.

    Args:
        student_maps: as `attention_map` returns them, (B, cells), one for each pair of layers.
        teacher_maps: in the same order.
        form: see above.

    Raises:
        ValueError: for no maps, maps without a partner, different maps that are no squares, or an unknown form.
    """
    if form not in ("code", "paper"):
        raise ValueError(f"Expected the form 'code' or 'paper', but got {form!r}.")
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            f"Expected as many maps of the student as of the teacher, at least one, but got {len(student_maps)} and "
            f"{len(teacher_maps)}."
        )
    distances = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        cells = min(student.shape[1], teacher.shape[1])
        difference = _averaged_down(student, cells) - _averaged_down(teacher, cells)
        if form == "code":
            distances.append(difference.square().mean())
        else:
            distances.append(torch.linalg.vector_norm(difference, dim=1).mean())
    return torch.stack(distances).sum()


def _averaged_down(maps: Float[Tensor, "batch cells"], cells: int) -> Float[Tensor, "batch fewer"]:
    if maps.shape[1] == cells:
        return maps
    old, new = math.isqrt(maps.shape[1]), math.isqrt(cells)
    if old**2 != maps.shape[1] or new**2 != cells:
        raise ValueError(
            f"Expected maps of the same size, or squares, but got {maps.shape[1]} and {cells} cells: give both the "
            "same `size` in `attention_map`."
        )
    return F.normalize(F.adaptive_avg_pool2d(maps.unflatten(1, (old, old)), new).flatten(1), dim=1, eps=1e-12)
