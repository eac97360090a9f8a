"""An N-Jet convolution by hand, for tests of networks: filters of numpy's Hermite polynomials, made one by one."""

import math

import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import herme2poly


def convolved(x, alpha, log2_sigma, order, stride=1):
    """The paper's filters with k = 2, "same" padding, one scale; differentiable in all that is given."""
    sigma = 2.0 ** log2_sigma[0]
    half = math.ceil(2 * sigma.item() - 1e-6)
    points = torch.arange(-half, half + 1, dtype=x.dtype)
    g = torch.exp(-(points**2) / (2 * sigma**2))
    g, u = g / g.sum(), points / sigma
    axis = [(-1) ** m * sum(c * u**k for k, c in enumerate(herme2poly([0] * m + [1]))) * g for m in range(order + 1)]
    pairs = [(i, j) for i in range(order + 1) for j in range(order + 1 - i)]
    filters = sum(alpha[..., k, None, None] * torch.outer(axis[i], axis[j]) for k, (i, j) in enumerate(pairs))
    return F.conv2d(x, filters, stride=stride, padding=half)


def shrunk(x, height, width):
    """Interpolate to the nearest pixel: i of n from floor(i * old / n)."""
    down = [i * x.shape[2] // height for i in range(height)]
    across = [i * x.shape[3] // width for i in range(width)]
    return x[:, :, down][:, :, :, across]


def normed(x, scale, shift):
    """BatchNorm in training."""
    x = x - x.mean((0, 2, 3), keepdim=True)
    x = x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
