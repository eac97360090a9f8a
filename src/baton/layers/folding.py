"""Folding: BatchNorm, the Dirac parameterisation and N-Jet filters go into the weights of plain convolutions."""

import copy
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from baton.layers.dirac import DiracConv2d
from baton.layers.njet import NJetConv2d
from baton.layers.njet_pyramid import NJetPyramid2d
from baton.layers.subsampling import SubsampledNJet

Network = TypeVar("Network", bound=nn.Module)

#: What can be folded is of exactly these types: another class may compute something else.
_PARAMETERISED = (DiracConv2d, NJetConv2d, NJetPyramid2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_PARAMETERISED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def fold(model: Network) -> Network:
    """Copy a trained network so that its convolutions are plain and its BatchNorms are gone, and it computes the same.

    With a BatchNorm of running mean m and variance v, scale g and shift h after a convolution of effective weight Ŵ and
    bias c, the plain convolution has

        weight  g / sqrt(v + eps) Ŵ          bias  h + (c - m) g / sqrt(v + eps)

    An N-Jet convolution becomes one with its filters at the present scales, and safe subsampling stays as it is then.
    The BatchNorm may follow the subsampling: what averages pixels, with weights of sum one, changes places with it.

    Every BatchNorm must follow its convolution in an `nn.Sequential`, where the order of computation is certain; it is
    removed from there, and layers that are named by their number move up. A Dirac convolution without a BatchNorm
    becomes a plain one without bias. The rest stays, so that a folded backbone is still one: `forward_features`,
    `forward_head` and `forward_intermediates` give what they gave. A folded DiracNet has the tensors of its plain twin
    with `norm=False`: a chain of ReLUs and convolutions, Zagoruyko's thesis, section 5.3.1.

    The copy equals what the original computes in evaluation mode, whatever the mode of either, but for dropout.

    Args:
        model: any network, left as it is; it may itself be the convolution.

    Returns:
        A network of the same class.

    Raises:
        ValueError: for a BatchNorm that is not directly after a convolution, or that keeps no running statistics: use
            `plain_convolutions`.
    """
    folded = copy.deepcopy(model)
    for row in list(folded.modules()):
        if isinstance(row, nn.Sequential) and type(row).forward is nn.Sequential.forward:
            _fold_row(row)
    for name, module in folded.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            which = f"{name or 'the network itself'} ({type(module).__name__})"
            raise ValueError(
                "Expected every BatchNorm directly after a plain, Dirac or N-Jet convolution in an nn.Sequential, and "
                f"with running statistics, but {which} is not: it cannot be folded; plain_convolutions leaves "
                "BatchNorms as they are."
            )
    return _without_parameterisation(folded)


@torch.no_grad()
def plain_convolutions(model: Network) -> Network:
    """Copy a network so that plain convolutions take the place of its Dirac and N-Jet ones, and it computes the same.

    BatchNorms stay, wherever they are, and modules keep their names: for networks such as ResNets, whose BatchNorms
    `fold` cannot take away.

    Args:
        model: any network, left as it is; it may itself be the convolution.
    """
    return _without_parameterisation(copy.deepcopy(model))


def _without_parameterisation(model: Any) -> Any:
    """Put plain convolutions in their places; without one, the network stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, SubsampledNJet):
            module.fixed_sigma = module.sigma
        for name, child in module._modules.items():
            if isinstance(child, _PARAMETERISED):
                setattr(module, name, _plain(child))
    return _plain(model) if isinstance(model, _PARAMETERISED) else model


def _fold_row(row: nn.Sequential) -> None:
    """Fold every BatchNorm of a row into the convolution before it."""
    layers = dict(row._modules)  # a layer may act several times
    for (before, conv), (name, norm) in pairwise(row._modules.items()):
        if type(norm) not in _NORMS or norm.running_mean is None:
            continue
        if type(conv) in _CONVOLUTIONS:
            layers[before] = _plain(conv, norm)
            del layers[name]
        elif type(conv) is SubsampledNJet and type(conv.conv) in _CONVOLUTIONS:
            layers[before] = SubsampledNJet(_plain(conv.conv, norm), conv.subsample, conv.sigma).train(conv.training)
            del layers[name]
    if len(layers) < len(row):
        numbered = all(name.isdecimal() for name in layers)
        row._modules = {str(i) if numbered else name: layer for i, (name, layer) in enumerate(layers.items())}


def _plain(conv: Any, norm: Any = None) -> Any:
    """A convolution without parameterisation, that does what the BatchNorm after it did as well."""
    bias = conv.bias
    padding, dilation, mode, kind = 0, 1, "zeros", type(conv)
    if isinstance(conv, NJetConv2d):
        weight = conv.filters().to(conv.weight.dtype)
        padding = conv.kernel_size // 2 if conv.padding == "same" else 0
    else:
        weight = conv.effective_weight() if isinstance(conv, DiracConv2d) else conv.weight
        padding, dilation, mode = conv.padding, conv.dilation, conv.padding_mode
    if norm is not None:
        statistics = norm.running_mean, norm.running_var, norm.eps
        weight, bias = fuse_conv_bn_weights(weight, bias, *statistics, norm.weight, norm.bias)
    if kind in _PARAMETERISED:
        kind = nn.Conv2d
    channels, sizes = (conv.in_channels, conv.out_channels), weight.shape[2:]
    groups, biased = conv.groups, bias is not None
    plain = kind(*channels, tuple(sizes), conv.stride, padding, dilation, groups, biased, mode, device="meta")
    learns = conv.weight.requires_grad
    plain.weight = nn.Parameter(weight.detach(), learns)
    plain.bias = None if bias is None else nn.Parameter(bias.detach(), learns)
    return plain.train(conv.training)
