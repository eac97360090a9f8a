"""Backbones by name: which there are, and how one is built."""

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import timm
from timm.models import is_model, model_entrypoint, split_model_name_tag
from torch import nn


def list_backbones(filter: str | Iterable[str] = "", baton_only: bool = False) -> list[str]:
    """Names of all backbones, timm's included, in natural order.

    Args:
        filter: wildcards such as `"wrn_*"`, one or several; empty for all names.
        baton_only: leave out the models that timm defines.
    """
    names = timm.list_models(filter)
    if baton_only:
        # by full module name: timm's own listing knows only its last part
        names = [name for name in names if model_entrypoint(name).__module__.startswith(f"{__package__}.")]
    return names


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Builds a backbone with fresh weights.

    Args:
        name: as `list_backbones` gives it; a tag of timm's (`"resnet18.a1_in1k"`) selects its mean, std and input size.
        **kwargs: arguments of the model, such as `num_classes`, `in_chans` or `drop_rate`. None means the default.

    Raises:
        ValueError: for an unknown name (the nearest ones are listed), tag or argument.
    """
    architecture, tag = split_model_name_tag(name)
    if ":" in name or not is_model(architecture):
        raise ValueError(_unknown_name(name, architecture))
    try:
        return timm.create_model(name, pretrained=False, **kwargs)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in kwargs:
            raise
        raise ValueError(
            f"Expected arguments that backbone {name!r} takes, but it has no {refused[1]!r}; "
            f"{advice(refused[1], _arguments(error))}."
        ) from error
    except RuntimeError as error:
        if not tag or "Invalid pretrained tag" not in str(error):
            raise
        known = timm.list_models(architecture, include_tags=True)
        raise ValueError(f"Expected one of {', '.join(known)}, but got {name!r}.") from error
    except AssertionError as error:  # how timm refuses a value, such as a pooling that a model does not have
        given = {key: value for key, value in kwargs.items() if key not in ("num_classes", "pretrained_cfg_overlay")}
        reason = str(error).partition("\n")[0] or "timm refuses a value"
        raise ValueError(f"The backbone {name!r} cannot be built with {given}: {reason}.") from error


def _arguments(error: TypeError) -> list[str]:
    """What those take who refused an argument, as far as the error shows them: timm's `model_cls`, or a part of it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    refusing = [frame.f_locals["model_cls"] for frame in frames if "model_cls" in frame.f_locals]
    name = str(error).partition(".")[0]
    parts = [frame.f_globals[name] for frame in frames if name in frame.f_globals]
    known = [inspect.signature(made).parameters.values() for made in (*refusing[-1:], *parts[-1:]) if callable(made)]
    return [taken.name for parameters in known for taken in parameters if taken.kind != taken.VAR_KEYWORD]


def advice(argument: str, known: Sequence[str]) -> str:
    """What to do about an argument that is not among the known ones, for the end of a sentence."""
    near = difflib.get_close_matches(argument, known, n=2, cutoff=0.6)
    if near or not known:
        return f"the nearest is {' or '.join(near)}" if near else "remove it"
    return f"it takes {', '.join(known[:20])}{' and others' if len(known) > 20 else ''}"


def _unknown_name(name: str, architecture: str) -> str:
    if ":" in name:
        return f"Expected the plain name of a backbone to build with fresh weights, but got the source {name!r}."
    nearest = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
    advice = f"the nearest are {', '.join(nearest)}" if nearest else "baton.list_backbones() gives them all"
    return f"Expected the name of a backbone, but got {name!r}, which neither Baton nor timm knows; {advice}."
