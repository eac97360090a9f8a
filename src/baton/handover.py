"""Hand-over: the `model/` folder one stage leaves behind, and the strict, verified way the next one takes it up.

A folder holds `model.safetensors` and `config.json` in timm's own (Hugging Face) layout; `config.json` has one more
entry, `baton`: format and code version, the run's config and metrics, SHA-256 of the tensors, and the chain of parents.
Reading checks everything before a network is built; loading names every tensor that does not fit and verifies those
that do, bit for bit. No code from a file is ever run: tensors come from safetensors or `torch.load(weights_only=True)`.
"""

import contextlib
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pickletools
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import split_model_name_tag
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

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

_CONFIG_TYPES = {"architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict, "baton": dict}
_RECORD_TYPES = {"format": int, "num_classes": int, "backbone_kwargs": dict, "pretrained_cfg": dict, "sha256": str}


@dataclass(frozen=True, eq=False)
class Source:
    """Weights with everything known about them, read and checked before any network is built.

    Attributes:
        location: where they come from, as the user named it.
        architecture: the backbone's timm name.
        backbone_kwargs: all arguments the backbone was built with, except `num_classes`.
        num_classes: outputs of the classifier; 0 where the file has none.
        tensors: the backbone's state dict, on the CPU.
        sha256: of the tensors, as `tensors_sha256` computes it.
        pretrained_cfg: timm's description of the weights (mean, std, input size).
        record: the `baton` entry of the file; empty for files that Baton did not write.
        classes: names of the classes, where the file has them.
    """

    location: str
    architecture: str
    backbone_kwargs: dict[str, Any]
    num_classes: int
    tensors: dict[str, Tensor] = field(repr=False)
    sha256: str
    pretrained_cfg: dict[str, Any] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    classes: list[str] | None = field(default=None, repr=False)

    def lineage(self) -> dict[str, Any]:
        """What the next stage records about this one: `{source, sha256, parent}`, back to the first stage."""
        return {"source": self.location, "sha256": self.sha256, "parent": self.record.get("parent")}


@dataclass(frozen=True)
class LoadReport:
    """What a load did: `loaded` of `expected` tensors with `values` numbers; names of those left fresh or tolerated."""

    loaded: int
    expected: int
    values: int
    fresh: tuple[str, ...] = ()
    tolerated: tuple[str, ...] = ()
    converted: str = ""

    def __str__(self) -> str:
        text = f"{self.loaded} of {self.expected} tensors, {self.values:,} values"
        if self.converted:
            text += f", converted from {self.converted}"
        if self.fresh:
            modules = sorted({name.rpartition(".")[0] for name in self.fresh})
            text += f", fresh classifier {' and '.join(modules)} ({len(self.fresh)} tensors)"
        return text + (f", tolerated {_some(self.tolerated)}" if self.tolerated else "")


def tensors_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over names (sorted), dtypes, shapes and bytes: independent of order, device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- reading


def read_source(location: str | Path) -> Source:
    """Reads weights and checks them, without building a network.

    Args:
        location: a `model/` folder, a run directory, a Lightning checkpoint that Baton wrote,
            `wandb:entity/project/name:alias` or `timm:model.tag`.

    Raises:
        FileNotFoundError: nothing is there, or a folder holds no model.
        ValueError: what is there is damaged, is something else, or is newer than this Baton.
    """
    location = str(location)
    scheme, _, rest = location.partition(":")
    if scheme == "timm":
        return _read_timm(location, rest)
    if scheme == "wandb":
        return _read_folder(location, _download_artifact(location, rest))
    path = Path(location).expanduser()
    if path.name == WEIGHTS:
        path = path.parent
    try:
        if path.is_dir():
            return _read_folder(location, path)
        if path.is_file():
            return _read_checkpoint(location, path)
    except PermissionError as error:
        raise ValueError(f"No permission to read {location!r}; check the owner and mode of the file.") from error
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; expected {ACCEPTED}."
    raise FileNotFoundError(f"There is no {location!r}{hint}")


def _read_folder(location: str, folder: Path) -> Source:
    folder = _model_folder(location, folder)
    config = _read_config(folder / CONFIG)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{str(folder / WEIGHTS)!r} is damaged or incomplete ({_size(folder / WEIGHTS)}): {_one_line(error)}; "
            f"copy it again, or write it again from the run's checkpoint."
        ) from error
    record = config.get("baton", {})
    _check_record(location, record)
    sha256 = tensors_sha256(tensors)
    if record.get("sha256", sha256) != sha256:
        raise ValueError(
            f"The tensors in {str(folder / WEIGHTS)!r} are not those its config.json was written for (SHA-256 "
            f"{sha256[:12]}… instead of {record['sha256'][:12]}…); copy the whole folder again."
        )
    labels = config.get("label_names")
    return Source(
        location=location,
        architecture=config["architecture"],
        backbone_kwargs=_kwargs(record.get("backbone_kwargs", config.get("model_args", {}))),
        num_classes=config.get("num_classes", config["pretrained_cfg"].get("num_classes", 0)),
        tensors=tensors,
        sha256=sha256,
        pretrained_cfg=config["pretrained_cfg"],
        record=record,
        classes=labels if isinstance(labels, list) else None,
    )


def _model_folder(location: str, folder: Path) -> Path:
    """The folder that holds the model's two files: `folder` itself, or `model/` in a run directory."""
    for candidate in (folder, folder / "model"):
        found = [name for name in (WEIGHTS, CONFIG) if (candidate / name).is_file()]
        if len(found) == 2:
            return candidate
        if found:
            missing = CONFIG if found == [WEIGHTS] else WEIGHTS
            raise FileNotFoundError(f"{str(candidate)!r} holds {found[0]} but no {missing}; copy the whole folder.")
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    if checkpoints:
        last = folder / "checkpoints" / "last.ckpt"
        raise FileNotFoundError(
            f"The run in {location!r} has not finished: it has no model/ yet; let it finish (resume), or name a "
            f"checkpoint, such as {str(last if last in checkpoints else checkpoints[-1])!r}."
        )
    there = _some(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise FileNotFoundError(f"No model in the folder {location!r}, which holds {there}; expected {ACCEPTED}.")


def _read_config(path: Path) -> dict[str, Any]:
    """A `config.json`, with the few entries that everything else relies on checked."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON ({_one_line(error)}); copy the whole folder again."
        ) from error
    if not isinstance(config, dict) or not {"architecture", "pretrained_cfg"} <= config.keys():
        raise ValueError(f"{str(path)!r} does not describe a timm model: it needs 'architecture' and 'pretrained_cfg'.")
    _check_types(repr(str(path)), config, _CONFIG_TYPES)
    return config


def _read_checkpoint(location: str, path: Path) -> Source:
    checkpoint = _unpickle(location, path)
    entries: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    parts = [entries.get(key) for key in ("hyper_parameters", "baton", "state_dict")]
    hyper, record, state = (part if isinstance(part, dict) else {} for part in parts)
    if not (isinstance(hyper.get("backbone"), str) and "num_classes" in record and state):
        content = _some(sorted(map(str, entries))) or f"a {type(checkpoint).__name__}"
        raise ValueError(
            f"{location!r} is a checkpoint, but not one of Baton's (it holds {content}), so its architecture is "
            f"unknown; expected {ACCEPTED}."
        )
    _check_record(location, record)
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    tensors = {name.removeprefix("backbone."): value for name, value in named.items() if name.startswith("backbone.")}
    return Source(
        location=location,
        architecture=hyper["backbone"],
        backbone_kwargs=_kwargs(hyper.get("backbone_kwargs") or {}),
        num_classes=record["num_classes"],
        tensors=tensors,
        sha256=tensors_sha256(tensors),
        pretrained_cfg=record.get("pretrained_cfg", {}),
        record=record,
        classes=record.get("classes"),
    )


def _unpickle(location: str, path: Path) -> Any:
    """`torch.load(weights_only=True)`, with one sentence for whatever is wrong with the file."""
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise ValueError(f"The file {location!r} is empty; expected {ACCEPTED}.")
    if not b"PK\x03\x04".startswith(head) and head[:1] != b"\x80":  # a zip archive, or a pickle of torch before 1.6
        raise ValueError(f"{location!r} is not a checkpoint (it begins with {head!r}); expected {ACCEPTED}.")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums that torch.save writes
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        offender = refused[1] if refused else _foreign_global(path)
        if offender:
            raise ValueError(
                f"{location!r} wants to run {offender!r} while loading, and Baton never runs code from a checkpoint; "
                f"export its tensors as safetensors with the program that wrote it."
            ) from error
        raise ValueError(
            f"{location!r} is damaged or incomplete ({_size(path)}): PyTorch cannot read it; "
            f"copy it again, or use an earlier checkpoint."
        ) from error


def _foreign_global(path: Path) -> str | None:
    """The first callable outside torch that a pickle names; reads its opcodes and executes none."""
    strings: list[str] = []
    with contextlib.suppress(Exception):  # the file is known to be broken; this only looks for the reason
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                strings += str(argument).split(" ", 1)
            elif isinstance(argument, str):
                strings.append(argument)
            if opcode.name in ("GLOBAL", "STACK_GLOBAL") and strings[-2].partition(".")[0] not in (
                "torch",
                "collections",
            ):
                return ".".join(strings[-2:])
    return None


def _read_timm(location: str, name: str) -> Source:
    try:
        with _own_random_state():
            model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub, its cache and the network have dozens of errors of their own
        with _own_random_state():
            create_backbone(name)  # an unknown name or tag has its own sentence
        raise ValueError(
            f"Could not get the weights of {location!r} ({_one_line(error)}); check the network and that timm has "
            f"weights for it, or download them elsewhere and copy timm's cache."
        ) from error
    tensors, config = model.state_dict(), dict(model.pretrained_cfg)
    return Source(location, config["architecture"], {}, model.num_classes, tensors, tensors_sha256(tensors), config, {})


def _download_artifact(location: str, name: str) -> Path:
    """Downloads a Weights & Biases artifact into a cache folder of its own version."""
    if not re.fullmatch(r"[^/]+/[^/]+/[^/:]+:[^/:]+", name):
        raise ValueError(f"Expected wandb:entity/project/name:alias, but got {location!r}.")
    try:
        import wandb

        artifact = wandb.Api().artifact(name)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "artifacts"
        folder = (
            cache / artifact.entity / artifact.project / f"{artifact.name.replace(':', '-')}-{artifact.digest[:12]}"
        )
        return Path(artifact.download(root=str(folder)))
    except Exception as error:  # no login, no network, no such artifact: wandb's sentence says which
        raise ValueError(
            f"Could not get {location!r} from Weights & Biases ({_one_line(error)}); check `wandb login`, the network "
            f"and the name, or give the path of the run's model/ folder."
        ) from error


def _check_record(location: str, record: dict[str, Any]) -> None:
    """Checks a `baton` entry: first its format, then the parts that reading relies on."""
    if isinstance(record.get("format"), int) and record["format"] > FORMAT:
        raise ValueError(
            f"{location!r} has format {record['format']}, but this version of Baton reads up to {FORMAT}; update Baton."
        )
    _check_types(f"the baton entry of {location!r}", record, _RECORD_TYPES)


def _check_types(where: str, entries: Mapping[str, Any], expected: Mapping[str, type]) -> None:
    for key, kind in expected.items():
        if key in entries and not isinstance(entries[key], kind):
            raise ValueError(f"Expected {kind.__name__} as {key!r} in {where}, but got {str(entries[key])[:80]!r}.")


# ---------------------------------------------------------------------------------------------------------- loading


def build_backbone(source: Source, num_classes: int | None = None) -> nn.Module:
    """An untrained network of the source's architecture, with its mean, std and input size.

    Args:
        source: as `read_source` gives it.
        num_classes: outputs of the classifier; None keeps the file's number.

    Raises:
        ValueError: this Baton and timm do not know the architecture or an argument of it.
    """
    num_classes = source.num_classes if num_classes is None else num_classes
    # of fixed_input_size only True travels: timm writes False for networks that must still be built at their size
    config = {key: source.pretrained_cfg[key] for key in _TRAVELS if source.pretrained_cfg.get(key)}
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        return create_backbone(
            source.architecture, num_classes=num_classes, pretrained_cfg_overlay=overlay, **source.backbone_kwargs
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"Cannot build the network of {source.location!r}: {_one_line(error)}.") from error


def load_backbone(source: str) -> nn.Module:
    """The trained network of a file, classifier included, on the CPU in eval mode; see `read_source` for sources."""
    read = read_source(source)
    backbone = build_backbone(read)
    _follow_dtype(backbone, read)
    load_weights(backbone, read, classifier=True)
    return backbone.eval()


def _follow_dtype(backbone: nn.Module, source: Source) -> None:
    """Gives a backbone the floating-point kind of its file, where that has only one."""
    dtypes = {tensor.dtype for tensor in source.tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        backbone.to(dtypes.pop())


def check_restated(source: Source, backbone: str | None, backbone_kwargs: dict[str, Any] | None) -> None:
    """The file decides the architecture: raises ValueError naming both if the user states another one."""
    if backbone is not None and split_model_name_tag(backbone)[0] != split_model_name_tag(source.architecture)[0]:
        raise ValueError(
            f"{source.location!r} holds backbone {source.architecture!r}, but {backbone!r} was asked for; "
            f"leave the backbone out (the file decides it) or start from another file."
        )
    for key, value in _kwargs(backbone_kwargs or {}).items():
        if key not in source.backbone_kwargs or source.backbone_kwargs[key] != value:
            built = f"{key}={source.backbone_kwargs[key]!r}" if key in source.backbone_kwargs else f"no {key}"
            raise ValueError(
                f"The {source.architecture} in {source.location!r} was built with {built}, but {key}={value!r} was "
                f"asked for; leave backbone_kwargs out (the file decides them) or start from another file."
            )


def load_weights(backbone: nn.Module, source: Source, *, classifier: bool, tolerate: Sequence[str] = ()) -> LoadReport:
    """Copies the source's tensors into a backbone, strictly, and verifies every one of them bit for bit.

    Nothing is changed unless everything fits. Floating-point tensors may be widened (exact) or follow a backbone that
    is half precision as a whole; no other conversion is made.

    Args:
        backbone: the network to fill, on any device.
        source: as `read_source` gives it.
        classifier: take the classifier too; otherwise only the trunk, and the backbone keeps its own classifier.
        tolerate: wildcards (`"head.*"`) of tensors that may be missing, unexpected or misshapen, and then stay as they
            are; the backbone may declare more in an attribute `handover_tolerates`.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, of another kind, or differs after loading.
    """
    targets = {name.replace("_orig_mod.", ""): tensor for name, tensor in backbone.state_dict().items()}
    prefixes = () if classifier else tuple(f"{name}." for name in _classifier_names(backbone))
    fresh = tuple(name for name in targets if name.startswith(prefixes)) if prefixes else ()
    given = {k: v for k, v in source.tensors.items() if not (prefixes and k.startswith(prefixes))}
    wanted = {name: tensor for name, tensor in targets.items() if name not in fresh}
    patterns = (*tolerate, *getattr(backbone, "handover_tolerates", ()))

    fits = {name for name in wanted.keys() & given.keys() if wanted[name].shape == given[name].shape}
    unfit = (wanted.keys() | given.keys()) - fits
    tolerated = {name for name in unfit if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if wanted and (not fits or unfit - tolerated):
        raise ValueError(_misfit(source, type(backbone).__name__, wanted, given, fits, unfit - tolerated))
    converted = _check_dtypes(source, wanted, given, fits)
    _copy(backbone, {name: given[name] for name in fits}, source)
    return LoadReport(
        loaded=len(fits),
        expected=len(wanted.keys() - tolerated),
        values=sum(given[name].numel() for name in fits),
        fresh=fresh,
        tolerated=tuple(sorted(tolerated)),
        converted=converted,
    )


def _misfit(
    source: Source,
    kind: str,
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    fits: set[str],
    unfit: set[str],
) -> str:
    if not fits:
        return (
            f"None of the {len(given)} tensors of {source.location!r} ({source.architecture}: "
            f"{_some(sorted(given), 3) or 'no names'}) fits the {len(wanted)} of the backbone ({kind}: "
            f"{_some(sorted(wanted), 3)}); use a file of the same architecture."
        )
    missing = sorted(unfit & (wanted.keys() - given.keys()))
    unexpected = sorted(unfit & (given.keys() - wanted.keys()))
    misshapen = [
        f"{name} (file {tuple(given[name].shape)}, backbone {tuple(wanted[name].shape)})"
        for name in sorted(unfit & wanted.keys() & given.keys())
    ]
    groups = {"not in the file": missing, "not in the backbone": unexpected, "of another shape": misshapen}
    parts = [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]
    return (
        f"The weights of {source.location!r} ({source.architecture}, {len(given)} tensors) do not fit the backbone "
        f"({kind}, {len(wanted)} tensors; {len(fits)} fit): {'; '.join(parts)}; use a file of the same architecture, "
        f"or list the tensors that may differ in `tolerate`."
    )


def _check_dtypes(source: Source, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], names: set[str]) -> str:
    """Refuses conversions that lose something unasked; returns those made, such as "bfloat16 to float32"."""
    floating = {tensor.dtype for tensor in wanted.values() if tensor.is_floating_point()}
    by_design = floating in ({torch.bfloat16}, {torch.float16})
    pairs = {(given[name].dtype, wanted[name].dtype): name for name in sorted(names, reverse=True)}
    made = []
    for (old, new), name in pairs.items():
        if old == new:
            continue
        exact = old.is_floating_point and new.is_floating_point and torch.promote_types(old, new) == new
        if not (exact or (by_design and old.is_floating_point and new.is_floating_point)):
            raise ValueError(
                f"Tensor {name} is {_plain(old)} in {source.location!r} but {_plain(new)} in the backbone, and "
                f"converting it would lose precision; build the backbone in {_plain(old)}."
            )
        made.append(f"{_plain(old)} to {_plain(new)}")
    return " and ".join(made)


def _copy(backbone: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
    names = {name.replace("_orig_mod.", ""): name for name in backbone.state_dict()}
    backbone.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, strict=False)
    after = backbone.state_dict()
    for name, tensor in tensors.items():
        copy = after[names[name]]
        if not torch.equal(_bytes(copy), _bytes(tensor.to(copy.dtype))):
            raise ValueError(f"Tensor {name} of {source.location!r} differs after loading: the backbone altered it.")


def _classifier_names(backbone: nn.Module) -> tuple[str, ...]:
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


# ---------------------------------------------------------------------------------------------------------- writing


def write_model(
    folder: str | Path,
    backbone: nn.Module,
    *,
    backbone_kwargs: dict[str, Any],
    config: dict[str, Any],
    metrics: Mapping[str, float],
    parent: Source | None,
    classes: list[str] | None = None,
    replace: bool = False,
) -> str:
    """Writes a `model/` folder, reads it back, and only then gives it its name.

    A crash, a full disk or a network that its own name and arguments cannot rebuild leaves `folder` as it was.

    Args:
        folder: the folder to write, with the parents it needs.
        backbone: the network; compiled, channels_last and shared tensors are written plainly.
        backbone_kwargs: all arguments it was built with.
        config: the run's config, plain values.
        metrics: final metrics.
        parent: where the run's weights started, if not from scratch.
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
    sha256 = tensors_sha256(tensors)
    record = _record(backbone_kwargs, config, metrics, sha256, parent)
    try:
        if previous.exists() and not folder.exists():  # killed between the two renames of an earlier call
            previous.rename(folder)
        _check_free(folder, sha256, replace)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        safetensors.torch.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        entries = {"baton": record} | ({"label_names": classes} if classes else {})
        save_config_for_hf(backbone, str(partial / CONFIG), model_config=entries, model_args=record["backbone_kwargs"])
        _verify(partial)
        _flush(partial / WEIGHTS, partial / CONFIG, partial)
        _exchange(partial, folder, previous)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"Could not write the model to {str(folder)!r} ({_one_line(error)}); what was there before is untouched; "
            f"make room or choose a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sha256


def checkpoint_entry(backbone: nn.Module, parent: Source | None, classes: list[str] | None = None) -> dict[str, Any]:
    """The `baton` entry of a Lightning checkpoint, plain values: what `read_source` needs beside hyper-parameters."""
    config = getattr(backbone, "pretrained_cfg", {})
    return {
        "format": FORMAT,
        "version": _version(),
        "num_classes": int(getattr(backbone, "num_classes", 0)),
        "pretrained_cfg": _plain_values({key: config[key] for key in _TRAVELS if key in config}),
        "classes": classes,
        "parent": parent if not hasattr(parent, "lineage") else parent.lineage(),
    }


def _record(
    backbone_kwargs: dict[str, Any],
    config: dict[str, Any],
    metrics: Mapping[str, float],
    sha256: str,
    parent: Source | None,
) -> dict[str, Any]:
    values = {name: float(value) for name, value in metrics.items()}
    return {
        "format": FORMAT,
        "version": _version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backbone_kwargs": _kwargs(backbone_kwargs),
        "config": _plain_values(config),
        "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},  # JSON has no NaN
        "sha256": sha256,
        "parent": parent if not hasattr(parent, "lineage") else parent.lineage(),
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
    try:
        version = importlib.metadata.version("baton-vision")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return {"baton": version, "commit": commit, "torch": str(torch.__version__), "timm": timm.__version__}


def _plain_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, each tensor contiguous with memory of its own, compiled modules' names plain."""
    if "architecture" not in getattr(backbone, "pretrained_cfg", {}):
        raise ValueError(
            f"Expected a backbone that timm built, with its architecture in pretrained_cfg, but got a "
            f"{type(backbone).__name__}; build it with baton.backbones.create_backbone."
        )
    return {
        name.replace("_orig_mod.", ""): tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state_dict().items()
    }


def _check_free(folder: Path, sha256: str, replace: bool) -> None:
    """Raises unless `folder` is free, holds the same tensors, or may be replaced and holds nothing but a model."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names - {WEIGHTS, CONFIG}:
        raise ValueError(f"{str(folder)!r} holds {_some(sorted(names))}, which is no model; choose another folder.")
    if replace or not names:
        return
    try:
        same = _read_config(folder / CONFIG).get("baton", {}).get("sha256") == sha256
    except (ValueError, OSError):
        same = False
    if not same:
        raise ValueError(f"{str(folder)!r} already holds another model; choose another run directory.")


def _verify(folder: Path) -> None:
    """A model is complete when the next stage can build it from its folder alone and load it."""
    source = read_source(folder)
    with _own_random_state():
        backbone = build_backbone(source)
    _follow_dtype(backbone, source)
    load_weights(backbone, source, classifier=True)


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


# ---------------------------------------------------------------------------------------------------- small pieces


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Building a network only to look at it must not shift the random numbers of a run."""
    with torch.random.fork_rng(devices=[]):
        yield


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the architecture alone, as they come back from JSON; timm reads None as "not given"."""
    return _plain_values({k: v for k, v in kwargs.items() if v is not None and k not in _NOT_KWARGS})


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=str))


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def _one_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, to be put into a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
