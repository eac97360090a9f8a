"""How far a reconstruction is from its target."""

from jaxtyping import Float
from torch import Tensor

#: Beside a target's energy, as a mean over its elements: a target that is zero everywhere must not divide by zero.
EPSILON = 1e-8


def euclidean(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Caffe's Euclidean loss: the sum of squares over 2 B, not divided by the number of elements.

    Args:
        output: of a decoder.
        target: what it should be.
    """
    return (output - target).square().sum() / (2 * len(target))


def relative(output: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """The sum of squares over the target's own, sample by sample, then the mean: 0 is perfect, 1 is as bad as zeros.

    It has the same scale for every map of every network, whatever the scale of its activations.

    Args:
        output: of a decoder.
        target: what it should be; without gradient in the divisor.
    """
    error = (output - target).square().flatten(1).mean(1)
    energy = target.detach().square().flatten(1).mean(1)
    return (error / (energy + EPSILON)).mean()
