"""Sampled Gaussians and their derivatives, the basis of N-Jet filters, and how many taps a filter has.

Pintea, Tomen, Goes, Loog and van Gemert, "Resolution learning in deep convolutional networks using scale-space theory"
(IEEE Transactions on Image Processing 30, 2021; arXiv:2106.03412), section III. A filter of order N is a weighted sum
of the products b_i(y) b_j(x), i + j <= N, where b_m is the m-th derivative of a Gaussian times σ^m:

    b_m(x) = (-1)^m He_m(x / σ) g(x)          He_0 = 1, He_1(u) = u, He_m+1(u) = u He_m(u) - m He_m-1(u)

with the probabilists' Hermite polynomials He; written with the paper's H_m, it is (-1 / √2)^m H_m(x / (√2 σ)) g(x). The
Gaussian g is sampled at whole pixels, cut off after `half` pixels, and divided by its sum, as the published code does.
"""

import torch
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
    sigma: Float[Tensor, " groups"], order: int, offsets: Int[Tensor, " taps"], half: Float[Tensor, " groups"]
) -> Float[Tensor, "groups orders taps"]:
    """Sample b_0 to b_order (see the module) for each scale; differentiable in σ, through b_m and its normalisation.

    Args:
        sigma: scales, in pixels.
        order: highest derivative.
        offsets: of the taps from the centre, in pixels; they must cover -half to half.
        half: of each scale, where its filter is cut off: taps beyond are zero.
    """
    u = offsets / sigma[:, None]
    outside = offsets.abs() > half[:, None]
    g = (-0.5 * u * u).masked_fill(outside, -torch.inf).softmax(1)
    previous, current = torch.zeros_like(g), g
    rows = [g]
    for m in range(order):
        # b_m+1 = -(u b_m + m b_m-1)
        previous, current = current, -(u * current + m * previous)
        rows.append(current)
    return torch.stack(rows, dim=1)
