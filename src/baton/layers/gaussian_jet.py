"""Sampled Gaussians and their derivatives, the basis of N-Jet filters, and how many taps a filter has.

Pintea, Tomen, Goes, Loog and van Gemert, "Resolution learning in deep convolutional networks using scale-space theory"
(IEEE Transactions on Image Processing 30, 2021; arXiv:2106.03412), section III. A filter of order N is a weighted sum
of the products b_i(y) b_j(x), i + j <= N, where b_m is the m-th derivative of a Gaussian times σ^m:

    b_m(x) = (-1)^m He_m(x / σ) g(x)          He_0 = 1, He_1(u) = u, He_m+1(u) = u He_m(u) - m He_m-1(u)

with the probabilists' Hermite polynomials He; written with the paper's H_m, it is (-1 / √2)^m H_m(x / (√2 σ)) g(x). The
Gaussian g is sampled at whole pixels, cut off after `half` pixels, and divided by its sum, as the published code does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SIZE_RULES = ("paper", "code")
#: What rounding may add to extent * σ before the filter grows: σ = 1.5 must give 7 taps, though 2^log2(1.5) is above.
_ROUNDING = 1e-4


def orders(order: int) -> list[tuple[int, int]]:
    """Orders of the vertical and the horizontal derivative of each basis filter, (order + 1)(order + 2) / 2 of them.

    Args:
        order: largest sum of both.
    """
    return [(i, j) for i in range(order + 1) for j in range(order + 1 - i)]


def half_sizes(sigma: Float[Tensor, "..."], extent: float, rule: str = "paper") -> Float[Tensor, "..."]:
    """Pixels from a filter's centre to its border; its side is twice that and one. Without gradient.

    The paper has s = 2 ⌈k σ⌉ + 1 with k = `extent`; the published code 2 ⌈k σ + 1/2⌉ + 1, two pixels more as a rule.

    Args:
        sigma: scales, in pixels.
        extent: k, in scales.
        rule: whose rule.
    """
    reach = extent * sigma.detach() + (0.5 if rule == "code" else 0.0)
    return (reach - _ROUNDING).ceil()


def check_size_rule(rule: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        ValueError: for another rule.
    """
    if rule not in SIZE_RULES:
        raise ValueError(f"Expected size_rule 'paper' or 'code', but got {rule!r}.")


def gaussian_jet(
    sigma: Float[Tensor, " groups"],
    order: int,
    reach: int,
    half: Float[Tensor, " groups"],
    offsets: Int[Tensor, "..."] | None = None,
) -> Float[Tensor, "groups orders ..."]:
    """Sample b_0 to b_order (see the module) for each scale; differentiable in σ, through b_m and its normalisation.

    Args:
        sigma: scales, in pixels.
        order: highest derivative.
        reach: taps to either side of the centre, at least `half`.
        half: of each scale, where its filter is cut off: taps beyond are zero.
        offsets: where to sample, in pixels from the centre, of any shape; None for every tap, (2 reach + 1,).
    """
    return _Samples.apply(sigma, half, order, reach, offsets, False)


def gaussian_jet_filters(
    sigma: Float[Tensor, " groups"], order: int, reach: int, half: Float[Tensor, " groups"]
) -> Float[Tensor, "groups basis side side"]:
    """The products b_i(y) b_j(x) for each scale, in the order of `orders`; arguments as of `gaussian_jet`."""
    return _Samples.apply(sigma, half, order, reach, None, True)


class _Samples(torch.autograd.Function):
    """Both functions above. Slopes in σ have a closed form, so that the backward pass is one product and a sum."""

    @staticmethod
    def forward(
        ctx: Any, sigma: Tensor, half: Tensor, order: int, reach: int, offsets: Tensor | None, planar: bool
    ) -> Tensor:
        values, slopes = _sample(sigma, half, order, reach, offsets, planar, ctx.needs_input_grad[0])
        ctx.save_for_backward(sigma, half, offsets, slopes)
        ctx.options = order, reach, planar
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sigma, half, offsets, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            order, reach, planar = ctx.options
            slopes = _sample(sigma, half, order, reach, offsets, planar, True)[1]
        return (grad * slopes).flatten(1).sum(1), None, None, None, None, None


def _sample(
    sigma: Tensor, half: Tensor, order: int, reach: int, offsets: Tensor | None, planar: bool, with_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Samples and, where they are wanted, their derivatives in σ."""
    taps = torch.arange(-reach, reach + 1, device=sigma.device)
    u, bell = _bell(sigma, half, taps)
    total = bell.sum(1, keepdim=True)
    spread = (bell * u * u).sum(1, keepdim=True) / total if with_slopes else None  # the mean of u² under g
    if offsets is not None:
        u, bell = _bell(sigma, half, offsets.flatten())
    g = bell / total
    rows = [g]
    for m in range(order):
        # b_m+1 = -(u b_m + m b_m-1)
        rows.append(-(u * rows[m] + m * rows[m - 1]) if m else -u * g)
    values = torch.stack(rows, 1)
    shape = taps.shape if offsets is None else offsets.shape
    slopes = None if spread is None else _slopes(values, u, spread) / sigma[:, None, None]
    if planar:
        both = None if slopes is None else _products(slopes, values) + _products(values, slopes)
        return _products(values, values), both
    return values.unflatten(2, shape), None if slopes is None else slopes.unflatten(2, shape)


def _slopes(values: Tensor, u: Tensor, spread: Tensor) -> Tensor:
    """σ d b_m / dσ = m u b_m-1 + (u² - spread) b_m."""
    previous = F.pad(values[:, :-1], (0, 0, 1, 0))
    degrees = torch.arange(values.shape[1], device=values.device)[:, None]
    u = u[:, None]
    return degrees * u * previous + (u * u - spread[:, None]) * values


def _bell(sigma: Tensor, half: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets in scales, and the Gaussian there before it is normalised; its centre is 1."""
    u = offsets / sigma[:, None]
    return u, (-0.5 * u * u).exp().masked_fill(offsets.abs() > half[:, None], 0.0)


def _products(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Outer products of all `orders`."""
    count = vertical.shape[1]
    return torch.cat([vertical[:, i, None, :, None] * horizontal[:, : count - i, None] for i in range(count)], 1)
