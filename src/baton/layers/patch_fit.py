"""What a basis of Gaussian derivatives can show: an image patch, fitted by least squares."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from baton.layers.gaussian_jet import gaussian_jet, orders


def patch_basis(height: int, width: int, order: int, sigma: float) -> Float[Tensor, "basis height width"]:
    """Basis filters, in the order of `gaussian_jet.orders`, that fill a patch, in double precision.

    Args:
        height: odd, in pixels.
        width: odd, in pixels.
        order: largest order of a derivative.
        sigma: scale, in pixels.

    Raises:
        ValueError: for an even side, an order below 0, or a scale of 0 or less.
    """
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f"Expected a patch of odd sides, which has a centre, but got {height} x {width}.")
    if order < 0 or sigma <= 0:
        raise ValueError(f"Expected an order of 0 or more and a scale sigma above 0, but got {order} and {sigma}.")
    scale = torch.tensor([sigma], dtype=torch.float64)
    columns, rows = (
        gaussian_jet(scale, order, half, torch.tensor([float(half)], dtype=torch.float64))[0]
        for half in (height // 2, width // 2)
    )
    return torch.stack([columns[i, :, None] * rows[j] for i, j in orders(order)])


def fit_patch(
    patch: Float[Tensor, "channels height width"], order: int, sigma: float
) -> tuple[Float[Tensor, "channels height width"], Float[Tensor, "channels basis"]]:
    """Fit a patch by Gaussian derivatives of one scale, each channel on its own: the least squares of figure 3.

    Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412),
    section III-B: with order 3 and σ = 5, an RGB patch of 11 pixels comes out slightly blurred.

    Args:
        patch: of odd sides.
        order: largest order of a derivative.
        sigma: scale, in pixels.

    Returns:
        The fit, and the weights α of the basis filters, of which the smallest where several fit as well.

    Raises:
        ValueError: for an even side, an order below 0, or a scale of 0 or less.
    """
    basis = patch_basis(patch.shape[1], patch.shape[2], order, sigma).flatten(1)  # (basis, pixels)
    pixels = patch.detach().to("cpu", torch.float64).flatten(1)
    # Householder's rotations of the pixels, not the normal equations: high orders of a large scale are nearly alike
    alpha = torch.linalg.lstsq(basis.T, pixels.T, driver="gelsd").solution  # (basis, channels)
    fit = (alpha.T @ basis).view(patch.shape)
    return fit.to(patch), alpha.T.to(patch)


def draw_fits(
    patch: Float[Tensor, "3 height width"], fitted_orders: Sequence[int], sigma: float, zoom: int = 8
) -> Float[Tensor, "3 out_height out_width"]:
    """Put a patch and its fits side by side, enlarged, with a white gap between.

    Args:
        patch: RGB in [0, 1], of odd sides.
        fitted_orders: of the fits, from left to right.
        sigma: scale, in pixels.
        zoom: side of a pixel in the picture.
    """
    shown = [patch, *(fit_patch(patch, order, sigma)[0] for order in fitted_orders)]
    gap = patch.new_ones(3, zoom * patch.shape[1], zoom)
    parts: list[Tensor] = []
    for each in shown:
        large = each.clamp(0, 1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        parts += [gap, large] if parts else [large]
    return torch.cat(parts, 2)
