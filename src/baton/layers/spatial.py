"""Spatial convolutions by the name of their kind, for networks that are built with one or the other."""

from collections.abc import Callable
from typing import Any

from torch import nn

from baton.layers.deformable import DeformableConv2d
from baton.layers.njet import NJetConv2d


def spatial_conv(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    bias: bool = True,
    groups: int = 1,
    **options: Any,
) -> nn.Module:
    """Make a convolution that keeps the side of maps, as far as its stride does (an even kernel pads more at the end).

    Args:
        kind: `conv`; `njet` (the kernel follows its scale, see `NJetConv2d`); `atrous` (option `dilation`, 2);
            `deformable` (Dai et al., 2017).
        in_channels: channels that enter.
        out_channels: channels that leave.
        kernel_size: side in pixels.
        stride: step in pixels.
        bias: whether there is one.
        groups: as in `nn.Conv2d`.
        **options: of the kind, and `device` and `dtype`.

    Raises:
        ValueError: for another kind, or an option that it does not have.
    """
    if kind not in _KINDS:
        raise ValueError(f"Expected a layer of kind {', '.join(map(repr, _KINDS))}, but got {kind!r}.")
    try:
        return _KINDS[kind](in_channels, out_channels, kernel_size, stride, bias, groups, **options)
    except TypeError as error:
        raise ValueError(f"Layers of kind {kind!r} do not take these options: {error}.") from error


def _conv(
    inside: int, outside: int, kernel: int, stride: int, bias: bool, groups: int, dilation: int = 1, **placed: Any
) -> nn.Module:
    reach = dilation * (kernel - 1)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias, **placed}
    if reach % 2 == 0:
        return nn.Conv2d(inside, outside, kernel, padding=reach // 2, **options)
    before, after = reach // 2, reach - reach // 2
    pad = nn.ZeroPad2d((before, after, before, after))
    return nn.Sequential(pad, nn.Conv2d(inside, outside, kernel, **options))


def _atrous(
    inside: int, outside: int, kernel: int, stride: int, bias: bool, groups: int, dilation: int = 2, **placed: Any
) -> nn.Module:
    return _conv(inside, outside, kernel, stride, bias, groups, dilation, **placed)


def _njet(inside: int, outside: int, kernel: int, stride: int, bias: bool, groups: int, **options: Any) -> nn.Module:
    return NJetConv2d(inside, outside, stride=stride, bias=bias, groups=groups, **options)


def _deformable(
    inside: int, outside: int, kernel: int, stride: int, bias: bool, groups: int, **options: Any
) -> nn.Module:
    return DeformableConv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=bias, **options)


_KINDS: dict[str, Callable[..., nn.Module]] = {
    "conv": _conv,
    "njet": _njet,
    "atrous": _atrous,
    "deformable": _deformable,
}
