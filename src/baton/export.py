"""`baton export`: a finished network as a timm folder or as ONNX, compared with the original before it is kept."""

import argparse
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.backbones.cell_scores import cell_scores
from baton.handover import Source, build_backbone, load_weights, read_source, write_model
from baton.layers.folding import plain_convolutions
from baton.option_names import nearest

OPSET = 18  # the one torch.onnx writes without converting
TOLERANCE = 1e-4  # largest difference from PyTorch, relative to the largest output
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_OPTIONS = ("--to", "--size", "--overwrite", "--help")


class Normalised(nn.Module):
    """A backbone that takes RGB images in [0, 1]: its own mean and standard deviation are part of it.

    Args:
        backbone: in evaluation mode.
        mean: of the images it was trained on, a channel each.
        std: their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b outputs *pixels"]:
        """Return logits, of images or of their pixels, or pooled features where the backbone has no classifier."""
        return self.backbone((images - self.mean) / self.std)


class PixelScores(nn.Module):
    """A backbone that a segmentation trained: scores of every pixel, as `baton.supervised.Segmentation` has them.

    Args:
        backbone: with its classifier.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes height width"]:
        """Return class scores of every pixel of normalised images."""
        return F.interpolate(cell_scores(self.backbone, images), images.shape[2:], mode="bilinear")


def run_export(args: Sequence[str]) -> int:
    """Write a network as a timm folder or an ONNX file.

    Raises:
        ValueError: the options make no sense, something is there already, or the copy differs from the original.
    """
    options = _parser().parse_args(args)
    target = Path(options.to).expanduser()
    onnx = target.suffix.lower() == ".onnx"
    if onnx:
        _check_onnx()
    elif options.size is not None:
        raise ValueError(
            f"--size is for ONNX files; a folder such as {target} keeps what the network says of its input."
        )
    filled = any(target.iterdir()) if target.is_dir() else target.exists()
    if filled and not options.overwrite:
        raise ValueError(f"{target} exists: choose another place, or replace it with --overwrite.")
    if onnx and target.is_dir():
        raise ValueError(f"{target} is a folder: choose a file name for the ONNX model.")
    source = read_source(options.source)
    backbone = build_backbone(source)
    report = load_weights(backbone.to(_dtype(source)), source, classifier=True)
    print(f"{options.source}: {source.architecture}, {report}", flush=True)
    if onnx:
        export_onnx(source, backbone.float().eval(), target, options.size)
    else:
        export_folder(source, backbone, target, overwrite=options.overwrite)
    return 0


def export_folder(source: Source, backbone: nn.Module, folder: Path, *, overwrite: bool = False) -> None:
    """Write a folder in timm's layout, with the metrics, configuration and ancestors of the original.

    Args:
        source: where the network comes from.
        backbone: the network, filled.
        folder: the folder to write.
        overwrite: replace the model that is there.
    """
    record = source.record
    made_by_baton = "format" in record
    sha256 = write_model(
        folder,
        backbone,
        backbone_kwargs=source.backbone_kwargs,
        config=record.get("config", {}),
        metrics={name: value for name, value in (record.get("metrics") or {}).items() if value is not None},
        parent=record.get("parent") if made_by_baton else source.lineage(),
        teacher=record.get("teacher"),
        classes=source.classes,
        replace=overwrite,
    )
    same = "the same bytes as the original" if sha256 == source.sha256 else "verified"
    print(f"{folder}: written and read back ({same}, SHA-256 {sha256[:12]}…)")


def export_onnx(source: Source, backbone: nn.Module, file: Path, size: int | None = None) -> float:
    """Write an ONNX file and compare it with PyTorch before it gets its name.

    The graph takes `images`, RGB in [0, 1] of (batch, 3, height, width), and normalises them itself. The batch is
    free; height and width are where the network allows it. Dirac and N-Jet layers are there as plain convolutions. What
    a segmentation trained gives scores of every pixel.

    Args:
        source: where the network comes from.
        backbone: the network, filled, float32, in evaluation mode, on the CPU.
        file: the file to write; an existing one is replaced.
        size: image side in pixels; by default that of the run's data, else of `pretrained_cfg`.

    Returns:
        The largest absolute difference between the outputs of onnxruntime and PyTorch.

    Raises:
        ValueError: the network cannot be exported, or the file gives other outputs.
    """
    config: dict[str, Any] = dict(getattr(backbone, "pretrained_cfg", {}))
    size = size or _training_size(source) or config["input_size"][-1]
    dense = _scores_pixels(source)
    network = Normalised(PixelScores(backbone) if dense else backbone, config["mean"], config["std"]).eval()
    exported = plain_convolutions(network)
    channels = int(source.backbone_kwargs.get("in_chans", 3))
    metadata = _metadata(source, config)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        for free_size in (True, False):
            try:
                _write_graph(exported, torch.rand(2, channels, size, size), partial, free_size, metadata)
                shapes = [(1, channels, size, size), (5, channels, size, size)]
                shapes += [(3, channels, size + 32, size + 64)] if free_size else []
                difference, relative = _compare(network, partial, shapes)
            except Exception as error:  # the exporter has dozens of errors; most say that a size must be fixed
                if not free_size:
                    raise ValueError(
                        f"{source.architecture} cannot become ONNX at {size} px: {_brief(error)}."
                    ) from error
                continue
            if relative <= TOLERANCE or not free_size:
                break
        if relative > TOLERANCE:
            raise ValueError(
                f"The ONNX model of {source.location} differs from PyTorch by {difference:.2g} (relative "
                f"{relative:.2g}, at most {TOLERANCE:g} is accepted); nothing was written."
            )
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    output = f"{source.num_classes} logits{' a pixel' * dense}" if source.num_classes else "pooled features"
    sides = "free height and width" if free_size else f"{size} x {size} pixels"
    print(f"{file}: RGB in [0, 1], any batch, {sides} -> {output}; opset {OPSET}, normalisation inside")
    print(f"{file}: largest difference from PyTorch {difference:.2g} (relative {relative:.2g}) over batches of 1 and 5")
    return difference


def _write_graph(network: nn.Module, example: Tensor, file: Path, free_size: bool, metadata: dict[str, str]) -> None:
    import onnx

    free = {0: torch.export.Dim("batch")}
    if free_size:
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    output = "logits" if metadata["output"].startswith("logits") else "features"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["images"],
            output_names=[output],
            dynamic_shapes={"images": free},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(file))


def _compare(network: nn.Module, file: Path, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Largest difference between onnxruntime and PyTorch on random images: absolute, and relative to the outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    absolute = relative = 0.0
    for shape in shapes:
        images = torch.rand(shape, generator=generator)
        with torch.no_grad():
            expected = network(images)
        (given,) = session.run(None, {"images": images.numpy()})
        if given.shape != tuple(expected.shape):
            raise ValueError(f"its outputs have the shape {given.shape} instead of {tuple(expected.shape)}")
        difference = (torch.from_numpy(given) - expected).abs().max().item()
        absolute = max(absolute, difference)
        relative = max(relative, difference / expected.abs().max().clamp_min(1e-12).item())
    return absolute, relative


def _metadata(source: Source, config: dict[str, Any]) -> dict[str, str]:
    """What the file says about itself; ONNX keeps strings."""
    return {
        "producer": "baton",
        "architecture": source.architecture,
        "source": source.location,
        "sha256": source.sha256,
        "input": "images: RGB in [0, 1], float32, (batch, channels, height, width)",
        "normalisation": "inside the graph",
        "mean": json.dumps(list(config["mean"])),
        "std": json.dumps(list(config["std"])),
        "output": (
            f"logits: (batch, classes{', height, width' * _scores_pixels(source)})"
            if source.num_classes
            else "features: pooled, (batch, features)"
        ),
        "classes": json.dumps(source.classes or []),
    }


def _scores_pixels(source: Source) -> bool:
    """Whether the classifier was trained to score the cells of a map."""
    model = (source.record.get("config") or {}).get("model") or {}
    return bool(source.num_classes) and str(model.get("class_path", "")).endswith(".Segmentation")


def _training_size(source: Source) -> int | None:
    """The image side of the data the run was trained on, where its configuration says it."""
    data = (source.record.get("config") or {}).get("data") or {}
    given = data.get("init_args") or {} if isinstance(data, dict) else {}
    return next((given[name] for name in ("size", "image_size") if isinstance(given.get(name), int)), None)


def _dtype(source: Source) -> torch.dtype:
    """The one precision of all floating-point tensors, else float32."""
    kinds = {tensor.dtype for tensor in source.tensors.values() if tensor.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _check_onnx() -> None:
    missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX files need {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'baton-vision[onnx]'."
        )


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are for the command to print."""

    def error(self, message: str) -> NoReturn:
        """Raise what the command prints."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        near = nearest(unknown.partition("=")[0], _OPTIONS, 1)
        if unknown:
            hint = f"; the nearest is {near[0]}" if near else f"; there are {', '.join(_OPTIONS)}"
            raise ValueError(f"{unknown} is not an option of `baton export`{hint}.")
        raise ValueError(f"`baton export`: {message}; for example `baton export runs/NAME --to FOLDER`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="baton export",
        description="Write a network as a folder that timm and Hugging Face read, or as ONNX; either is checked.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a run, a model folder, a checkpoint, wandb:… or timm:MODEL.TAG")
    parser.add_argument("--to", required=True, metavar="FOLDER | FILE.onnx", help="what to write")
    parser.add_argument("--size", type=int, help="image side in pixels (ONNX); by default that of the training data")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser
