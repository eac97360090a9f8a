"""Full-activation transfer: a student regresses to the features of its teacher, FitNets' hints."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def hint_loss(
    student_features: Sequence[Float[Tensor, "_ _ _ _"]],
    teacher_features: Sequence[Float[Tensor, "_ _ _ _"]],
    normalize: bool = False,
) -> Float[Tensor, ""]:
    """Sum over the pairs of the mean, over all elements, of the squared difference of two feature tensors.

    Source: Romero et al., "FitNets" (2015), equation 3, who take half the sum over the elements of a sample, and the
    full-activation transfer of Zagoruyko's thesis, section 6.4.1.2, with "l2 normalization before transfer losses". We
    take the mean over elements, as public re-implementations do (RepDistiller), so that a weight does not depend on
    the size of a layer. Of maps that differ in size the larger is averaged down to the smaller.

    Args:
        student_features: (B, C, H, W) each; a regressor outside gives them the teacher's number of channels.
        teacher_features: in the same order.
        normalize: divide each sample's whole activation by its L2 norm first.

    Raises:
        ValueError: for no features, features without a partner, or different numbers of channels.
    """
    if not student_features or len(student_features) != len(teacher_features):
        raise ValueError(
            f"Expected as many features of the student as of the teacher, at least one, but got "
            f"{len(student_features)} and {len(teacher_features)}."
        )
    distances = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"Expected features with the same channels, but got {student.shape[1]} of the student and "
                f"{teacher.shape[1]} of the teacher: regress one to the other by a 1x1 convolution first."
            )
        size = common_size(student, teacher)
        pair = [_vectors(features, size, normalize) for features in (student, teacher)]
        distances.append((pair[0] - pair[1]).square().mean())
    return torch.stack(distances).sum()


def common_size(first: Float[Tensor, "_ _ _ _"], second: Float[Tensor, "_ _ _ _"]) -> tuple[int, int]:
    """The height and width to which two feature tensors can both be averaged down.

    Args:
        first: (B, C, H, W).
        second: (B, C', H', W').
    """
    height, width = (min(one, other) for one, other in zip(first.shape[2:], second.shape[2:], strict=True))
    return height, width


def _vectors(
    features: Float[Tensor, "batch channels height width"], size: tuple[int, int], normalize: bool
) -> Float[Tensor, "batch elements"]:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if size != features.shape[2:]:
        features = F.adaptive_avg_pool2d(features, size)
    return F.normalize(features.flatten(1), dim=1, eps=1e-12) if normalize else features.flatten(1)
