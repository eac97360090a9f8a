"""What the N-Jet layers of a network have in common: `Jets`, the options of every N-Jet network."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from baton.layers.njet import NJetConv2d
from baton.layers.subsampling import SafeSubsample, SubsampledNJet


class Jets:
    """Makes the N-Jet layers of a network, one after the other, in place of its spatial convolutions.

    Args:
        count: how many layers the network has.
        order: largest order of a derivative.
        sigma: scale at the start, in pixels: of all layers, or a list of each layer's.
        learn_sigma: whether scales are learned, or stay.
        extent: k, a filter's half side in scales.
        size_rule: `paper` or `code`, see `NJetConv2d`.
        evaluation: `auto`, `filters` or `separable`.
        sigma_groups: scales in each layer; it must divide every layer's filters.
        init_std: standard deviation of the weights α at the start: 1 in the published code, whose layers are followed
            by BatchNorm; `auto` keeps maps from growing (see `NJetConv2d`), as a deep network needs, whose maps would
            else overflow in evaluation mode as long as BatchNorm has not seen any.
        r: of safe subsampling, the scale at which a map is halved (see `SafeSubsample`).
        rule: of safe subsampling, `paper` or `code`.
        mode: of safe subsampling, how maps are interpolated.

    Raises:
        ValueError: for a list of another number of scales; for sizes that cannot be built.
    """

    def __init__(
        self,
        count: int,
        order: int = 2,
        sigma: float | Sequence[float] = 1.0,
        learn_sigma: bool = True,
        extent: float = 2.0,
        size_rule: str = "paper",
        evaluation: str = "auto",
        sigma_groups: int = 1,
        init_std: float | str = "auto",
        r: float = 4.0,
        rule: str = "paper",
        mode: str = "nearest",
    ) -> None:
        sigmas = [sigma] * count if isinstance(sigma, int | float) else list(sigma)
        if len(sigmas) != count:
            raise ValueError(
                f"Expected one sigma, or a list of {count} for the N-Jet layers of the network, but got {len(sigmas)}."
            )
        self._sigmas = iter(sigmas)
        self._options: dict[str, Any] = {
            "order": order,
            "learn_sigma": learn_sigma,
            "extent": extent,
            "size_rule": size_rule,
            "evaluation": evaluation,
            "sigma_groups": sigma_groups,
            "init_std": checked_std(init_std),
        }
        self._subsample = partial(SafeSubsample, r, rule, mode)
        self._subsample()  # refuses what it cannot do, whether it is needed or not

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        bias: bool = True,
        subsampled: bool = False,
        **placed: Any,
    ) -> nn.Module:
        """Make the next layer.

        Args:
            in_channels: channels that enter.
            out_channels: channels that leave.
            kernel_size: of the convolution that it stands for; the scale replaces it.
            stride: step in pixels; safe subsampling takes its place.
            bias: whether there is one.
            subsampled: whether the layer subsamples as far as its scale allows.
            **placed: `device` and `dtype` of the parameters.
        """
        step = 1 if subsampled else stride
        options = {**self._options, **placed, "sigma": float(next(self._sigmas))}
        conv = NJetConv2d(in_channels, out_channels, stride=step, bias=bias, **options)
        return SubsampledNJet(conv, self._subsample()) if subsampled else conv


def checked_std(init_std: float | str) -> float | None:
    """The layers' `init_std`: None for `auto`, which timm would not let through.

    Raises:
        ValueError: for another word, or a number below 0.
    """
    if init_std == "auto":
        return None
    if isinstance(init_std, str) or init_std < 0:
        raise ValueError(f"Expected init_std 'auto', or a number of 0 or more, but got {init_std!r}.")
    return float(init_std)


def check_subsample(given: str, known: Sequence[str]) -> None:
    """Refuse a way to subsample that a network does not have.

    Raises:
        ValueError: for another one.
    """
    if given not in known:
        raise ValueError(f"Expected subsample {', '.join(map(repr, known))}, but got {given!r}.")
