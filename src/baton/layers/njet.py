"""N-Jet convolutions: filters made of Gaussian derivatives, whose scale, and so whose size, is learned."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.layers.gaussian_jet import check_size_rule, gaussian_jet, gaussian_jet_filters, half_sizes, orders
from baton.layers.host_value import HostValue
from baton.layers.jet_convolution import jet_convolution, toeplitz_offsets

EVALUATIONS = ("auto", "filters", "separable")
#: By how much a scale may grow between two looks at an accelerator before its filters are cut off.
_HEADROOM = 1.2
#: How much slower a multiplication is in separable evaluation, as measured (benchmarks/njet.py): 0.7 to 2.3 on a CPU, 2
#: to 5 on a GPU with 192 channels in lower precision, more where a layer is too small to keep it busy.
_SLOWER, _SLOWER_ON_ACCELERATORS = 1.5, 3.0
#: Filters of so many pixels a side take twice as long for a multiplication on a CPU, whose fast kernels are for less.
_LARGE = 15
#: Parts of an octave in which compiled graphs know a scale.
_OCTAVE = 1024
#: Octaves that no scale reaches but one whose training diverged.
_MOST_OCTAVES = 16


class NJetConv2d(nn.Module):
    """Convolution whose filters are sums of Gaussian derivatives up to an order: (B, in, H, W) to (B, out, H', W').

    With the basis b_i(y; σ) b_j(x; σ), i + j <= order, of `gaussian_jet`, a filter is

        F(y, x) = Σ_ij α_ij b_i(y; σ) b_j(x; σ),          -half <= y, x <= half, half = ⌈extent σ⌉

    with one α for each pair of channels (eq. 5 of the paper) and σ = 2^s, so that σ stays above zero. Both are learned:
    σ through the shape of the basis, while the side, 2 half + 1, follows without gradient. What is outside the map is
    zero, and without stride the map keeps its side; `padding="valid"` takes whole filters alone.

    Both evaluations give the same to rounding: `filters` makes the filters and convolves; `separable` does not make
    them, and its cost does not grow with σ (see `jet_convolution`). `auto` chooses by cost.

    σ is read at every call where that is free, on the CPU. On an accelerator, and in compiled graphs, filters are made
    with some room around them, so that the same values come out without a look at σ (see `HostValue`). A compiled graph
    knows σ as it was when the mode was last set or `refresh` called, and is made anew when the room has changed since.

    Where paper and published code disagree: the paper's filter has 2 ⌈kσ⌉ + 1 pixels, the code's 2 ⌈kσ + 1/2⌉ + 1
    (`size_rule`). The code draws α from N(0, 1) whatever the fan-in, which needs a BatchNorm behind it:
    `init_std=1.0`. By default α is drawn as in Kaiming's rule, so that neither white noise nor a constant map becomes
    larger through layer and ReLU, and one of them keeps its mean square: maps behind a blur are between the two.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        order: largest order of a derivative, N; there are (N + 1)(N + 2) / 2 weights for a filter.
        sigma: scale at the start, in pixels.
        extent: k, the filter's half side in scales.
        stride: step in pixels.
        groups: as in `nn.Conv2d`.
        bias: add a learned constant to each output channel; it starts at zero.
        size_rule: `paper` or `code`.
        evaluation: `auto`, `filters` or `separable`.
        padding: `same` or `valid`.
        sigma_groups: how many scales there are, each of a group of consecutive filters: 1 is one a layer, the
            paper's, `out_channels` one a filter.
        learn_sigma: whether σ is learned, or stays.
        init_std: standard deviation of α; None for the default.
        device: where the parameters are made.
        dtype: type of the parameters.

    Attributes:
        weight: α, (out_channels, in_channels / groups, basis), in the order of `gaussian_jet.orders`.
        log2_sigma: s, (sigma_groups,). Weight decay pulls it to σ = 1: as any vector it is spared, unless the
            optimiser decays everything.

    Raises:
        ValueError: for sizes that cannot be built, for maps smaller than the filters where those must fit, and for a
            scale that is no number or has reached 2^16 pixels.
    """

    log2_sigma: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        order: int = 3,
        sigma: float = 1.0,
        extent: float = 2.0,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        size_rule: str = "paper",
        evaluation: str = "auto",
        padding: str = "same",
        sigma_groups: int = 1,
        learn_sigma: bool = True,
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, order, sigma, extent, stride, groups, sigma_groups)
        check_size_rule(size_rule)
        if evaluation not in EVALUATIONS:
            raise ValueError(f"Expected evaluation 'auto', 'filters' or 'separable', but got {evaluation!r}.")
        if padding not in ("same", "valid"):
            raise ValueError(
                f"Expected padding 'same' or 'valid', because filters change their size, but got {padding!r}."
            )
        if evaluation == "separable" and sigma_groups > 1 and groups > 1:
            raise ValueError("Several scales in a grouped convolution need evaluation='filters' (or 'auto').")
        self.in_channels, self.out_channels, self.order, self.extent = in_channels, out_channels, order, extent
        self.stride, self.groups, self.sigma_groups = stride, groups, sigma_groups
        self.size_rule, self.evaluation = size_rule, evaluation
        self.padding, self.init_std, self._initial_sigma = padding, init_std, sigma
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, len(orders(order)), **placed))
        self.log2_sigma = nn.Parameter(torch.empty(sigma_groups, **placed), requires_grad=learn_sigma)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **placed)) if bias else None)
        self._host_sigma = HostValue([math.log2(sigma)] * sigma_groups)  # of s, as the parameter
        self.register_load_state_dict_post_hook(_refresh)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw α afresh, and set σ to what it was at the start and the bias to zero."""
        std = self.init_std
        if std is None:
            std = math.sqrt(2 / (self.weight.shape[1] * self._largest_gain()))
        nn.init.normal_(self.weight, std=std)
        nn.init.constant_(self.log2_sigma, math.log2(self._initial_sigma))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.refresh()

    @property
    def sigma(self) -> Float[Tensor, " sigma_groups"]:
        """The scales, in pixels, differentiable."""
        return self.log2_sigma.to(_accurate(self.log2_sigma.dtype)).exp2()

    @property
    def host_sigma(self) -> float:
        """The smallest scale as the host knows it, in pixels: the finest detail that the layer lets through."""
        if torch.compiler.is_compiling():
            return 2.0 ** (self._seen_octaves / _OCTAVE)
        if self.log2_sigma.device.type == "cpu":
            self.refresh()
        return 2.0 ** min(self._host_sigma.values)

    @property
    def kernel_size(self) -> int:
        """Side of the largest filter at the present scales, in pixels; waits for the device."""
        self.refresh()
        return 2 * self._reach(exact=True) + 1

    def refresh(self) -> None:
        """Look at the scales, waiting for the device: after they were set by hand."""
        self._host_sigma.look(self.log2_sigma)
        # Graphs are compiled for whole numbers that a module holds, but take its fractions for data.
        self._seen_exact, self._seen_roomy = self._reach(exact=True), self._reach(exact=False)
        self._seen_octaves = round(min(self._host_sigma.values) * _OCTAVE)

    def train(self, mode: bool = True) -> "NJetConv2d":
        """Set the mode, and look at the scales."""
        super().train(mode)
        if not torch.compiler.is_compiling():
            self.refresh()
        return self

    def filters(self) -> Float[Tensor, "out_channels group_channels side side"]:
        """The filters at the present scales; smaller ones than the largest are surrounded by zeros."""
        return self._filters((self.kernel_size - 1) // 2)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Convolve.

        Raises:
            ValueError: for another number of channels, or integers; for a map smaller than a filter where padding is
                `valid`.
        """
        if x.shape[1] != self.in_channels:
            raise ValueError(f"Expected {self.in_channels} channels, but got a map of shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"Expected maps of real numbers, but got {x.dtype}: convert them with x.float().")
        self._host_sigma.follow(self.log2_sigma)
        valid = self.padding == "valid"
        if valid and self.log2_sigma.device.type != "cpu" and not torch.compiler.is_compiling():
            self.refresh()  # the shape of the output depends on it
        reach = self._reach(exact=valid or (x.device.type == "cpu" and not torch.compiler.is_compiling()))
        if valid and min(x.shape[2:]) <= 2 * reach:
            raise ValueError(
                f"Expected maps of at least {2 * reach + 1} pixels a side, as the filters have at their present scale, "
                f"but got {x.shape[2]} x {x.shape[3]}: use padding='same', larger maps or a smaller sigma."
            )
        dtype, full_precision = _precision(x)
        with full_precision:  # in which filters are made
            x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
            if not self._is_separable(x.shape[2], x.shape[3], 2 * reach + 1):
                return F.conv2d(
                    x, self._filters(reach).to(dtype), bias, self.stride, 0 if valid else reach, 1, self.groups
                )
            y = self._separable(x, reach, 0 if valid else reach)
            return y if bias is None else y + bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Its arguments, and the scales as the host knows them."""
        scales = [2.0**value for value in self._host_sigma.values]
        shown = f"{scales[0]:.3g}" if len(scales) == 1 else f"{min(scales):.3g}..{max(scales):.3g}"
        return (
            f"{self.in_channels}, {self.out_channels}, order={self.order}, sigma={shown}, extent={self.extent:g}, "
            f"stride={self.stride}, groups={self.groups}, bias={self.bias is not None}, size_rule={self.size_rule!r}, "
            f"evaluation={self.evaluation!r}, padding={self.padding!r}"
        )

    def _largest_gain(self, sigmas: Sequence[float] = ()) -> float:
        """The largest of what α of variance 1 makes of white noise of variance 1, and of a constant map of 1.

        Args:
            sigmas: scales whose filters are summed; without any, that of the start.
        """
        sigma = torch.tensor(sigmas or [self._initial_sigma], dtype=torch.float64, device="cpu")  # whatever the default
        half = half_sizes(sigma, self.extent, self.size_rule)
        basis = gaussian_jet_filters(sigma, self.order, int(half.max()), half).sum(0)
        return max(float(basis.square().sum()), float(basis.sum((1, 2)).square().sum()))

    def _reach(self, exact: bool) -> int:
        """Taps from the centre to the border that the filters have, or at most have."""
        if torch.compiler.is_compiling():
            return self._seen_exact if exact else self._seen_roomy
        octaves = self._host_sigma.values
        if not all(value < _MOST_OCTAVES for value in octaves):
            raise ValueError(
                f"Expected the scale of an N-Jet layer to stay below 2^{_MOST_OCTAVES} pixels, but training has made "
                f"it 2^{max(octaves):g}: lower the learning rate or clip the gradients, and start again."
            )
        sigma = 2.0 ** max(octaves) * (1.0 if exact else _HEADROOM)
        return int(half_sizes(torch.tensor(sigma, dtype=torch.float64, device="cpu"), self.extent, self.size_rule))

    def _half(self, reach: int) -> Float[Tensor, " sigma_groups"]:
        """Where the filters of each scale are cut off, at the latest at `reach`."""
        return half_sizes(self.sigma, self.extent, self.size_rule).clamp(max=reach)

    def _filters(self, reach: int) -> Float[Tensor, "out_channels group_channels side side"]:
        basis = gaussian_jet_filters(self.sigma, self.order, reach, self._half(reach))
        alpha = self.weight.to(basis.dtype).view(self.sigma_groups, -1, self.weight.shape[2])
        made = alpha @ basis.flatten(2)  # (sigma_groups, out x in / sigma_groups, side²)
        return made.view(*self.weight.shape[:2], 2 * reach + 1, 2 * reach + 1)

    def _matrices(
        self, height: int, width: int, reach: int, padding: int
    ) -> list[Float[Tensor, "sigma_groups orders out side"]]:
        """What convolves columns, and rows, with each derivative."""
        sigma, half = self.sigma, self._half(reach)
        made: dict[int, Tensor] = {}
        for side in {height, width}:
            out = (side + 2 * padding - 2 * reach - 1) // self.stride + 1
            offsets = toeplitz_offsets(side, out, self.stride, reach - padding, sigma.device)
            made[side] = gaussian_jet(sigma, self.order, reach, half, offsets)
        return [made[height], made[width]]

    def _separable(self, x: Tensor, reach: int, padding: int) -> Tensor:
        """Convolve without making filters, one group of scales after the other."""
        columns, rows = (t.to(x.dtype) for t in self._matrices(x.shape[2], x.shape[3], reach, padding))
        alpha = self.weight.to(x.dtype).permute(2, 0, 1).chunk(self.sigma_groups, 1)
        parts = [jet_convolution(x, alpha[k], columns[k], rows[k], self.groups) for k in range(self.sigma_groups)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _is_separable(self, height: int, width: int, side: int) -> bool:
        """Choose the evaluation by what both take, and by how much slower small products are than a convolution."""
        if self.evaluation != "auto":
            return self.evaluation == "separable"
        if torch.compiler.is_exporting() or (self.sigma_groups > 1 and self.groups > 1):
            return False
        filters, separable = self._multiplications(height, width, side)
        if self.weight.device.type != "cpu":
            return filters > _SLOWER_ON_ACCELERATORS * separable
        return filters * (2 if side >= _LARGE else 1) > _SLOWER * separable

    def _multiplications(self, height: int, width: int, side: int) -> tuple[int, int]:
        """What either evaluation takes for an output of each input channel."""
        mixed, basis = self.out_channels // self.groups, self.weight.shape[2]
        products = self.sigma_groups * ((self.order + 1) * height + basis * width) + basis * mixed
        return side * side * mixed, products


def _refresh(layer: NJetConv2d, _: Any) -> None:
    layer.refresh()


def njet_layers(model: nn.Module) -> list[tuple[str, NJetConv2d]]:
    """Every N-Jet convolution of a network with its name, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, NJetConv2d)]


def _check(
    in_channels: int,
    out_channels: int,
    order: int,
    sigma: float,
    extent: float,
    stride: int,
    groups: int,
    sigma_groups: int,
) -> None:
    """Refuse what cannot be built."""
    if order < 0:
        raise ValueError(f"Expected an order of 0 or more, the largest of a derivative, but got {order}.")
    if not 0 < sigma < math.inf:
        raise ValueError(f"Expected a scale sigma above 0 pixels, but got {sigma}.")
    if extent <= 0:
        raise ValueError(f"Expected an extent above 0 scales, but got {extent}.")
    if min(in_channels, out_channels, stride, groups) < 1:
        raise ValueError(
            f"Expected channels, stride and groups of 1 or more, but got {in_channels}, {out_channels}, {stride} and "
            f"{groups}."
        )
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"Expected channels that {groups} groups divide, but got {in_channels} and {out_channels}.")
    if sigma_groups < 1 or out_channels % sigma_groups:
        raise ValueError(
            f"Expected sigma_groups that divide the {out_channels} filters (1 is a scale for all), but got "
            f"{sigma_groups}."
        )


def _precision(x: Tensor) -> tuple[torch.dtype, AbstractContextManager[Any]]:
    """The type in which maps are convolved, and a context without autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return x.dtype, nullcontext()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype, torch.autocast(device, enabled=False)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """At least single precision."""
    return torch.promote_types(dtype, torch.float32)
