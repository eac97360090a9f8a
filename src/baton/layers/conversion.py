"""Conversion: N-Jet, Dirac or other layers in place of the spatial convolutions of any network."""

import copy
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from baton.layers.dirac import DiracConv2d
from baton.layers.njet import NJetConv2d

Network = TypeVar("Network", bound=nn.Module)
Where = str | Sequence[str] | Callable[[str, nn.Conv2d], bool] | None


def convert(model: Network, layer: type[nn.Module], where: Where = None, **options: Any) -> Network:
    """Copy a network with other layers in place of its spatial convolutions (kernels of more than one pixel).

    A new layer has the channels, the stride, the groups and the bias (if any) of the one that it replaces, keeps the
    side of maps as far as the stride does, and begins with fresh weights: nothing that was learned is carried over.
    An N-Jet layer replaces a kernel of any size and padding of half of it. A Dirac layer keeps the kernel and the
    padding, and has no bias, so that it replaces convolutions without one and without groups.

    Args:
        model: any network, left as it is.
        layer: `NJetConv2d` or `DiracConv2d`.
        where: patterns of names (`"layer1.*"`), or a function of a convolution's name and the convolution; None for
            all that can be replaced.
        **options: of the layer, such as `order` and `sigma`.

    Returns:
        A network of the same class.

    Raises:
        ValueError: for a layer that is not known, a pattern that no spatial convolution's name matches, or a
            convolution that is asked for by name and cannot be replaced.
    """
    if layer not in _REPLACEMENTS:
        names = ", ".join(kind.__name__ for kind in _REPLACEMENTS)
        raise ValueError(f"Expected one of the layers {names}, but got {getattr(layer, '__name__', layer)}.")
    converted = copy.deepcopy(model)
    found = list(_spatial_convolutions(converted))
    patterns = [where] if isinstance(where, str) else where if isinstance(where, Sequence) else []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, *_ in found):
            near = ", ".join(name for name, *_ in found[:4]) or "none"
            raise ValueError(
                f"Expected patterns of names of spatial convolutions, but {pattern!r} matches none of them: {near} ..."
            )
    made: dict[nn.Module, nn.Module] = {}
    for name, parent, last, conv in found:
        asked = (callable(where) and where(name, conv)) or any(fnmatchcase(name, pattern) for pattern in patterns)
        if where is not None and not asked:
            continue
        reason = _unfit(conv, layer)
        if reason is None:
            if conv not in made:  # one that acts in several places stays one
                made[conv] = _REPLACEMENTS[layer](conv, options)
            setattr(parent, last, made[conv])
        elif asked:
            raise ValueError(f"Expected a convolution that {layer.__name__} can replace, but {name} has {reason}.")
    if not made:
        raise ValueError(
            f"Expected a network with spatial convolutions, but {type(model).__name__} has none to replace."
        )
    return converted


def _spatial_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Conv2d]]:
    """Name, parent, name in the parent, and convolution, of all whose kernel has more than one pixel."""
    for path, parent in model.named_modules():
        for last, child in parent._modules.items():
            # subclasses too, as timm's pad as TensorFlow does; but not those that already are another layer
            if isinstance(child, nn.Conv2d) and not isinstance(child, DiracConv2d) and max(child.kernel_size) > 1:
                yield f"{path}.{last}".removeprefix("."), parent, last, child


def _unfit(conv: nn.Conv2d, layer: type[nn.Module]) -> str | None:
    """Why a convolution cannot be replaced, or None."""
    if len(set(conv.stride)) > 1:
        return f"the strides {conv.stride}"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}"
    if layer is NJetConv2d:
        padding = conv.padding
        half = all(
            pad == "same" or type(conv) is not nn.Conv2d or pad == size // 2
            for pad, size in zip(
                (padding, padding) if isinstance(padding, str) else padding,
                (step * (size - 1) + 1 for step, size in zip(conv.dilation, conv.kernel_size, strict=True)),
                strict=True,
            )
        )
        return None if half else f"padding {padding}, not half of its kernel {conv.kernel_size}"
    if conv.bias is not None:
        return "a bias"
    if conv.groups > 1:
        return f"{conv.groups} groups"
    if max(conv.dilation) > 1:
        return f"dilation {conv.dilation}"
    if not all(size % 2 for size in conv.kernel_size):
        return f"the even kernel {conv.kernel_size}"
    if isinstance(conv.padding, str) or type(conv) is not nn.Conv2d:
        return "padding that depends on the map"
    return None


def _placed(conv: nn.Conv2d) -> dict[str, Any]:
    return {"device": conv.weight.device, "dtype": conv.weight.dtype}


def _njet(conv: nn.Conv2d, options: dict[str, Any]) -> NJetConv2d:
    return NJetConv2d(
        conv.in_channels,
        conv.out_channels,
        **{"stride": conv.stride[0], "groups": conv.groups, "bias": conv.bias is not None, **_placed(conv), **options},
    ).train(conv.training)


def _dirac(conv: nn.Conv2d, options: dict[str, Any]) -> DiracConv2d:
    sizes: Any = (conv.kernel_size, conv.stride, conv.padding)
    return DiracConv2d(conv.in_channels, conv.out_channels, *sizes, **{**_placed(conv), **options}).train(conv.training)


_REPLACEMENTS: dict[type[nn.Module], Callable[[nn.Conv2d, dict[str, Any]], nn.Module]] = {
    NJetConv2d: _njet,
    DiracConv2d: _dirac,
}
