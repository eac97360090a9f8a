"""Attention as the gradient of the loss with respect to the image, and terms that a second backward pass minimises.

Source: Zagoruyko's thesis, section 6.3.2 and table 6.3; Drucker and LeCun, "Improving generalization performance using
double backpropagation" (1992).

All gradients are those of a sample's own loss, not of the mean over the batch, so that no term depends on the batch
size or on the number of processes. The thesis writes the L2 norm in its equations 6.2 and 6.3, but differentiates its
square: the derivative that it gives, beta (J_S - J_T) d2L / dW dx, is that of beta / 2 times the *squared* norm. We
take the square, and leave the half to the weight: a weight is the thesis's beta / 2.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def input_gradient(
    losses: Float[Tensor, " batch"],
    images: Float[Tensor, "batch channels height width"],
    differentiable: bool = True,
) -> Float[Tensor, "batch channels height width"]:
    """J = dL / dx, the gradient of every sample's loss with respect to its own image.

    A layer that mixes samples, such as BatchNorm in training, adds what an image does to the losses of the others.

    Args:
        losses: of every sample, computed from `images`.
        images: which require a gradient.
        differentiable: keep what a second backward pass through J needs.
    """
    return torch.autograd.grad(losses.sum(), images, create_graph=differentiable)[0]


def gradient_attention_transfer(
    student_gradient: Float[Tensor, "batch channels height width"],
    teacher_gradient: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """||J_S - J_T||_2 squared, mean over the batch (equation 6.2): the student is to be as sensitive as the teacher.

    Args:
        student_gradient: J_S, from `input_gradient`.
        teacher_gradient: J_T, with respect to the same images.
    """
    return _squared_norm(student_gradient - teacher_gradient)


def gradient_symmetry(
    gradient: Float[Tensor, "batch channels height width"],
    flipped_gradient: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """||J(x) - flip(J(flip(x)))||_2 squared, mean over the batch (equation 6.3), for horizontal flips.

    The text before the equation also speaks of a loss on the outputs; we follow the equation, which has none.

    Args:
        gradient: with respect to the images.
        flipped_gradient: with respect to the flipped images, not yet flipped back.
    """
    return _squared_norm(gradient - flipped_gradient.flip(-1))


def gradient_penalty(gradient: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """||J||_2 squared, mean over the batch: double backpropagation, "min-l2" in table 6.3.

    Args:
        gradient: with respect to the images, from `input_gradient`.
    """
    return _squared_norm(gradient)


def _squared_norm(values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.square().sum() / len(values)
