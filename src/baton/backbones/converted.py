"""Any network with other layers in place of its spatial convolutions: `converted`, so that recipes can name it.

`converted(base="resnet18", layer="njet", layer_kwargs={"order": 2})` is timm's ResNet-18 with N-Jet layers, as
`baton.layers.convert` makes it. It has the base's class, mean, std and input size, and what a run hands on rebuilds it
from its name and arguments like any other backbone.
"""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from baton.backbones.factory import advice, create_backbone
from baton.layers.conversion import convert
from baton.layers.dirac import DiracConv2d
from baton.layers.njet import NJetConv2d

LAYERS: dict[str, type[nn.Module]] = {"njet": NJetConv2d, "dirac": DiracConv2d}
#: What the converted network itself is given, beside `base_kwargs`.
_OWN = ("num_classes", "in_chans", "global_pool", "device", "dtype", "features_only", "out_indices")


def convert_backbone(
    base: str = "resnet18",
    layer: str = "njet",
    where: str | Sequence[str] | None = None,
    layer_kwargs: dict[str, Any] | None = None,
    base_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network and convert it; all weights are fresh.

    Args:
        base: name of a backbone.
        layer: `njet` or `dirac`.
        where: patterns of the names of convolutions that are replaced, such as `layer1.*`; None: all that can be.
        layer_kwargs: options of the layers, such as `order` and `sigma`.
        base_kwargs: further arguments of the base.
        **kwargs: `num_classes`, `in_chans` and whatever else the base takes.

    Raises:
        ValueError: for another base, layer or option, a pattern that matches nothing, and what cannot be replaced.
    """
    if layer not in LAYERS:
        raise ValueError(f"Expected layer {' or '.join(map(repr, LAYERS))}, but got {layer!r}.")
    base_kwargs = base_kwargs or {}
    twice = sorted(base_kwargs.keys() & {*_OWN, *kwargs})
    if twice:
        raise ValueError(
            f"Expected {twice[0]} beside base_kwargs, because it is the converted network's own, but got it in them."
        )
    try:
        model: Any = convert(create_backbone(base, **kwargs, **base_kwargs), LAYERS[layer], where, **layer_kwargs or {})
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in (layer_kwargs or {}):
            raise
        raise ValueError(
            f"Expected layer_kwargs that a layer {layer!r} takes, but it has no {refused[1]!r}; "
            f"{advice(refused[1], list(inspect.signature(LAYERS[layer]).parameters))}."
        ) from error
    model._model_args = {}  # those of the base; timm writes down ours
    return model


def _configuration(base: str, layer: str, where: str | Sequence[str] | None) -> Any:
    """The base's mean, std and input size, without its weights; None where there is no such base."""
    try:
        found = get_pretrained_cfg(base)
    except RuntimeError:  # no such tag: building the base says which there are
        return None
    if found is None:
        return None
    first = found.first_conv
    patterns = ["*"] if where is None else [where] if isinstance(where, str) else where
    names = [first] if isinstance(first, str) else list(first or ())
    if layer == "njet" and any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
        first = None  # timm cannot make weights of N-Jet layers fit other image channels
    without: dict[str, Any] = dict.fromkeys(
        ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag")
    )
    return dataclasses.replace(found, architecture="converted", custom_load=False, first_conv=first, **without)


default_cfgs = generate_default_cfgs({"converted": {"first_conv": None, "classifier": "fc"}})  # where a base has none


@register_model
def converted(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
    """Any network with N-Jet or Dirac layers, see `convert_backbone`: ResNet-18 with N-Jet layers by default."""
    described: dict[str, Any] = {"base": "resnet18", "layer": "njet", "where": None}
    described = {name: kwargs.get(name, default) for name, default in described.items()}
    options: dict[str, Any] = {"feature_cfg": {"feature_cls": "getter", "out_indices": None}, **kwargs}
    return build_model_with_cfg(
        convert_backbone,
        "converted",
        pretrained,
        pretrained_cfg=pretrained_cfg or _configuration(**described),
        **options,
    )
