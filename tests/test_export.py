"""Exported networks are the original: the same bytes in a folder, the same outputs in ONNX."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from baton import cli, export, handover
from baton.supervised import Segmentation

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

KWARGS = {"depth": 10, "width": 1}


def write(folder: Path, num_classes: int = 3, name: str = "wide_resnet", **kwargs) -> torch.nn.Module:
    """A trained-looking model folder: its batch statistics are not the initial ones."""
    kwargs = kwargs or KWARGS
    torch.manual_seed(1)
    backbone = timm.create_model(name, num_classes=num_classes, **kwargs)
    backbone(torch.randn(8, 3, 32, 32) * 2 + 1)
    handover.write_model(
        folder, backbone, backbone_kwargs=kwargs, config={"data": {"init_args": {"size": 24}}},
        metrics={"val/loss": 0.5}, parent={"source": "runs/before", "sha256": "ab" * 32, "parent": None},
        teacher={"source": "runs/teacher", "sha256": "cd" * 32, "parent": None},
        classes=["cat", "dog", "eel"] if num_classes == 3 else None,
    )  # fmt: skip
    return backbone.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("run") / "model"
    return folder, write(folder)


def complaint(args: list[str], capsys: pytest.CaptureFixture) -> str:
    assert cli.main(["export", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_folder_is_a_copy_with_its_history(models, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, backbone = models
    assert cli.main(["export", str(folder.parent), "--to", str(tmp_path / "copy")]) == 0
    assert "the same bytes as the original" in capsys.readouterr().out
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "copy"))
    assert after["label_names"] == ["cat", "dog", "eel"]
    for entry in ("sha256", "parent", "teacher", "metrics", "config", "backbone_kwargs"):
        assert after["baton"][entry] == before["baton"][entry]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'copy'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), backbone(images))


@pytest.mark.parametrize("num_classes", [3, 0])
def test_onnx_gives_the_same_outputs(num_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone = write(tmp_path / "model", num_classes)
    file = tmp_path / "out/net.onnx"
    assert cli.main(["export", str(tmp_path / "model"), "--to", str(file)]) == 0
    assert "largest difference from PyTorch" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["net.onnx"]  # nothing beside it
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    mean, std = (np.reshape(backbone.pretrained_cfg[key], (3, 1, 1)) for key in ("mean", "std"))
    assert not np.allclose(mean, 0)  # else nothing would show that it is inside
    for shape in [(1, 24, 24), (7, 24, 24), (2, 40, 56)]:
        images = np.random.default_rng(0).random((shape[0], 3, *shape[1:]), dtype=np.float32)
        (given,) = session.run(None, {"images": images})
        with torch.no_grad():
            expected = backbone(torch.from_numpy(((images - mean) / std).astype(np.float32))).numpy()
        assert given.shape == (shape[0], num_classes or backbone.num_features)
        assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [("wide_resnet", KWARGS), ("unet", {"levels": 2, "width": 4}), ("njet_unet", {"levels": 2, "width": 4}),
     ("deeplab", {"base": "test_resnet", "aspp": "njet", "width": 4})],
)  # fmt: skip
def test_onnx_of_a_segmentation_scores_pixels(backbone, kwargs, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    task = Segmentation(num_classes=5, backbone=backbone, backbone_kwargs=kwargs)
    task.configure_model()
    torch.nn.init.normal_(task.backbone.get_classifier().weight)
    config = {"model": {"class_path": "baton.supervised.Segmentation"}, "data": {"init_args": {"size": 24}}}
    handover.write_model(tmp_path / "m", task.backbone, backbone_kwargs=kwargs, config=config, metrics={}, parent=None)
    assert cli.main(["export", str(tmp_path / "m"), "--to", str(tmp_path / "net.onnx")]) == 0
    said = capsys.readouterr().out
    assert "-> 5 logits a pixel" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["output"] == "logits: (batch, classes, height, width)"
    for count, size in [(1, (24, 24)), (2, (40, 56) if "free height" in said else (24, 24))]:
        images = np.random.default_rng(0).random((count, 3, *size), dtype=np.float32)
        (given,) = session.run(None, {"images": images})
        with torch.no_grad():
            expected = task.eval().scores(torch.from_numpy(images)).numpy()
        assert given.shape == (count, 5, *size)
        assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "kwargs", "free"),
    [
        ("njet_nin", {"width": 0.05, "sigma": [1.3, 2.0, 0.8], "subsample": "pool"}, True),
        ("njet_nin", {"width": 0.05, "sigma": [1.3, 2.0, 0.8]}, False),  # sides are rounded, image by image
        ("diracnet", {"depth": 10, "width": 1}, True),
    ],
)
def test_parameterised_convolutions_are_plain_ones_in_onnx(name, kwargs, free, tmp_path: Path, capsys) -> None:
    backbone = write(tmp_path / "model", name=name, **kwargs)
    file = tmp_path / "net.onnx"
    assert cli.main(["export", str(tmp_path / "model"), "--to", str(file)]) == 0
    assert f"any batch, {'free height and width' if free else '24 x 24 pixels'} -> 3 logits" in capsys.readouterr().out
    graph = onnx.load(file).graph
    weights = {tensor.name for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(node.input[1] in weights for node in convolutions), "weights are computed in the graph"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    mean, std = (np.reshape(backbone.pretrained_cfg[key], (3, 1, 1)) for key in ("mean", "std"))
    images = np.random.default_rng(0).random((3, 3, 24, 24), dtype=np.float32)
    images *= np.array([0.1, 0.5, 1], dtype=np.float32).reshape(3, 1, 1, 1)  # else random images look alike
    (given,) = session.run(None, {"images": images})
    with torch.no_grad():
        expected = backbone(torch.from_numpy(((images - mean) / std).astype(np.float32))).numpy()
    assert expected.std(0).min() > 1e-4 * np.abs(expected).max()
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()


def test_onnx_says_what_it_is(models, tmp_path: Path) -> None:
    folder, backbone = models
    assert cli.main(["export", str(folder), "--to", str(tmp_path / "net.onnx")]) == 0
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(said["classes"]) == ["cat", "dog", "eel"]
    assert json.loads(said["mean"]) == pytest.approx(backbone.pretrained_cfg["mean"])
    assert said["sha256"] == handover.read_source(folder).sha256
    assert said["normalisation"] == "inside the graph"
    assert [entry.version for entry in model.opset_import if not entry.domain] == [export.OPSET]
    sides = [side.dim_param for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", "", "height", "width"]


def test_a_network_of_a_fixed_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=4, **kwargs)
    handover.write_model(tmp_path / "m", backbone, backbone_kwargs=kwargs, config={}, metrics={}, parent=None)
    file = tmp_path / "vit.onnx"
    assert cli.main(["export", str(tmp_path / "m"), "--to", str(file), "--size", "32"]) == 0
    assert "any batch, 32 x 32 pixels -> 4 logits" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert "cannot become ONNX at 48 px" in complaint(
        [str(tmp_path / "m"), "--to", f"{file}2.onnx", "--size=48"], capsys
    )


def test_a_wrong_copy_is_not_kept(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "net.onnx").write_text("the one from before")
    original = export._write_graph

    def wrong(network: torch.nn.Module, *args) -> None:
        network.mean += 0.01
        original(network, *args)
        network.mean -= 0.01

    monkeypatch.setattr(export, "_write_graph", wrong)
    assert "differs from PyTorch by" in complaint(
        [str(models[0]), "--to", str(tmp_path / "net.onnx"), "--overwrite"], capsys
    )
    assert (tmp_path / "net.onnx").read_text() == "the one from before"
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_is_replaced_unasked(models, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, file = tmp_path / "folder", tmp_path / "net.onnx"
    source = str(models[0])
    write(folder, 0)
    file.write_text("x")
    for target in (folder, file):
        assert "replace it with --overwrite" in complaint([source, "--to", str(target)], capsys)
    assert cli.main(["export", source, "--to", str(folder), "--overwrite"]) == 0
    assert handover.read_source(folder).num_classes == 3
    (folder / "thesis.txt").write_text("mine")
    assert cli.main(["export", source, "--to", str(folder), "--overwrite"]) == 0
    assert (folder / "thesis.txt").read_text() == "mine"
    (folder / "config.json").unlink()
    assert "which is no model" in complaint([source, "--to", str(folder), "--overwrite"], capsys)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_the_extra_is_missing(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    said = complaint([str(models[0]), "--to", str(tmp_path / "net.onnx")], capsys)
    assert "onnxruntime, which is not installed: pip install 'baton-vision[onnx]'" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: source, --to"),
        (["nowhere", "--to", "x"], "There is no 'nowhere'"),
        (
            ["x", "--to", "y", "--ovewrite"],
            "--ovewrite is not an option of `baton export`; the nearest is --overwrite.",
        ),
        (["x", "--to", "y.onnx", "--size", "big"], "argument --size: invalid int value: 'big'"),
        (["x", "--to", "y", "--size", "32"], "--size is for ONNX files"),
    ],
)
def test_mistakes(args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in complaint(args, capsys)


def test_help(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["baton"])
    assert cli.main(["export", "--help"]) == 0
    assert "--overwrite" in capsys.readouterr().out
