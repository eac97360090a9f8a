"""The `model/` folder one stage leaves behind for the next: its two files, and how they are written and read.

`model.safetensors` and `config.json` have timm's own (Hugging Face) layout; `config.json` has one more entry, `baton`:
format and code version, the run's config and metrics, SHA-256 of the tensors, the chain of parents, and a teacher.
A folder is written beside its place, read back, and only then takes it: nobody ever finds half a model.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from baton import __version__
from baton.backbones import create_backbone

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ACCEPTED = (
    "a model/ folder, a run directory, a Baton checkpoint (.ckpt), wandb:entity/project/name:alias or timm:model.tag"
)
# What a network says about its input: it belongs to the weights and travels with them, unlike timm's notes on a source.
_TRAVELS = ("input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size")
# Arguments of timm's factory that say where weights come from; a file decides neither that nor its own class count.
_NOT_KWARGS = {"num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
# What reading relies on, in config.json and in its `baton` entry.
_TYPES = {
    **{"architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict, "baton": dict},
    **{"format": int, "backbone_kwargs": dict, "sha256": str},
}


def write_model(
    folder: str | Path,
    backbone: nn.Module,
    *,
    backbone_kwargs: dict[str, Any],
    config: dict[str, Any],
    metrics: Mapping[str, float],
    parent: dict[str, Any] | None,
    teacher: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    replace: bool = False,
) -> str:
    """Writes a `model/` folder, reads it back, and only then gives it its name.

    A crash, a full disk or a network that its own name and arguments cannot rebuild leaves `folder` as it was. Files
    that somebody put beside a model stay there when another model takes its place.

    Args:
        folder: the folder to write, with the parents it needs.
        backbone: the network; compiled, channels_last and shared tensors are written plainly.
        backbone_kwargs: all arguments it was built with.
        config: the run's config, plain values.
        metrics: final metrics.
        parent: where the run's weights started (`Source.lineage()`), if not from scratch.
        teacher: what the run learned from (`Source.lineage()`), if it had a teacher.
        classes: names of the classes, in the order of the classifier's outputs.
        replace: put the new model in the place of another one.

    Returns:
        The SHA-256 of the tensors.

    Raises:
        ValueError: another model is there already, the folder cannot be written, or the network cannot be rebuilt.
    """
    folder = Path(folder).expanduser().absolute()
    partial, previous = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "previous"))
    backbone = getattr(backbone, "_orig_mod", backbone)
    tensors = _plain_tensors(backbone)
    record = _record(backbone_kwargs, config, metrics, tensors_sha256(tensors), parent)
    record |= {"teacher": teacher} if teacher else {}
    entries = {"baton": record} | ({"label_names": classes} if classes else {})
    try:
        if previous.exists() and not folder.exists():  # killed between the two renames of an earlier call
            previous.rename(folder)
        _check_free(folder, record["sha256"], replace)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        safetensors.torch.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        save_config_for_hf(backbone, str(partial / CONFIG), model_config=entries, model_args=record["backbone_kwargs"])
        _verify(partial)
        _carry_over(folder, partial)
        _flush(*(path for path in partial.rglob("*") if path.exists()), partial)
        _exchange(partial, folder, previous)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"Could not write the model to {str(folder)!r} ({one_line(error)}); what was there before is untouched; "
            f"make room or choose a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record["sha256"]


def checkpoint_entry(
    backbone: nn.Module, parent: dict[str, Any] | None, classes: list[str] | None = None
) -> dict[str, Any]:
    """The `baton` entry of a Lightning checkpoint, plain values: what `read_source` needs beside hyper-parameters.

    Args:
        backbone: the network.
        parent: where the run's weights started (`Source.lineage()`), if not from scratch.
        classes: names of the classes, in the order of the classifier's outputs.
    """
    config = getattr(backbone, "pretrained_cfg", {})
    return {
        "format": FORMAT,
        "version": _version(),
        "num_classes": int(getattr(backbone, "num_classes", 0)),
        "pretrained_cfg": _plain_values({key: config[key] for key in _TRAVELS if key in config}),
        "classes": classes,
        "parent": parent,
    }


def read_folder(location: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Reads and checks a `model/` folder, or the one in a run directory.

    Args:
        location: what messages call it.
        folder: where it is.

    Returns:
        `config.json`, the tensors, and their SHA-256.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model is damaged, or newer than this Baton.
    """
    folder = _find(location, folder)
    config = _read_config(folder / CONFIG)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} is damaged or incomplete ({(folder / WEIGHTS).stat().st_size:,} bytes): "
            f"{one_line(error)}; copy it again, or write it again from the run's checkpoint."
        ) from error
    record, sha256 = config.get("baton", {}), tensors_sha256(tensors)
    check_record(location, record)
    if record.get("sha256", sha256) != sha256:
        raise ValueError(
            f"The tensors in {str(folder / WEIGHTS)!r} are not those its config.json was written for (SHA-256 "
            f"{sha256[:12]}… instead of {record['sha256'][:12]}…); copy the whole folder again."
        )
    return config, tensors, sha256


def check_record(location: str, record: dict[str, Any]) -> None:
    """Checks a `baton` entry: raises ValueError if a part is of another kind, or if a newer Baton wrote it."""
    _check_types(f"the baton entry of {location!r}", record)
    if record.get("format", 0) > FORMAT:
        raise ValueError(
            f"{location!r} has format {record['format']}, but this version of Baton reads up to {FORMAT}; update Baton."
        )


def rebuild(
    location: str, architecture: str, num_classes: int, pretrained_cfg: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    """An untrained network as a file describes it, with its mean, std and input size; `location` is for messages.

    Raises:
        ValueError: this Baton and timm do not know the architecture or an argument of it.
    """
    # of fixed_input_size only True travels: timm writes False for networks that must still be built at their size
    config = {key: pretrained_cfg[key] for key in _TRAVELS if pretrained_cfg.get(key)}
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        return create_backbone(architecture, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"Cannot build the network of {location!r}: {one_line(error)}.") from error


def tensors_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and bytes: independent of order, device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor).numpy().data)
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's values, row by row, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def plain_name(name: str) -> str:
    """A tensor's name without what `torch.compile` inserts."""
    return name.replace("_orig_mod.", "")


def plain_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the architecture alone, as they come back from JSON; timm reads None as "not given"."""
    return _plain_values({k: v for k, v in (kwargs or {}).items() if v is not None and k not in _NOT_KWARGS})


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names and the number of the others, for a sentence."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, for a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=str))


# Reading


def _find(location: str, folder: Path) -> Path:
    """The folder that holds the model's two files: `folder` itself, or `model/` in a run directory."""
    for candidate in (folder, folder / "model"):
        found = [name for name in (WEIGHTS, CONFIG) if (candidate / name).is_file()]
        if len(found) == 2:
            return candidate
        if found:
            missing = CONFIG if found == [WEIGHTS] else WEIGHTS
            raise FileNotFoundError(f"{str(candidate)!r} holds {found[0]} but no {missing}; copy the whole folder.")
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.name == "last.ckpt")
    if checkpoints:
        raise FileNotFoundError(
            f"The run in {location!r} has not finished: it has no model/ yet; let it finish (resume), or name a "
            f"checkpoint, such as {str(checkpoints[-1])!r}."
        )
    there = some(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"No model in the folder {location!r}, which holds {there}; expected {ACCEPTED}.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON ({one_line(error)}); copy the whole folder again."
        ) from error
    if not isinstance(config, dict) or not {"architecture", "pretrained_cfg"} <= config.keys():
        raise ValueError(f"{str(path)!r} does not describe a timm model: it needs 'architecture' and 'pretrained_cfg'.")
    _check_types(repr(str(path)), config)
    return config


def _check_types(where: str, entries: Mapping[str, Any]) -> None:
    for key in _TYPES.keys() & entries.keys():
        if not isinstance(entries[key], _TYPES[key]):
            raise ValueError(
                f"Expected {_TYPES[key].__name__} as {key!r} in {where}, but got {str(entries[key])[:80]!r}."
            )


# Writing


def _plain_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, each tensor contiguous with memory of its own, compiled modules' names plain."""
    if "architecture" not in getattr(backbone, "pretrained_cfg", {}):
        raise ValueError(
            f"Expected a backbone that timm built, with its architecture in pretrained_cfg, but got a "
            f"{type(backbone).__name__}; build it with baton.backbones.create_backbone."
        )
    return {
        plain_name(name): tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }


def _record(
    backbone_kwargs: dict[str, Any],
    config: dict[str, Any],
    metrics: Mapping[str, float],
    sha256: str,
    parent: dict[str, Any] | None,
) -> dict[str, Any]:
    values = {name: float(value) for name, value in metrics.items()}
    return {
        "format": FORMAT,
        "version": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone_kwargs": plain_kwargs(backbone_kwargs),
        "config": _plain_values(config),
        "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},  # JSON has no NaN
        "sha256": sha256,
        "parent": parent,
    }


@functools.cache
def _version() -> dict[str, str | None]:
    """Versions of Baton, torch and timm, and the commit of Baton's checkout where it runs from one."""
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():  # never the commit of another project that merely has Baton installed
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {"baton": __version__, "commit": commit, "torch": str(torch.__version__), "timm": timm.__version__}


def _check_free(folder: Path, sha256: str, replace: bool) -> None:
    """Raises unless `folder` is free, holds the same tensors, or holds a model that may be replaced."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    # beside half a model, or none, other things are not a user's notes on it: the folder may be anything
    if names - {WEIGHTS, CONFIG} and not {WEIGHTS, CONFIG} <= names:
        raise ValueError(f"{str(folder)!r} holds {some(sorted(names))}, which is no model; choose another folder.")
    if replace or not names:
        return
    try:
        same = _read_config(folder / CONFIG).get("baton", {}).get("sha256") == sha256
    except (ValueError, OSError):
        same = False
    if not same:
        raise ValueError(f"{str(folder)!r} already holds another model; choose another run directory.")


def _verify(folder: Path) -> None:
    """A model is complete when its folder alone gives a network with the same tensors."""
    config, tensors, _ = read_folder(str(folder), folder)
    kwargs = config["baton"]["backbone_kwargs"]
    with torch.random.fork_rng(devices=[]):  # looking at a network must not shift the random numbers of a run
        rebuilt = rebuild(
            str(folder), config["architecture"], config["num_classes"], config["pretrained_cfg"], kwargs
        ).state_dict()
    ours, theirs = ({name: tensor.shape for name, tensor in state.items()} for state in (tensors, rebuilt))
    differing = sorted({name for name, _ in ours.items() ^ theirs.items()})
    if differing:
        raise ValueError(
            f"Expected a network that {config['architecture']} with {kwargs} rebuilds, but {len(differing)} tensors "
            f"differ: {some(differing)}; put what was changed into backbone_kwargs, or register it as a backbone."
        )


def _carry_over(folder: Path, partial: Path) -> None:
    """Copies what somebody put beside a model, so that it stays beside the next one."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        elif path.name not in (WEIGHTS, CONFIG):
            shutil.copy2(path, partial / path.name, follow_symlinks=False)


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(partial: Path, folder: Path, previous: Path) -> None:
    """Gives `partial` the name `folder`; a model of that name stays until the new one is in its place."""
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    try:
        partial.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    _flush(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)
