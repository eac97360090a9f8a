"""Convolution with N-Jet filters without making them: its cost does not depend on how large they are.

Every basis filter is a product of a column and a row. A convolution of a map with the column b_i is a product with the
banded Toeplitz matrix T_i, (out_height, height), whose entry [p, q] is b_i's tap at q - stride p; one with the row b_j
likewise. So the convolution is

    y = Σ_ij α_ij (T_i X T_j')

where α_ij, (out, in), mixes channels: matrix products alone, of a size that σ does not change.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from baton.layers.gaussian_jet import orders

#: Up to so many input channels (of a group) all maps are mixed in one product, as products of so few rows are slow.
_FEW_CHANNELS = 16


def toeplitz(
    taps: Float[Tensor, "orders taps"], side: int, out_side: int, stride: int, first: int
) -> Float[Tensor, "orders out_side side"]:
    """Matrices that convolve a column of `side` pixels with each row of taps; zeros lie beyond the border.

    Args:
        taps: an odd number, the centre in the middle.
        side: pixels that enter.
        out_side: pixels that leave.
        stride: pixels from one output to the next.
        first: pixel at which the first output is centred.
    """
    reach = taps.shape[1] // 2
    centres = first + stride * torch.arange(out_side, device=taps.device)
    offsets = torch.arange(side, device=taps.device) - centres[:, None]
    # a zero at either end stands for all that lies beyond
    return F.pad(taps, (1, 1))[:, (offsets + reach + 1).clamp(0, 2 * reach + 2)]


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
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, columns: Tensor, rows: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, alpha, columns, rows)
        ctx.groups = groups
        x = x.contiguous()
        batch, channels = x.shape[:2]
        height, width = columns.shape[1], rows.shape[1]
        mixing = alpha.unflatten(1, (groups, -1))  # (k, g, o, c)
        if channels // groups <= _FEW_CHANNELS:
            maps = _all_maps(x, columns, rows).unflatten(2, (groups, -1))  # (b, k, g, c, h, w)
            flat = maps.transpose(1, 2).reshape(batch, groups, -1, height * width)  # (b, g, k c, h w)
            y = mixing.permute(1, 2, 0, 3).flatten(2) @ flat
            return y.view(batch, -1, height, width)
        y = x.new_zeros(batch * groups, alpha.shape[1] // groups, height * width)
        for k, (_, _, _, h) in enumerate(_maps(x, columns, rows)):
            weight = (
                mixing[k].expand(batch, -1, -1, -1).flatten(0, 1) if groups > 1 else mixing[k].expand(batch, -1, -1)
            )
            y.baddbmm_(weight, h.view(batch * groups, -1, height * width))
        return y.view(batch, -1, height, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, alpha, columns, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            inputs = [t for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True) if needed]
            y = _composed(x, alpha, columns, rows, ctx.groups)
            found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None
        return *_gradients(
            x.contiguous(), alpha, columns, rows, ctx.groups, grad.contiguous(), ctx.needs_input_grad
        ), None


def _maps(x: Tensor, columns: Tensor, rows: Tensor) -> Any:
    """Yield i, j, the map after the column and that after column and row, of every basis filter."""
    last = None
    for i, j in orders(len(rows) - 1):
        if i != last:
            v, last = torch.matmul(columns[i], x), i
        yield i, j, v, torch.matmul(v, rows[j].T)


def _all_maps(x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([h for _, _, _, h in _maps(x, columns, rows)], dim=1)


def _gradients(
    x: Tensor, alpha: Tensor, columns: Tensor, rows: Tensor, groups: int, grad: Tensor, needed: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of x, alpha, columns and rows, as far as they are needed; those of both matrices come together."""
    batch, height, width = len(x), columns.shape[1], rows.shape[1]
    of_x = torch.zeros_like(x) if needed[0] else None
    of_alpha = torch.empty_like(alpha) if needed[1] else None
    taps = needed[2] or needed[3]
    of_columns, of_rows = (torch.zeros_like(columns), torch.zeros_like(rows)) if taps else (None, None)
    mixing = alpha.unflatten(1, (groups, -1))
    g = grad.view(batch, groups, -1, height * width)
    of_v = None
    for k, (i, j, v, h) in enumerate(_maps(x, columns, rows)):
        if of_alpha is not None:
            found = g @ h.view(batch, groups, -1, height * width).transpose(2, 3)  # (b, g, o, c)
            of_alpha[k] = found.sum(0).flatten(0, 1)
        if not (taps or needed[0]):
            continue
        of_h = (mixing[k].transpose(1, 2) @ g).view(h.shape)  # (b, c, h, w)
        if of_rows is not None:
            of_rows[j] += of_h.flatten(0, 2).T @ v.flatten(0, 2)
        step = torch.matmul(of_h, rows[j])
        of_v = step if of_v is None else of_v.add_(step)
        if j == len(rows) - 1 - i:  # the last of this i
            if of_columns is not None:
                of_columns[i] += torch.einsum("bchw,bcqw->hq", of_v, x)
            if of_x is not None:
                of_x += torch.matmul(columns[i].T, of_v)
            of_v = None
    return of_x, of_alpha, of_columns, of_rows
