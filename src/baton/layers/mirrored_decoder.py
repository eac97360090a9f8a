"""Decoders that mirror a plain row of layers, derived from an encoder that stays as it is: SAE and SWWAE.

Zhang, Lee, Lee, "Augmenting supervised neural networks with unsupervised objectives for large-scale image
classification" (ICML 2016). The row is cut into segments, each of which ends with a pooling; a decoder stage undoes a
segment: it unpools and runs the segment's convolutions backwards, with weights of its own.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.layers.njet import NJetConv2d
from baton.layers.subsampling import SubsampledNJet
from baton.layers.unpooling import SwitchedMaxPool2d, SwitchedUnpool2d, Switches

#: Layers that a decoder leaves out, because what they do has no inverse worth learning.
_LEFT_OUT = (nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.Dropout2d, nn.Identity)
_POOLINGS = (nn.MaxPool2d, nn.AvgPool2d)
_JETS = (NJetConv2d, SubsampledNJet)
_CONVOLUTIONS = (nn.Conv2d, *_JETS)


class Tap(NamedTuple):
    """What a segment of the encoder gives."""

    #: the map at its end, after the pooling
    map: Float[Tensor, "b c h w"]
    #: of its max-pooling, if it has one
    switches: Switches | None
    #: heights and widths of what its convolutions and average poolings saw, in order
    sizes: tuple[tuple[int, int], ...]


class PlainRow:
    """The layers of an encoder, in segments that end with a pooling; where there is none, with a strided convolution.

    An N-Jet layer is a convolution, and one that subsamples is a strided one, whose side may change from call to call.

    It holds the encoder's own layers, but for max-poolings, which have to tell where the maxima were. It has no
    parameters and is not a module, so that nothing is saved twice. What follows the last pooling, if there are
    convolutions, is a segment as well.

    Args:
        network: an encoder with `forward_features` that is a row: each layer sees what the one before gave.
        side: of an image that it can take, in pixels.

    Raises:
        ValueError: the network computes something else than a row of convolutions, norms, ReLUs and poolings, or it
            has an N-Jet layer without padding.
    """

    def __init__(self, network: Any, side: int) -> None:
        self.segments = [
            [SwitchedMaxPool2d.like(layer) if isinstance(layer, nn.MaxPool2d) else layer for layer in segment]
            for segment in _cut(_trace(network, side))
        ]

    @property
    def has_switches(self) -> bool:
        """Whether there is a max-pooling, without which `known` and `fixed` decoders are the same."""
        return any(isinstance(layer, SwitchedMaxPool2d) for segment in self.segments for layer in segment)

    def __call__(self, images: Float[Tensor, "b c h w"], depth: int | None = None) -> list[Tap]:
        """Run the encoder; the last tap's map is what its `forward_features` gives.

        Args:
            images: normalised, as the encoder wants them.
            depth: stop after so many segments; None runs them all.
        """
        taps, x = [], images
        for segment in self.segments[:depth]:
            sizes, switches = [], None
            for layer in segment:
                if isinstance(layer, SwitchedMaxPool2d):
                    x, switches = layer(x)
                    continue
                if isinstance(layer, (*_CONVOLUTIONS, nn.AvgPool2d)):
                    sizes.append((x.shape[2], x.shape[3]))
                x = layer(x)
            taps.append(Tap(x, switches, tuple(sizes)))
        return taps


class MirroredStage(nn.Module):
    """Undo one segment: from its end to its beginning, a ReLU after every convolution.

    A convolution becomes one with the same kernel and with input and output channels exchanged; a strided one becomes a
    transposed one; a max-pooling is undone by `SwitchedUnpool2d`, an average pooling by repeating its cells. An N-Jet
    layer becomes one of the same order, see `_MirroredJet`.

    Args:
        segment: layers of the encoder.
        mode: `known` puts values where the maxima were (SWWAE), `fixed` at a fixed pixel (SAE).
        linear_end: leave out the last ReLU, where the stage's output is an image.
    """

    def __init__(
        self, segment: Sequence[nn.Module], mode: Literal["known", "fixed"], *, linear_end: bool = False
    ) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for layer in reversed(segment):
            if isinstance(layer, _JETS):
                steps += [_MirroredJet(layer), nn.ReLU()]
            elif isinstance(layer, nn.Conv2d):
                steps += [_mirrored(layer), nn.ReLU()]
            elif isinstance(layer, SwitchedMaxPool2d):
                steps.append(SwitchedUnpool2d(mode))
            elif isinstance(layer, nn.AvgPool2d):
                steps.append(_Repeat())
        self.steps = nn.ModuleList(steps[:-1] if linear_end else steps)

    def forward(self, x: Float[Tensor, "b c h w"], tap: Tap) -> Float[Tensor, "b _ _ _"]:
        """Decode a map of the segment's end into one of its beginning; `tap` gives sizes and switches, not values."""
        sizes = iter(reversed(tap.sizes))
        for step in self.steps:
            if isinstance(step, SwitchedUnpool2d):
                assert tap.switches is not None
                x = step(x, tap.switches)
            elif isinstance(step, nn.ConvTranspose2d):
                x = step(x, output_size=list(next(sizes)))
            elif isinstance(step, _Repeat | _MirroredJet):
                x = step(x, next(sizes))
            else:
                if isinstance(step, nn.Conv2d):
                    next(sizes)  # its own padding gives this size
                x = step(x)
        return x


class MirroredDecoder(nn.Module):
    """A decoder of a whole row: for VGG-16, 13 convolutions and 14,714,179 parameters.

    Weights are Kaiming normal over the inputs (of N-Jet layers: their own default), biases zero. (The published code
    draws them with a standard deviation of 0.001, for which step 2 of its recipe, training the stages one by one, is
    indispensable.)

    Args:
        row: of the encoder.
        mode: `known` (SWWAE) or `fixed` (SAE), see `MirroredStage`.
        depth: decode from this segment, counted from 1; None: from the last.

    Raises:
        ValueError: the row has not so many segments.
    """

    def __init__(self, row: PlainRow, mode: Literal["known", "fixed"], depth: int | None = None) -> None:
        super().__init__()
        count = len(row.segments)
        if depth is not None and not 1 <= depth <= count:
            raise ValueError(f"Expected a depth between 1 and {count}, the encoder's poolings, but got {depth}.")
        self.stages = nn.ModuleList(
            MirroredStage(segment, mode, linear_end=index == 0) for index, segment in enumerate(row.segments[:depth])
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # of a transposed convolution, PyTorch counts the outputs as the inputs
                fan: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
                nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def top_down(self, taps: Sequence[Tap]) -> list[Tensor]:
        """Decode the last tap all the way; the outputs of all stages: the image first, then the maps of the taps."""
        x, outputs = taps[len(self.stages) - 1].map, []
        for stage, tap in zip(reversed(self.stages), reversed(taps[: len(self.stages)]), strict=True):
            x = stage(x, tap)
            outputs.append(x)
        return outputs[::-1]

    def layerwise(self, taps: Sequence[Tap]) -> list[Tensor]:
        """Decode every tap's own map by one stage: the image first, then the maps of the taps but the last."""
        return [stage(tap.map, tap) for stage, tap in zip(self.stages, taps, strict=False)]


class _Repeat(nn.Module):
    """Spread every cell over what an average pooling saw."""

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c _ _"]:
        return F.interpolate(x, size, mode="nearest")


class _MirroredJet(nn.Module):
    """The N-Jet layer that leads back: its cells are spread over what the encoder's layer saw, and convolved.

    It has the order, extent and groups of the encoder's, channels exchanged, a bias, and one scale of its own, which
    begins at the encoder's present one and is learned where that is. The adjoint of a filter is the filter mirrored,
    which a basis of even and odd functions holds as well. Where the encoder subsamples first (the rule of the N-Jet
    paper's code), this convolves first.

    Args:
        layer: of the encoder.
    """

    def __init__(self, layer: NJetConv2d | SubsampledNJet) -> None:
        super().__init__()
        jet: NJetConv2d = layer.conv if isinstance(layer, SubsampledNJet) else layer
        self.convolves_first = isinstance(layer, SubsampledNJet) and layer.subsample.rule == "code"
        self.conv = NJetConv2d(
            jet.out_channels, jet.in_channels, jet.order, jet.host_sigma, jet.extent, groups=jet.groups,
            size_rule=jet.size_rule, evaluation=jet.evaluation, learn_sigma=jet.log2_sigma.requires_grad,
            device=jet.weight.device, dtype=jet.weight.dtype,
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b _ _ _"]:
        """Give a map of the size that the encoder's layer saw."""
        if self.convolves_first:
            return F.interpolate(self.conv(x), size, mode="nearest")
        return self.conv(F.interpolate(x, size, mode="nearest"))


def _mirrored(conv: nn.Conv2d) -> nn.Module:
    """The convolution that leads back: same kernel and groups, channels exchanged, a bias."""
    placed: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    given: dict[str, Any] = {"groups": conv.groups, "dilation": conv.dilation, **placed}
    kernel: Any = conv.kernel_size
    reach = [dilation * (size - 1) for dilation, size in zip(conv.dilation, kernel, strict=True)]
    words = {"same": [r // 2 for r in reach], "valid": [0, 0]}
    padding: Any = words[conv.padding] if isinstance(conv.padding, str) else list(conv.padding)
    back: Any = tuple(r - p for r, p in zip(reach, padding, strict=True))
    if set(conv.stride) == {1} and min(back) >= 0:
        return nn.Conv2d(conv.out_channels, conv.in_channels, kernel, padding=back, **given)
    stride: Any = conv.stride
    return nn.ConvTranspose2d(conv.out_channels, conv.in_channels, kernel, stride, tuple(padding), **given)


def _trace(network: Any, side: int) -> list[nn.Module]:
    """The network's layers in the order in which they act, once it is sure that they are a row."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    # one that was folded no longer is an N-Jet layer
    jets = [m for m in network.modules() if isinstance(m, SubsampledNJet) and isinstance(m.conv, NJetConv2d)]
    inside = {part for jet in jets for part in jet.children()}
    leaves = jets + [m for m in network.modules() if m not in inside and not any(m.children())]
    hooks = [leaf.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))) for leaf in leaves]
    weight = next(network.parameters())
    training = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            images = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
            last = network.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    name = type(network).__name__
    for layer, *_ in seen:
        unpadded = isinstance(layer, NJetConv2d) and layer.padding == "valid"
        if unpadded or not isinstance(layer, (*_CONVOLUTIONS, *_POOLINGS, *_LEFT_OUT)):
            raise ValueError(
                f"A mirrored decoder needs a plain row of convolutions, norms, ReLUs and poolings, but {name} has a "
                f"{type(layer).__name__}{' without padding' * unpadded}: use a plain network such as vgg16_bn, "
                "vgg16_small or njet_nin."
            )
    chained = all(given is taken for (_, _, given), (_, taken, _) in pairwise(seen))
    if not seen or not chained or seen[-1][2] is not last:
        raise ValueError(
            f"A mirrored decoder needs a plain row of layers, each of which sees what the one before gave, but {name} "
            "has branches or computes something between its layers: use a plain network such as vgg16_bn, "
            "vgg16_small or njet_nin."
        )
    return [layer for layer, *_ in seen]


def _cut(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Segments: each ends with a pooling (or with what follows a strided convolution), the last with the row."""
    pooled = any(isinstance(layer, _POOLINGS) for layer in layers)
    segments: list[list[nn.Module]] = [[]]
    strided = False
    for layer in layers:
        if isinstance(layer, _CONVOLUTIONS) and strided:
            segments.append([])
            strided = False
        segments[-1].append(layer)
        if pooled and isinstance(layer, _POOLINGS):
            segments.append([])
        strided |= not pooled and _is_strided(layer)
    if not any(isinstance(layer, (*_CONVOLUTIONS, *_POOLINGS)) for layer in segments[-1]) and len(segments) > 1:
        rest = segments.pop()
        segments[-1] += rest
    return segments


def _is_strided(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that may make maps smaller."""
    if isinstance(layer, NJetConv2d):
        return layer.stride > 1
    return isinstance(layer, SubsampledNJet) or (isinstance(layer, nn.Conv2d) and max(layer.stride) > 1)
