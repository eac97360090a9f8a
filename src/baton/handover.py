"""Hand-over: the strict, verified way one stage takes up the weights that another left behind.

Reading checks everything before a network is built; loading names every tensor that does not fit and verifies those
that do, bit for bit. No code from a file is ever run: tensors come from safetensors or `torch.load(weights_only=True)`.
"""

import contextlib
import difflib
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn

from baton import model_folder
from baton.backbones import create_backbone
from baton.model_folder import checkpoint_entry, one_line, plain_name, some, tensors_sha256, write_model  # noqa: F401

_Tensors = Mapping[str, Tensor]
# What the trunk's weights do not depend on, so that every stage may choose its own: probabilities of dropping something
# in training, and how the last map becomes the classifier's input. (Where a pooling has weights, loading says so.)
_FREE = {"drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "drop_block_rate", "global_pool"}


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
        """What the next stage records: `{source, sha256, parent}`, a student's `teacher`, back to the first stage."""
        taught = {"teacher": self.record["teacher"]} if self.record.get("teacher") else {}
        return {"source": self.location, "sha256": self.sha256, "parent": self.record.get("parent"), **taught}


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
        text += f", converted from {self.converted}" if self.converted else ""
        if self.fresh:
            modules = sorted({name.rpartition(".")[0] for name in self.fresh})
            text += f", fresh classifier {' and '.join(modules)} ({len(self.fresh)} tensors)"
        return text + (f", tolerated {some(self.tolerated)}" if self.tolerated else "")


# Reading


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
    path = path.parent if path.name == model_folder.WEIGHTS else path
    try:
        if path.is_dir():
            return _read_folder(location, path)
        if path.is_file():
            return _read_checkpoint(location, path)
    except PermissionError as error:
        raise ValueError(f"No permission to read {location!r}; check the owner and mode of the file.") from error
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else f"; expected {model_folder.ACCEPTED}."
    raise FileNotFoundError(f"There is no {location!r}{hint}")


def _read_folder(location: str, folder: Path) -> Source:
    config, tensors, sha256 = model_folder.read_folder(location, folder)
    record, labels = config.get("baton", {}), config.get("label_names")
    return Source(
        location=location,
        architecture=config["architecture"],
        backbone_kwargs=model_folder.plain_kwargs(record.get("backbone_kwargs", config.get("model_args"))),
        num_classes=config.get("num_classes", 0),
        tensors=tensors,
        sha256=sha256,
        pretrained_cfg=config["pretrained_cfg"],
        record=record,
        classes=labels if isinstance(labels, list) else None,
    )


def _read_checkpoint(location: str, path: Path) -> Source:
    checkpoint = load_checkpoint(path, location)
    hyper, record = checkpoint["hyper_parameters"], checkpoint["baton"]
    state = {plain_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    tensors = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    return Source(
        location=location,
        architecture=hyper["backbone"],
        backbone_kwargs=model_folder.plain_kwargs(hyper.get("backbone_kwargs")),
        num_classes=record["num_classes"],
        tensors=tensors,
        sha256=tensors_sha256(tensors),
        pretrained_cfg=record.get("pretrained_cfg", {}),
        record=record,
        classes=record.get("classes"),
    )


def load_checkpoint(path: str | Path, location: str | None = None) -> dict[str, Any]:
    """Reads a Lightning checkpoint that Baton wrote, onto the CPU, and runs no code from it.

    Args:
        path: the file.
        location: what messages call it, if not by its path.

    Raises:
        ValueError: the file is empty, damaged, wants to run code, or is not one of Baton's, or of a newer Baton.
    """
    path, location = Path(path), location or str(path)
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise ValueError(f"The file {location!r} is empty; expected {model_folder.ACCEPTED}.")
    if not b"PK\x03\x04".startswith(head) and head[:1] != b"\x80":  # a zip archive, or a pickle of torch before 1.6
        raise ValueError(
            f"{location!r} is not a checkpoint (it begins with {head!r}); expected {model_folder.ACCEPTED}."
        )
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums that torch.save writes
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if offender := refused[1] if refused else _foreign_global(path):
            raise ValueError(
                f"{location!r} wants to run {offender!r} while loading, and Baton never runs code from a checkpoint; "
                f"export its tensors as safetensors with the program that wrote it."
            ) from error
        raise ValueError(
            f"{location!r} is damaged or incomplete ({path.stat().st_size:,} bytes): PyTorch cannot read it; "
            f"copy it again, or use an earlier checkpoint."
        ) from error
    entries: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    parts = (entries.get(key) for key in ("hyper_parameters", "baton", "state_dict"))
    hyper, record, state = (part if isinstance(part, dict) else {} for part in parts)
    if not (state and "num_classes" in record and isinstance(hyper.get("backbone"), str)):
        content = some(sorted(map(str, entries))) or f"a {type(checkpoint).__name__}"
        raise ValueError(
            f"{location!r} is a checkpoint, but not one of Baton's (it holds {content}), so its architecture is "
            f"unknown; expected {model_folder.ACCEPTED}."
        )
    model_folder.check_record(location, record)
    return entries


def _foreign_global(path: Path) -> str | None:
    """The first callable outside torch that a pickle names; reads its opcodes and executes none."""
    strings: list[str] = []
    with contextlib.suppress(Exception):  # the file is known to be broken; this only looks for the reason
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        for opcode, argument, _ in pickletools.genops(data):
            if isinstance(argument, str):
                strings += argument.split(" ", 1) if opcode.name == "GLOBAL" else [argument]
            if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                module, name = strings[-2:]
                if module.partition(".")[0] not in ("torch", "collections"):
                    return f"{module}.{name}"
    return None


def _read_timm(location: str, name: str) -> Source:
    with torch.random.fork_rng(devices=[]):  # looking at a network must not shift the random numbers of a run
        try:
            model: Any = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub, its cache and the network have dozens of errors of their own
            create_backbone(name)  # an unknown name or tag has its own sentence
            raise ValueError(
                f"Could not get the weights of {location!r} ({one_line(error)}); check the network and that timm has "
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
        version = f"{artifact.name.replace(':', '-')}-{artifact.digest[:12]}"
        return Path(artifact.download(root=str(cache / artifact.entity / artifact.project / version)))
    except Exception as error:  # no login, no network, no such artifact: wandb's sentence says which
        raise ValueError(
            f"Could not get {location!r} from Weights & Biases ({one_line(error)}); check `wandb login`, the network "
            f"and the name, or give the path of the run's model/ folder."
        ) from error


# Building and loading


def check_restated(source: Source, backbone: str | None, backbone_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The file decides the architecture; only dropping rates and the pooling, without weights, may be restated.

    Returns:
        All arguments to build the backbone with: the file's, with the user's rates and pooling in place of its own.

    Raises:
        ValueError: the user states another architecture or argument; the message names both.
    """
    if backbone is not None and split_model_name_tag(backbone)[0] != split_model_name_tag(source.architecture)[0]:
        raise ValueError(
            f"{source.location!r} holds backbone {source.architecture!r}, but {backbone!r} was asked for; "
            f"leave the backbone out (the file decides it) or start from another file."
        )
    built, asked = source.backbone_kwargs, model_folder.plain_kwargs(backbone_kwargs)
    for key in sorted(asked.keys() - _FREE):
        if key not in built or built[key] != asked[key]:
            raise ValueError(
                f"The {source.architecture} in {source.location!r} was built with "
                f"{f'{key}={built[key]!r}' if key in built else f'no {key}'}, but {key}={asked[key]!r} was asked for; "
                f"leave backbone_kwargs out (the file decides them) or start from another file."
            )
    return built | asked


def build_backbone(
    source: Source, num_classes: int | None = None, overrides: dict[str, Any] | None = None
) -> nn.Module:
    """An untrained network of the source's architecture, with its mean, std and input size.

    Args:
        source: as `read_source` gives it.
        num_classes: outputs of the classifier; None keeps the file's number.
        overrides: arguments that replace those of the file, as `check_restated` lets them pass.

    Raises:
        ValueError: this Baton and timm do not know the architecture or an argument of it.
    """
    num_classes = source.num_classes if num_classes is None else num_classes
    kwargs = source.backbone_kwargs | model_folder.plain_kwargs(overrides)
    return model_folder.rebuild(source.location, source.architecture, num_classes, source.pretrained_cfg, kwargs)


def load_backbone(source: str) -> nn.Module:
    """The trained network of a file, classifier included, on the CPU in eval mode; see `read_source` for sources."""
    read = read_source(source)
    backbone = build_backbone(read)
    dtypes = {tensor.dtype for tensor in read.tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:  # half precision stays half precision
        backbone.to(dtypes.pop())
    load_weights(backbone, read, classifier=True)
    return backbone.eval()


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
    before = backbone.state_dict()
    names = {plain_name(name): name for name in before}
    targets = {name: before[names[name]] for name in names}
    heads = () if classifier else _classifiers(backbone)
    fresh = tuple(name for name in targets if name.startswith(heads))
    wanted = {name: tensor for name, tensor in targets.items() if name not in fresh}
    given = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(heads)}

    fits = {name for name in wanted.keys() & given.keys() if wanted[name].shape == given[name].shape}
    unfit = (wanted.keys() | given.keys()) - fits
    patterns = (*tolerate, *getattr(backbone, "handover_tolerates", ()))
    tolerated = {name for name in unfit if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not fits or unfit - tolerated:
        raise ValueError(_misfit(source, type(backbone).__name__, wanted, given, fits, unfit - tolerated))
    converted = _check_dtypes(source, wanted, given, fits)
    backbone.load_state_dict({names[name]: given[name] for name in fits}, strict=False)
    after = backbone.state_dict()
    for name in sorted(fits):
        copy = after[names[name]]
        if not torch.equal(model_folder.tensor_bytes(copy), model_folder.tensor_bytes(given[name].to(copy.dtype))):
            raise ValueError(f"Tensor {name} of {source.location!r} differs after loading: the backbone altered it.")
    return LoadReport(
        loaded=len(fits),
        expected=len(wanted.keys() - tolerated),
        values=sum(given[name].numel() for name in fits),
        fresh=fresh,
        tolerated=tuple(sorted(tolerated)),
        converted=converted,
    )


def _classifiers(backbone: nn.Module) -> tuple[str, ...]:
    """What the names of the classifiers' tensors begin with."""
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _misfit(source: Source, kind: str, wanted: _Tensors, given: _Tensors, fits: set[str], unfit: set[str]) -> str:
    if not fits:
        return (
            f"None of the {len(given)} tensors of {source.location!r} ({source.architecture}: "
            f"{some(sorted(given), 3) or 'no names'}) fits the {len(wanted)} of the backbone ({kind}: "
            f"{some(sorted(wanted), 3)}); use a file of the same architecture."
        )
    misshapen = [
        f"{name} (file {tuple(given[name].shape)}, backbone {tuple(wanted[name].shape)})"
        for name in sorted(unfit & wanted.keys() & given.keys())
    ]
    groups = {"not in the file": sorted(unfit - given.keys()), "not in the backbone": sorted(unfit - wanted.keys())}
    groups["of another shape"] = misshapen
    parts = [f"{len(names)} {what}: {some(names)}" for what, names in groups.items() if names]
    return (
        f"The weights of {source.location!r} ({source.architecture}, {len(given)} tensors) do not fit the backbone "
        f"({kind}, {len(wanted)} tensors; {len(fits)} fit): {'; '.join(parts)}; use a file of the same architecture, "
        f"or list the tensors that may differ in `tolerate`."
    )


def _check_dtypes(source: Source, wanted: _Tensors, given: _Tensors, names: set[str]) -> str:
    """Refuses conversions that lose something unasked; returns those made, such as "bfloat16 to float32"."""
    half = {t.dtype for t in wanted.values() if t.is_floating_point()} in ({torch.bfloat16}, {torch.float16})
    made = set()
    for name in sorted(names):
        old, new = given[name].dtype, wanted[name].dtype
        if old == new:
            continue
        before, after = (str(dtype).removeprefix("torch.") for dtype in (old, new))
        if not (old.is_floating_point and new.is_floating_point and (half or torch.promote_types(old, new) == new)):
            raise ValueError(
                f"Tensor {name} is {before} in {source.location!r} but {after} in the backbone, and converting it "
                f"would lose precision; build the backbone in {before}."
            )
        made.add(f"{before} to {after}")
    return " and ".join(sorted(made))
