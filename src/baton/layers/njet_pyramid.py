"""N-Jet convolutions of several scales with the same weights, summed: a spatial pyramid whose scales are learned."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.layers.gaussian_jet import gaussian_jet_filters
from baton.layers.host_value import HostValue
from baton.layers.njet import NJetConv2d


class NJetPyramid2d(NJetConv2d):
    """Sum of N-Jet convolutions of scales σ_1 … σ_n that share their weights α: (B, in, H, W) to (B, out, H, W).

    With F(σ), the filters of `NJetConv2d`, it is y = Σ_s F(σ_s) * x. Pintea et al. (IEEE TIP 2021), section IV-B, put
    it in the place of DeepLabv2's four atrous convolutions (atrous spatial pyramid pooling). Since scales share α and
    responses are summed, it is one convolution with the filters Σ_s F(σ_s), whose basis is summed over the scales:

        Σ_s F(σ_s) = Σ_ij α_ij Σ_s b_i(σ_s) b_j(σ_s)'

    Those filters are as large as that of the largest scale. `filters` makes them and convolves. `separable` mixes
    channels first, z_ij = α_ij x, and then convolves the few output channels with columns and rows as matrices, so that
    it costs about as much as a 1 x 1 convolution to out · basis channels, whatever the scales:

        y = Σ_s Σ_i T_i(σ_s) (Σ_j z_ij T_j(σ_s)')

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        sigmas: scales at the start, in pixels.
        order: largest order of a derivative.
        extent: half side of a filter, in scales.
        stride: step in pixels.
        groups: as in `nn.Conv2d`.
        bias: add a learned constant to each output channel, one for all scales.
        size_rule: `paper` or `code`, see `NJetConv2d`.
        evaluation: `auto`, `filters` or `separable`.
        padding: `same` or `valid`.
        learn_sigma: whether scales are learned, or stay.
        init_std: standard deviation of α; None for the rule of `NJetConv2d`, of the summed filters.
        device: where the parameters are made.
        dtype: type of the parameters.

    Attributes:
        log2_sigma: base-2 logarithms of the scales, (scales,).

    Raises:
        ValueError: for no scales, or what `NJetConv2d` refuses.
    """

    sigmas: tuple[float, ...] = ()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sigmas: Sequence[float],
        order: int = 3,
        extent: float = 2.0,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        size_rule: str = "paper",
        evaluation: str = "auto",
        padding: str = "same",
        learn_sigma: bool = True,
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
            raise ValueError(f"Expected one scale or more in sigmas, all above 0 pixels, but got {list(sigmas)}.")
        super().__init__(
            in_channels, out_channels, order, sigmas[0], extent, stride, groups, bias, size_rule, evaluation, padding,
            init_std=init_std, device=device, dtype=dtype,
        )  # fmt: skip
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        empty = torch.empty(len(sigmas), device=device, dtype=dtype)
        self.log2_sigma = nn.Parameter(empty, requires_grad=learn_sigma)
        self._host_sigma = HostValue([math.log2(sigma) for sigma in sigmas])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw α afresh, and set the scales to what they were at the start and the bias to zero."""
        super().reset_parameters()
        if self.sigmas:  # not yet within the base's constructor
            with torch.no_grad():
                self.log2_sigma.copy_(torch.tensor(self.sigmas, dtype=torch.float64, device="cpu").log2())
            self.refresh()

    def _largest_gain(self, sigmas: Sequence[float] = ()) -> float:
        return super()._largest_gain(sigmas or self.sigmas)

    def _filters(self, reach: int) -> Float[Tensor, "out_channels group_channels side side"]:
        basis = gaussian_jet_filters(self.sigma, self.order, reach, self._half(reach)).sum(0)
        made = self.weight.to(basis.dtype) @ basis.flatten(1)
        return made.view(*self.weight.shape[:2], 2 * reach + 1, 2 * reach + 1)

    def _separable(self, x: Tensor, reach: int, padding: int) -> Tensor:
        matrices = (t.to(x.dtype) for t in self._matrices(x.shape[2], x.shape[3], reach, padding))
        mixing = self.weight.to(x.dtype).transpose(1, 2).flatten(0, 1)  # (out x basis, in / groups)
        mixed = F.conv2d(x, mixing[:, :, None, None], groups=self.groups)
        z = mixed.unflatten(1, (self.out_channels, -1)).transpose(2, 3)  # (b, out, h, basis, w)
        parts = []
        for columns, rows in zip(*matrices, strict=True):
            first = 0
            for i in range(self.order + 1):
                count = self.order + 1 - i  # of horizontal orders beside this vertical one
                part = z[:, :, :, first : first + count].flatten(3)  # (b, out, h, count x w)
                parts.append(columns[i] @ (part @ rows[:count].transpose(1, 2).flatten(0, 1)))
                first += count
        return sum(parts[1:], parts[0])

    def _is_separable(self, height: int, width: int, side: int) -> bool:
        """Choose the evaluation by multiplications an output, of which matrices' are less local."""
        if self.evaluation != "auto":
            return self.evaluation == "separable"
        if torch.compiler.is_exporting():
            return False
        channels, basis = self.in_channels // self.groups, self.weight.shape[2]
        products = basis * channels + len(self.sigmas) * ((self.order + 1) * height + basis * width)
        return side * side * channels > 2 * products
