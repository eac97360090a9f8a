"""Convolution with N-Jet filters without making them: its cost does not depend on how large they are.

Every basis filter is a product of a column and a row. A convolution of a map with the column b_i is a product with the
banded Toeplitz matrix T_i, (out_height, height), whose entry [p, q] is b_i's tap at q - stride p; one with the row b_j
likewise. So the convolution is

    y = Σ_ij α_ij (T_i X T_j')

where α_ij, (out, in), mixes channels: matrix products alone, of a size that σ does not change.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baton.layers.gaussian_jet import orders


def toeplitz_offsets(
    side: int, out_side: int, stride: int, first: int, device: torch.device | None = None
) -> Int[Tensor, "out_side side"]:
    """From the centre of every output to every pixel: a row of taps sampled there is a matrix that convolves with it.

    Args:
        side: pixels that enter.
        out_side: pixels that leave.
        stride: pixels from one output to the next.
        first: pixel at which the first output is centred.
        device: where they are made.
    """
    centres = first + stride * torch.arange(out_side, device=device)
    return torch.arange(side, device=device) - centres[:, None]


def jet_convolution(
    x: Float[Tensor, "batch in_channels height width"],
    alpha: Float[Tensor, "basis out_channels group_channels"],
    columns: Float[Tensor, "orders out_height height"],
    rows: Float[Tensor, "orders out_width width"],
    groups: int = 1,
) -> Float[Tensor, "batch out_channels out_height out_width"]:
    """Convolve as the module says; differentiable twice, the second time slowly.

    For the backward pass only the arguments are kept: maps are computed again.

    Args:
        x: input.
        alpha: weights of the basis filters, in the order of `orders`.
        columns: the matrices T_i of the vertical direction.
        rows: those of the horizontal one.
        groups: as in a convolution.
    """
    return _JetConvolution.apply(x, alpha, columns, rows, groups)


def _composed(x: Tensor, alpha: Tensor, columns: Tensor, rows: Tensor, groups: int) -> Tensor:
    """The same of plain operations, whose gradients can be differentiated."""
    maps = torch.stack([columns[i] @ x @ rows[j].T for i, j in orders(len(rows) - 1)])  # (k, b, c, h, w)
    split = maps.unflatten(2, (groups, -1))
    return torch.einsum("kbgchw,kgoc->bgohw", split, alpha.unflatten(1, (groups, -1))).flatten(1, 2)


class _JetConvolution(torch.autograd.Function):
    """Rows first, all orders at once, then what has the same horizontal order j together: few and large products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, columns: Tensor, rows: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, alpha, columns, rows)
        ctx.groups = groups
        batch, height, width = len(x), columns.shape[1], rows.shape[1]
        y = x.new_zeros(batch * groups, alpha.shape[1] // groups, height * width)
        for j, part in enumerate(_by_rows(x, rows)):
            maps, mixing = _stacked(columns, j) @ part, _mixing(alpha, len(rows) - 1, j, groups)
            y.baddbmm_(_for_all(mixing, batch), maps.view(batch * groups, mixing.shape[2], height * width))
        return y.view(batch, alpha.shape[1], height, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, alpha, columns, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            inputs = [t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True) if needed]
            y = _composed(x, alpha, columns, rows, ctx.groups)
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None
        return *_gradients(x, alpha, columns, rows, ctx.groups, grad.contiguous(), ctx.needs_input_grad), None


def _by_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Maps convolved with the rows of every order, each (batch · channels, height, out_width)."""
    flat = x.contiguous().flatten(0, 1)
    return (flat @ rows.flatten(0, 1).T).split(rows.shape[1], 2)


def _stacked(columns: Tensor, j: int) -> Tensor:
    """The columns of the orders that go with a horizontal order j, one below the other."""
    return columns[: len(columns) - j].flatten(0, 1)


def _places(last: int, j: int) -> list[int]:
    """Where the basis filters of the horizontal order j are."""
    return [k for k, (_, horizontal) in enumerate(orders(last)) if horizontal == j]


def _mixing(alpha: Tensor, last: int, j: int, groups: int) -> Tensor:
    """Weights of the maps of horizontal order j: (groups, out, channels · orders)."""
    return torch.stack([alpha[k] for k in _places(last, j)], -1).unflatten(0, (groups, -1)).flatten(2)


def _for_all(mixing: Tensor, batch: int) -> Tensor:
    """The same weights for every image, without a copy unless there are groups."""
    return mixing.expand(batch, -1, -1, -1).flatten(0, 1)


def _gradients(
    x: Tensor, alpha: Tensor, columns: Tensor, rows: Tensor, groups: int, grad: Tensor, needed: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of x, alpha, columns and rows, as far as they are needed; those of both matrices come together."""
    batch, channels, last = *x.shape[:2], len(rows) - 1
    pixels = grad.shape[2] * grad.shape[3]
    g = grad.view(batch * groups, alpha.shape[1] // groups, pixels)
    taps = needed[2] or needed[3]
    of_columns = torch.zeros_like(columns) if taps else None
    of_alpha: dict[int, Tensor] = {}
    of_parts = []
    for j, part in enumerate(_by_rows(x, rows)):
        stacked = _stacked(columns, j)
        if needed[1]:
            maps = (stacked @ part).view(batch * groups, channels // groups * len(_places(last, j)), pixels)
            found = (g @ maps.transpose(1, 2)).unflatten(0, (batch, groups)).sum(0)  # (g, o, c orders)
            by_order = found.unflatten(2, (channels // groups, -1)).flatten(0, 1).unbind(2)
            of_alpha.update(zip(_places(last, j), by_order, strict=True))
        if not (taps or needed[0]):
            continue
        mixing = _mixing(alpha, last, j, groups).transpose(1, 2)
        of_maps = (_for_all(mixing, batch) @ g).view(batch * channels, len(stacked), grad.shape[3])
        of_parts.append(stacked.T @ of_maps)
        if of_columns is not None:
            summed = torch.einsum("npw,nhw->ph", of_maps, part)
            of_columns[: last + 1 - j] += summed.view(-1, *columns.shape[1:])
    of_x, of_rows = None, None
    if of_parts:
        of_all = torch.cat(of_parts, 2).flatten(0, 1)
        of_x = (of_all @ rows.flatten(0, 1)).view(x.shape) if needed[0] else None
        of_rows = (of_all.T @ x.reshape(-1, x.shape[3])).view(rows.shape) if taps else None
    weights = torch.stack([of_alpha[k] for k in range(len(alpha))]) if of_alpha else None
    return of_x, weights, of_columns, of_rows
