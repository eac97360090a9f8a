"""A hand-over claims: the same bytes on both sides, or one sentence that says why not."""

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from baton import handover, model_folder
from baton.backbones import create_backbone
from baton.handover import (
    build_backbone,
    check_restated,
    checkpoint_entry,
    load_backbone,
    load_checkpoint,
    load_weights,
    read_source,
    tensors_sha256,
    write_model,
)
from baton.task import Task

NETWORKS = {
    "test_resnet": {},
    "test_vit": {"img_size": [32, 48]},
    "test_convnext": {"drop_path_rate": 0.1},
    "wrn_16_1": {"drop_rate": 0.3, "in_chans": 1},
}


def network(name="wrn_16_1", num_classes=3, **kwargs):
    """A backbone of which no tensor, buffers included, still has the value it was initialised with."""
    backbone = create_backbone(name, num_classes=num_classes, **kwargs)
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            floating = tensor.is_floating_point()
            tensor.copy_(torch.rand(tensor.shape) + 0.1 if floating else torch.randint(99, tensor.shape))
    return backbone


def write(folder, backbone, kwargs=None, parent=None, **more):
    return write_model(
        folder,
        backbone,
        backbone_kwargs=kwargs or {},
        config={"seed": 1},
        metrics={"error": 0.25},
        parent=parent,
        **more,
    )


def checkpoint(path, backbone, name="wrn_16_1", **changes):
    """The checkpoint that a Lightning run of Baton leaves, reduced to what counts here."""
    tensors = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    content = {
        "epoch": 3,
        "state_dict": tensors | {"decoder.weight": torch.ones(2)},
        "hyper_parameters": {"backbone": name, "backbone_kwargs": {}, "lr": 0.1},
        "baton": checkpoint_entry(backbone, parent=None, classes=["a", "b", "c"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, path)
    return path


def assert_same_bytes(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert first[name].contiguous().numpy().tobytes() == second[name].contiguous().numpy().tobytes(), name


def sentence(call, *args, kind=ValueError, **kwargs):
    """The message of the error a call raises: one line, and a sentence."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert text[-1] in ".?"
    return text


@pytest.fixture
def model(tmp_path):
    write(tmp_path / "model", network())
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_gives_the_same_bytes(tmp_path, name, num_classes):
    backbone = network(name, num_classes, **NETWORKS[name])
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    sha256 = write(tmp_path / "model", backbone, NETWORKS[name])
    source = read_source(tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"))

    assert_same_bytes(before, loaded.state_dict())
    assert not loaded.training
    assert loaded.num_classes == source.num_classes == num_classes
    assert sha256 == source.sha256 == tensors_sha256(before) == source.record["sha256"]
    assert source.architecture == name
    assert source.backbone_kwargs == NETWORKS[name]
    assert source.record["metrics"] == {"error": 0.25}
    assert source.record["config"] == {"seed": 1}
    assert source.record["version"]["torch"] == torch.__version__
    x = torch.randn(2, *loaded.pretrained_cfg["input_size"])
    assert torch.equal(loaded(x), backbone.eval()(x))


def test_mean_std_and_size_travel(tmp_path):
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 40, 40)}
    backbone = network(pretrained_cfg_overlay=own)
    write(tmp_path / "model", backbone, {"pretrained_cfg_overlay": own})
    checkpoint(tmp_path / "a.ckpt", backbone)
    for location in (tmp_path / "model", tmp_path / "a.ckpt"):
        config = build_backbone(read_source(location)).pretrained_cfg
        assert {key: config[key] for key in own} == own
    timms = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert tuple(timms.pretrained_cfg["mean"]) == own["mean"]


def test_sha256_is_what_it_says():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7, dtype=torch.int64)}
    naive = hashlib.sha256()
    naive.update(b"a\0torch.int64\0()\0" + (7).to_bytes(8, "little"))
    naive.update(b"b\0torch.float32\0(2, 3)\0" + tensors["b"].numpy().tobytes())
    assert tensors_sha256(tensors) == naive.hexdigest()
    assert tensors_sha256(dict(reversed(tensors.items()))) == naive.hexdigest()
    assert tensors_sha256({**tensors, "b": tensors["b"].T.contiguous().T}) == naive.hexdigest()  # layout
    others = [{**tensors, "b": tensors["b"].reshape(3, 2)}, {**tensors, "b": tensors["b"].double()}]
    others += [{"c": tensors["b"], "a": tensors["a"]}, {**tensors, "b": -tensors["b"]}]
    assert len({tensors_sha256(other) for other in others} | {naive.hexdigest()}) == 5


def test_special_values_half_precision_and_empty_tensors_keep_their_bits():
    values = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), 1e-45])
    assert tensors_sha256({"a": values}) == tensors_sha256({"a": values.clone()})
    assert tensors_sha256({"a": torch.tensor([0.0])}) != tensors_sha256({"a": torch.tensor([-0.0])})
    assert tensors_sha256({"a": torch.zeros(0, 3)}) != tensors_sha256({"a": torch.zeros(3, 0)})


def test_half_precision_round_trip(tmp_path):
    backbone = network().bfloat16()
    write(tmp_path / "model", backbone)
    assert torch.equal(load_backbone(str(tmp_path / "model")).fc.weight, backbone.fc.weight)
    assert load_backbone(str(tmp_path / "model")).fc.weight.dtype == torch.bfloat16


def test_compiled_channels_last_and_shared_tensors_are_written_plainly(tmp_path):
    backbone = network()
    plain = write(tmp_path / "plain", backbone)
    assert write(tmp_path / "last", backbone.to(memory_format=torch.channels_last)) == plain
    assert write(tmp_path / "compiled", torch.compile(backbone)) == plain
    shared = network("test_vit")
    shared.blocks[1].attn.qkv.weight = shared.blocks[0].attn.qkv.weight
    write(tmp_path / "shared", shared)
    assert_same_bytes(shared.state_dict(), load_backbone(str(tmp_path / "shared")).state_dict())


def test_loading_into_a_compiled_backbone(model):
    backbone = torch.compile(network())
    report = load_weights(backbone, read_source(model), classifier=True)
    assert report.loaded == report.expected == len(backbone.state_dict())
    assert_same_bytes(read_source(model).tensors, backbone._orig_mod.state_dict())


@pytest.mark.parametrize("location", ["model", "run", "run/model/model.safetensors", "~/run"])
def test_accepted_paths(tmp_path, monkeypatch, location):
    sha256 = write(tmp_path / "model", network())
    shutil.copytree(tmp_path / "model", tmp_path / "run" / "model")
    checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", network())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_source(location).sha256 == sha256
    assert read_source(Path(location)).location == location


def test_checkpoint_gives_the_backbone_alone(tmp_path):
    backbone = network()
    path = checkpoint(tmp_path / "last.ckpt", backbone)
    source = read_source(path)
    assert_same_bytes(backbone.state_dict(), source.tensors)
    assert (source.num_classes, source.classes) == (3, ["a", "b", "c"])
    assert_same_bytes(backbone.state_dict(), load_backbone(str(path)).state_dict())
    renamed = {f"backbone._orig_mod.{key}": value for key, value in backbone.state_dict().items()}
    checkpoint(path, backbone, state_dict=renamed)
    assert_same_bytes(backbone.state_dict(), read_source(path).tensors)


def test_plain_timm_loads_every_folder(tmp_path):
    """In a process that imports nothing of Baton's but the registration of its backbones."""
    expected = {}
    for name, kwargs in NETWORKS.items():
        for classes in (0, 4):
            folder = tmp_path / f"{name}-{classes}"
            expected[str(folder)] = write(folder, network(name, classes, **kwargs), kwargs)
    code = (
        "import sys, timm, safetensors.torch as st, torch, baton.backbones\n"
        "assert not {'lightning', 'baton.handover'} & sys.modules.keys()\n"
        "for folder in sys.argv[1:]:\n"
        "    ours, theirs = st.load_file(f'{folder}/model.safetensors'), None\n"
        "    model = timm.create_model(f'local-dir:{folder}', pretrained=True)\n"
        "    theirs = model.state_dict()\n"
        "    assert ours.keys() == theirs.keys(), folder\n"
        "    assert all(torch.equal(ours[k].reshape(-1).view(torch.uint8), v.reshape(-1).view(torch.uint8))\n"
        "               for k, v in theirs.items()), folder\n"
        "    assert model.num_classes == int(folder.rpartition('-')[2])\n"
        "    assert not folder.endswith('wrn_16_1-4') or model.drop_rate == 0.3\n"
        "print('same', len(sys.argv) - 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *expected], capture_output=True, text=True, check=False)
    assert done.stdout == "same 8\n", done.stderr


def test_timms_own_folder_without_our_entry(tmp_path):
    backbone = network("test_resnet", 6)
    timm.models.save_for_hf(backbone, str(tmp_path / "theirs"), safe_serialization=True)
    source = read_source(tmp_path / "theirs")
    assert source.record == {}
    assert source.num_classes == 6
    assert_same_bytes(backbone.state_dict(), load_backbone(str(tmp_path / "theirs")).state_dict())


def test_timm_source(monkeypatch):
    def pretrained(name, **kwargs):
        assert (name, kwargs) == ("resnet18.a1_in1k", {"pretrained": True})
        return backbone

    backbone = create_backbone("resnet18.a1_in1k")
    monkeypatch.setattr(handover.timm, "create_model", pretrained)
    source = read_source("timm:resnet18.a1_in1k")
    assert (source.architecture, source.num_classes, source.record) == ("resnet18", 1000, {})
    assert_same_bytes(backbone.state_dict(), source.tensors)
    monkeypatch.undo()
    fresh = build_backbone(source, 10)
    load_weights(fresh, source, classifier=False)
    assert fresh.pretrained_cfg["mean"] == backbone.pretrained_cfg["mean"]


# ---------------------------------------------------------------------------------------------- classifier, tolerance


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "wrn_16_1"])
def test_trunk_with_a_fresh_classifier(tmp_path, name):
    written = network(name, 5)
    write(tmp_path / "model", written)
    source = read_source(tmp_path / "model")
    backbone = build_backbone(source, 9)
    classifier = backbone.get_classifier()
    before = [p.clone() for p in classifier.parameters()]
    report = load_weights(backbone, source, classifier=False)

    assert backbone.num_classes == 9
    assert all(torch.equal(old, new) for old, new in zip(before, classifier.parameters(), strict=True))
    fresh = {key for key in written.state_dict() if written.state_dict()[key].shape != backbone.state_dict()[key].shape}
    assert set(report.fresh) == fresh
    trunk = {key: tensor for key, tensor in written.state_dict().items() if key not in fresh}
    assert_same_bytes(trunk, {key: backbone.state_dict()[key] for key in trunk})
    values = sum(tensor.numel() for tensor in trunk.values())
    module = sorted(fresh)[0].rpartition(".")[0]
    assert (
        str(report) == f"{len(trunk)} of {len(trunk)} tensors, {values:,} values, fresh classifier {module} (2 tensors)"
    )


def test_same_class_count_still_keeps_the_fresh_classifier(model):
    source = read_source(model)
    backbone = build_backbone(source)
    before = backbone.fc.weight.clone()
    load_weights(backbone, source, classifier=False)
    assert torch.equal(backbone.fc.weight, before)
    load_weights(backbone, source, classifier=True)
    assert torch.equal(backbone.fc.weight, source.tensors["fc.weight"])


def test_trunk_without_classifier_on_either_side(tmp_path):
    write(tmp_path / "headless", network(num_classes=0))
    write(tmp_path / "headed", network(num_classes=3))
    for name, classes in (("headless", 4), ("headed", 0)):
        source = read_source(tmp_path / name)
        report = load_weights(build_backbone(source, classes), source, classifier=False)
        assert report.loaded == report.expected == len(read_source(tmp_path / "headless").tensors)
        assert bool(report.fresh) == (classes > 0)


def test_two_classifiers(tmp_path):
    """A distilled transformer has a tuple of classifiers in its pretrained_cfg."""
    name = "deit_tiny_distilled_patch16_224"
    write(tmp_path / "model", network(name, 2))
    source = read_source(tmp_path / "model")
    report = load_weights(build_backbone(source, 3), source, classifier=False)
    assert str(report).endswith("fresh classifier head and head_dist (4 tensors)")


def test_misfits_are_named_and_nothing_is_changed(model):
    source = read_source(model)
    backbone = build_backbone(source, 7)
    backbone.extra = nn.Linear(2, 3)
    del source.tensors["fc.bias"]
    source.tensors["surplus"] = torch.ones(2)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    text = sentence(load_weights, backbone, source, classifier=True)
    assert "3 not in the file: extra.bias, extra.weight, fc.bias" in text
    assert "1 not in the backbone: surplus" in text
    assert f"1 of another shape: fc.weight (file {(3, 64)}, backbone {(7, 64)})" in text
    assert repr(str(model)) in text
    assert "WideResNet" in text
    assert_same_bytes(before, backbone.state_dict())


def test_many_misfits_are_counted(model):
    source = read_source(model)
    for name in [name for name in source.tensors if name.endswith("running_mean")]:
        del source.tensors[name]
    text = sentence(load_weights, build_backbone(source), source, classifier=True)
    assert re.search(r"\d+ not in the file: (\S+, ){4}\S+ and \d+ more", text)


def test_tolerated_patterns(model):
    source = read_source(model)
    backbone = build_backbone(source, 7)
    backbone.extra = nn.Linear(2, 3)
    source.tensors["surplus.a"] = torch.ones(2)
    before = backbone.fc.weight.clone()
    sentence(load_weights, backbone, source, classifier=True, tolerate=["fc.*", "surplus.*"])
    backbone.handover_tolerates = ("extra.*",)
    report = load_weights(backbone, source, classifier=True, tolerate=["fc.*", "surplus.*"])
    assert report.tolerated == ("extra.bias", "extra.weight", "fc.bias", "fc.weight", "surplus.a")
    assert str(report).endswith("tolerated extra.bias, extra.weight, fc.bias, fc.weight, surplus.a")
    assert report.loaded == report.expected == len(source.tensors) - 3
    assert torch.equal(backbone.fc.weight, before)


def test_nothing_fits_is_an_error_even_if_tolerated(model):
    source = read_source(model)
    foreign = create_backbone("test_convnext", num_classes=3)
    for tolerate in ([], ["*"]):
        text = sentence(load_weights, foreign, source, classifier=False, tolerate=tolerate)
        assert text.startswith("None of the ")
        assert "wrn_16_1" in text
        assert "ConvNeXt" in text


def test_a_prefix_that_does_not_belong_loads_nothing(model):
    source = read_source(model)
    tensors = {f"module.{key}": value for key, value in source.tensors.items()}
    source.tensors.clear()
    source.tensors.update(tensors)
    assert "None of the" in sentence(load_weights, build_backbone(source), source, classifier=True)


def test_conversions(model):
    source = read_source(model)
    half = build_backbone(source).half()
    assert str(load_weights(half, source, classifier=True)).endswith("converted from float32 to float16")
    assert torch.equal(half.fc.weight, source.tensors["fc.weight"].half())
    double = build_backbone(source).double()
    load_weights(double, source, classifier=True)
    assert torch.equal(double.fc.weight, source.tensors["fc.weight"].double())
    mixed = build_backbone(source)
    mixed.fc.half()
    assert "fc.bias is float32" in sentence(load_weights, mixed, source, classifier=True)
    source.tensors["fc.weight"] = source.tensors["fc.weight"].double()
    assert "fc.weight is float64" in sentence(load_weights, build_backbone(source), source, classifier=True)
    source.tensors["fc.weight"] = source.tensors["fc.weight"].long()
    assert "fc.weight is int64" in sentence(load_weights, build_backbone(source), source, classifier=True)


def test_a_backbone_that_alters_what_it_loads_is_found_out(model):
    class Altering(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            self.weight.data[0, 0] += 1e-3

    source = read_source(model)
    backbone = build_backbone(source)
    backbone.fc = Altering(64, 3)
    assert "fc.weight" in sentence(load_weights, backbone, source, classifier=True)


def test_restating(tmp_path):
    write(tmp_path / "model", network("wide_resnet", depth=10, width=1), {"depth": 10, "width": 1})
    source = read_source(tmp_path / "model")
    built = {"depth": 10, "width": 1}
    assert check_restated(source, None, None) == built
    assert check_restated(source, "wide_resnet", {"depth": 10, "num_classes": 10, "in_chans": None}) == built
    assert check_restated(source, "wide_resnet", {}) == built
    assert check_restated(source, None, {"drop_block_rate": 0.1}) == built | {"drop_block_rate": 0.1}
    text = sentence(check_restated, source, "wrn_16_2", None)
    assert "'wide_resnet'" in text
    assert "'wrn_16_2'" in text
    text = sentence(check_restated, source, "wide_resnet", {"width": 2, "drop_rate": 0.5})
    assert "width=1" in text
    assert "width=2" in text
    assert "no in_chans" in sentence(check_restated, source, None, {"in_chans": 1})


def test_every_stage_chooses_its_pooling(tmp_path):
    write(tmp_path / "model", network(), {})
    source = read_source(tmp_path / "model")
    merged = check_restated(source, None, {"global_pool": "map3"})
    assert merged == {"global_pool": "map3"}
    backbone = build_backbone(source, 5, merged)
    assert load_weights(backbone, source, classifier=False).loaded == len(source.tensors) - 2
    assert backbone.fc.weight.shape == (5, 64 * 9)
    write(tmp_path / "next", backbone, merged, parent=source.lineage())
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(load_backbone(str(tmp_path / "next"))(images), backbone.eval()(images))
    # and back again
    source = read_source(tmp_path / "next")
    backbone = build_backbone(source, 5, check_restated(source, None, {"global_pool": "avg"}))
    load_weights(backbone, source, classifier=False)
    assert backbone.fc.weight.shape == (5, 64)


def test_a_pooling_with_weights_is_not_made_up(tmp_path):
    write(tmp_path / "model", network("test_vit"), {})
    source = read_source(tmp_path / "model")
    backbone = build_backbone(source, 0, check_restated(source, None, {"global_pool": "map"}))
    assert "attn_pool" in sentence(load_weights, backbone, source, classifier=False)


@pytest.mark.parametrize("restated", [0.5, 0, None])
def test_a_restated_dropping_rate_wins_over_the_file(tmp_path, restated):
    write(tmp_path / "model", network(drop_rate=0.3), {"drop_rate": 0.3})
    source = read_source(tmp_path / "model")
    merged = check_restated(source, None, {"drop_rate": restated})
    expected = 0.3 if restated is None else restated  # None is timm's "not given"
    assert merged == {"drop_rate": expected}
    for overrides in (merged, {"drop_rate": restated, "num_classes": 9}):
        backbone = build_backbone(source, 5, overrides)
        assert (backbone.drop_rate, backbone.num_classes) == (expected, 5)
        load_weights(backbone, source, classifier=False)
    assert build_backbone(source).drop_rate == 0.3
    write(tmp_path / "next", network(drop_rate=expected), merged, parent=source.lineage())
    assert load_backbone(str(tmp_path / "next")).drop_rate == expected


@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"])
def test_every_rate_may_change_between_stages(tmp_path, rate):
    write(tmp_path / "model", network("test_vit"))
    source = read_source(tmp_path / "model")
    changed = build_backbone(source, overrides=check_restated(source, "test_vit", {rate: 0.7})).train()
    load_weights(changed, source, classifier=True)
    x = torch.rand(8, *changed.pretrained_cfg["input_size"])
    assert torch.equal(changed.eval()(x), load_backbone(str(tmp_path / "model"))(x))
    assert not torch.equal(changed.train()(x), changed.eval()(x))


def test_a_task_builds_and_records_the_restated_rate(tmp_path):
    write(tmp_path / "first" / "model", network(drop_rate=0.3), {"drop_rate": 0.3}, parent={"source": "zero"})
    first = read_source(tmp_path / "first")
    task = Task(init_from=str(tmp_path / "first"), backbone_kwargs={"drop_rate": 0.6})
    assert task.backbone.drop_rate == 0.6
    assert task.hparams["backbone_kwargs"] == {"drop_rate": 0.6}
    saved = {"hyper_parameters": dict(task.hparams), "state_dict": task.state_dict()}
    task.on_save_checkpoint(saved)
    torch.save(saved, tmp_path / "last.ckpt")
    source = read_source(tmp_path / "last.ckpt")
    assert source.backbone_kwargs == {"drop_rate": 0.6}
    assert source.record["parent"] == first.lineage()
    assert source.record["format"] == model_folder.FORMAT
    assert list(source.pretrained_cfg["mean"]) == list(task.backbone.pretrained_cfg["mean"])
    assert "no stem_width" in sentence(Task, init_from=str(tmp_path / "first"), backbone_kwargs={"stem_width": 7})


# ------------------------------------------------------------------------------------------------------- provenance


def test_chain_of_three_stages(tmp_path):
    shas, parent = [], None
    for stage in ("pretext", "supervised", "distil"):
        folder = tmp_path / stage / "model"
        backbone = network()
        shas.append(write(folder, backbone, parent=parent, classes=["cat", "dog", "eel"]))
        source = read_source(tmp_path / stage)
        parent = source.lineage()
    assert source.classes == ["cat", "dog", "eel"]
    assert len(set(shas)) == 3
    record = json.loads((folder / "config.json").read_text())["baton"]
    assert record["parent"] == {
        "source": str(tmp_path / "supervised"),
        "sha256": shas[1],
        "parent": {"source": str(tmp_path / "pretext"), "sha256": shas[0], "parent": None},
    }
    path = tmp_path / "next.ckpt"
    checkpoint(path, backbone, baton=checkpoint_entry(backbone, parent))
    resumed = read_source(path)
    assert resumed.lineage() == {"source": str(path), "sha256": shas[2], "parent": parent}
    assert load_checkpoint(path)["baton"]["parent"] == parent  # all that a resumed run has
    write(tmp_path / "resumed", backbone, parent=resumed.record["parent"])
    assert read_source(tmp_path / "resumed").record["parent"] == parent


def test_a_students_teacher_is_recorded_and_stays_in_the_line(tmp_path):
    write(tmp_path / "teacher", network(), parent={"source": "zero", "sha256": "0" * 64, "parent": None})
    taught = read_source(tmp_path / "teacher").lineage()
    write(tmp_path / "student", network(), parent=None, teacher=taught)
    record = json.loads((tmp_path / "student" / "config.json").read_text())["baton"]
    assert record["teacher"] == taught
    assert record["parent"] is None
    student = read_source(tmp_path / "student")
    assert student.lineage() == {**student.lineage(), "parent": None, "teacher": taught}
    write(tmp_path / "tuned", network(), parent=student.lineage())
    record = read_source(tmp_path / "tuned").record
    assert record["parent"]["teacher"] == taught
    assert "teacher" not in record  # nobody taught it


def test_lineage_is_recorded_as_it_is_given(tmp_path):
    """A run has a dictionary only: that of a source it read, or that of the checkpoint it resumes."""
    given = {"source": "timm:resnet18.a1_in1k", "sha256": "0" * 64, "parent": None}
    write(tmp_path / "model", network(), parent=given)
    assert read_source(tmp_path / "model").lineage()["parent"] == given
    assert checkpoint_entry(network(), given)["parent"] == given
    assert checkpoint_entry(network(), None)["parent"] is None


def test_writing_leaves_the_random_state_alone(tmp_path):
    backbone = network()
    state = torch.get_rng_state()
    write(tmp_path / "model", backbone)
    assert torch.equal(state, torch.get_rng_state())


def test_metrics_and_config_become_valid_json(tmp_path):
    write_model(
        tmp_path / "model",
        network(),
        backbone_kwargs={},
        config={"path": tmp_path},
        metrics={"loss": float("nan"), "top1": torch.tensor(0.5)},
        parent=None,
    )
    record = json.loads((tmp_path / "model" / "config.json").read_text(), parse_constant=pytest.fail)["baton"]
    assert record["metrics"] == {"loss": None, "top1": 0.5}
    assert record["config"] == {"path": str(tmp_path)}


# ---------------------------------------------------------------------------------------------------------- writing


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_another_model_is_refused_then_replaced(tmp_path):
    first, second = network(), network()
    old = write(tmp_path / "model", first)
    assert "already holds another model" in sentence(write, tmp_path / "model", second)
    assert read_source(tmp_path / "model").sha256 == old
    assert write(tmp_path / "model", first) == old
    new = write(tmp_path / "model", second, replace=True)
    assert read_source(tmp_path / "model").sha256 == new != old
    assert entries(tmp_path) == ["model", "model/config.json", "model/model.safetensors"]


def test_what_lies_beside_a_model_stays(tmp_path):
    """Notes, a card for the hub, a folder of figures: no model takes its place without them."""
    write(tmp_path / "model", network())
    (tmp_path / "model" / "README.md").write_text("mine")
    (tmp_path / "model" / "onnx").mkdir()
    (tmp_path / "model" / "onnx" / "config.json").write_text("{}")  # named like ours, and not ours
    (tmp_path / "model" / "link").symlink_to("nowhere")
    second = network()
    assert "already holds another" in sentence(write, tmp_path / "model", second)
    for replace in (True, False):
        assert write(tmp_path / "model", second, replace=replace) == read_source(tmp_path / "model").sha256
        names = ["README.md", "config.json", "link", "model.safetensors", "onnx", "onnx/config.json"]
        assert entries(tmp_path / "model") == names
        assert (tmp_path / "model" / "README.md").read_text() == "mine"
        assert (tmp_path / "model" / "onnx" / "config.json").read_text() == "{}"
        assert (tmp_path / "model" / "link").readlink() == Path("nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["cat.jpg", "config.json"])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "photos" / name).write_bytes(b"cat")
    (tmp_path / "empty").mkdir()
    before = entries(tmp_path)
    assert "cat.jpg" in sentence(write, tmp_path / "photos", network(), replace=True)
    assert entries(tmp_path) == before
    assert (tmp_path / "photos" / name).read_bytes() == b"cat"
    write(tmp_path / "empty", network())


def fail_with_enospc(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("victim", ["save_file", "save_config_for_hf", "_carry_over", "_flush", "rename"])
def test_a_failure_half_way_leaves_the_old_model(tmp_path, monkeypatch, victim):
    old = write(tmp_path / "run" / "model", network())
    if victim == "save_file":
        monkeypatch.setattr(model_folder.safetensors.torch, victim, fail_with_enospc)
    elif victim == "rename":
        genuine = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda p, to: fail_with_enospc() if p.name.endswith(".partial") else genuine(p, to)
        )
    else:
        monkeypatch.setattr(model_folder, victim, fail_with_enospc)
    text = sentence(write, tmp_path / "run" / "model", network(), replace=True)
    assert "No space left" in text
    monkeypatch.undo()
    assert read_source(tmp_path / "run").sha256 == old
    assert entries(tmp_path / "run") == ["model", "model/config.json", "model/model.safetensors"]


def test_a_really_full_disk(tmp_path):
    """The kernel refuses to let the file grow, as it does on a full disk or over a quota."""
    write(tmp_path / "model", network())
    old, limits = read_source(tmp_path / "model").sha256, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        text = sentence(write, tmp_path / "model", network(), replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Could not write the model" in text
    assert read_source(tmp_path / "model").sha256 == old
    assert entries(tmp_path) == ["model", "model/config.json", "model/model.safetensors"]


def test_leftovers_of_a_killed_process(tmp_path):
    old = write(tmp_path / "run" / "model", network())
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".model.previous")  # killed between the two renames
    (tmp_path / "run" / ".model.partial").mkdir()  # killed while writing
    (tmp_path / "run" / ".model.partial" / "model.safetensors").write_bytes(b"half")
    sentence(read_source, tmp_path / "run", kind=FileNotFoundError)
    sentence(write, tmp_path / "run" / "model", network())
    assert read_source(tmp_path / "run").sha256 == old
    write(tmp_path / "run" / "model", network(), replace=True)
    assert entries(tmp_path / "run") == ["model", "model/config.json", "model/model.safetensors"]


def test_a_network_that_its_name_cannot_rebuild_is_not_written(tmp_path):
    backbone = network()
    backbone.fc = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    assert "fc.1.weight" in sentence(write, tmp_path / "model", backbone)
    assert "in_chans=3" in sentence(write, tmp_path / "model", network(in_chans=1), {"in_chans": 3})
    assert "architecture" in sentence(write, tmp_path / "model", nn.Linear(2, 2))
    assert entries(tmp_path) == []


def test_read_only_folder(tmp_path):
    folder = Path(tempfile.mkdtemp())  # not tmp_path: the parents of that are closed to others altogether
    backbone = network()
    write(folder / "model", backbone)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:  # nothing is read-only for root
            os.seteuid(65534)
        text = sentence(write, folder / "model", network(), replace=True)
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
    assert "Permission denied" in text
    assert repr(str(folder / "model")) in text
    assert read_source(folder).sha256 == tensors_sha256(backbone.state_dict())
    assert entries(folder) == ["model", "model/config.json", "model/model.safetensors"]
    shutil.rmtree(folder)


def test_parent_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    assert "Could not write" in sentence(write, tmp_path / "run" / "model", network())


# ------------------------------------------------------------------------------------------------------ wrong sources


def test_missing(tmp_path):
    (tmp_path / "supervised").mkdir()
    text = sentence(read_source, tmp_path / "supervisd", kind=FileNotFoundError)
    assert "did you mean supervised?" in text
    assert "wandb:" in sentence(read_source, tmp_path / "no" / "last.ckpt", kind=FileNotFoundError)
    assert "timm:" in sentence(read_source, "hf-hub:timm/resnet18", kind=FileNotFoundError)


def test_folder_without_a_model(tmp_path):
    for name in "fedcba":
        (tmp_path / f"{name}.jpg").touch()
    text = sentence(read_source, tmp_path, kind=FileNotFoundError)
    assert "holds a.jpg, b.jpg, c.jpg, d.jpg, e.jpg and 1 more" in text
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in sentence(read_source, tmp_path / "empty", kind=FileNotFoundError)


@pytest.mark.parametrize(("kept", "lost"), [("model.safetensors", "config.json"), ("config.json", "model.safetensors")])
def test_half_a_folder(model, kept, lost):
    (model / lost).unlink()
    text = sentence(read_source, model, kind=FileNotFoundError)
    assert f"holds {kept} but no {lost}" in text


def test_unfinished_run(tmp_path):
    checkpoint(tmp_path / "run" / "checkpoints" / "epoch=1.ckpt", network())
    checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt", network())
    text = sentence(read_source, tmp_path / "run", kind=FileNotFoundError)
    assert "has not finished" in text
    assert str(tmp_path / "run" / "checkpoints" / "last.ckpt") in text


@pytest.mark.parametrize("name", ["photo.jpg", "last.ckpt"])
@pytest.mark.parametrize(
    ("content", "cause"), [(b"\xff\xd8\xff\xe0\x00\x10JFIF" * 9, "not a checkpoint"), (b"", "empty"), (b"{}", "not a")]
)
def test_wrong_file(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    text = sentence(read_source, tmp_path / name)
    assert cause in text
    assert name in text


def test_truncated_checkpoint(tmp_path):
    whole = checkpoint(tmp_path / "whole.ckpt", network()).read_bytes()
    torch.save(torch.load(tmp_path / "whole.ckpt"), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.ckpt").read_bytes()
    assert read_source(tmp_path / "old.ckpt").sha256 == read_source(tmp_path / "whole.ckpt").sha256
    path = tmp_path / "last.ckpt"
    for content in (whole, old):
        for end in (1, 2, 3, 4, 30, 1000, len(content) // 3, len(content) // 2, len(content) - 1000, len(content) - 1):
            path.write_bytes(content[:end])
            text = sentence(read_source, path)
            assert "damaged or incomplete" in text, (end, text)
            assert f"{end:,} bytes" in text


def test_one_flipped_bit_in_a_checkpoint(tmp_path):
    path = checkpoint(tmp_path / "last.ckpt", network())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path)  # torch does not notice
    assert "damaged" in sentence(read_source, path)


def test_truncated_safetensors(model):
    whole = (model / "model.safetensors").read_bytes()
    for end in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (model / "model.safetensors").write_bytes(whole[:end])
        text = sentence(read_source, model)
        assert "damaged or incomplete" in text
        assert f"({end:,} bytes)" in text
    (model / "model.safetensors").write_bytes(os.urandom(3000))
    assert "damaged or incomplete" in sentence(read_source, model)


def test_checksum_mismatch(model):
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert "not those its config.json was written for" in sentence(read_source, model)


def test_files_of_two_models_mixed(model, tmp_path):
    write(tmp_path / "other", network())
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    assert "SHA-256" in sentence(read_source, model)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "\x00", '{"architecture": "wrn_16_1"}', "[" * 100_000, '{"pretrained_cfg": {}}']
)
def test_broken_config(model, content):
    (model / "config.json").write_text(content)
    assert "config.json" in sentence(read_source, model)


def change(model, **changes):
    config = json.loads((model / "config.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        entry = config
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", 3),
        ("pretrained_cfg", []),
        ("num_classes", "ten"),
        ("baton", None),
        ("baton__format", "1"),
        ("baton__sha256", 7),
        ("baton__backbone_kwargs", [1]),
    ],
)
def test_config_entries_of_another_kind(model, key, value):
    change(model, **{key: value})
    assert key.rpartition("__")[2] in sentence(read_source, model)


def test_newer_format(model, tmp_path):
    change(model, baton__format=2)
    assert "update Baton" in sentence(read_source, model)
    checkpoint(tmp_path / "a.ckpt", network(), baton={"num_classes": 3, "format": 2})
    assert "update Baton" in sentence(read_source, tmp_path / "a.ckpt")


def test_unknown_architecture_and_arguments(model):
    change(model, architecture="wrn_16_11")
    text = sentence(load_backbone, str(model))
    assert "'wrn_16_11'" in text
    assert "wrn_16_1" in text
    change(model, architecture="wrn_16_1", baton__backbone_kwargs={"depht": 16})
    assert "depht" in sentence(load_backbone, str(model))


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def bombs(path, marker):
    """The same bomb in all the wrappings a checkpoint comes in."""
    backbone = network()
    for protocol in (2, 5):
        yield checkpoint(path, backbone, surprise=Bomb(marker))
        buffer = io.BytesIO()
        torch.save({"state_dict": {}, "surprise": Bomb(marker)}, buffer, pickle_protocol=protocol)
        path.write_bytes(buffer.getvalue())
        yield path
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=protocol))
        yield path
    path.write_bytes(f"\x80\x02cos\nsystem\nX\x00\x00\x00\x00touch {marker}".encode("latin-1"))
    yield path
    torch.save(Bomb(marker), path, _use_new_zipfile_serialization=False)
    yield path


def test_code_in_a_pickle_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    number = 0
    for number, path in enumerate(bombs(tmp_path / "last.ckpt", marker), start=1):
        text = sentence(read_source, path)
        assert not marker.exists()
        assert "never runs code" in text, (number, text)
        assert re.search(r"pathlib|system|getattr", text), text
    assert number == 8
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb is a real one


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"conv.weight": torch.ones(3)}, "optimizer": {}},
        {"state_dict": {"backbone.a": torch.ones(1)}, "hyper_parameters": {"lr": 0.1}},
        {"state_dict": {"backbone.a": torch.ones(1)}, "hyper_parameters": {"backbone": "resnet18"}},
        {"conv.weight": torch.ones(3)},
        {"state_dict": torch.ones(3), "hyper_parameters": [1], "baton": "x"},
        torch.ones(3),
        [1, 2],
    ],
)
def test_checkpoint_of_another_framework(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    text = sentence(read_source, tmp_path / "last.ckpt")
    assert "not one of Baton's" in text
    assert (sorted(content)[0] if isinstance(content, dict) else type(content).__name__) in text


def test_load_checkpoint_gives_everything_and_names_the_file_as_asked(tmp_path):
    path = checkpoint(tmp_path / "last.ckpt", network())
    assert load_checkpoint(str(path)).keys() == torch.load(path).keys()
    assert load_checkpoint(path)["epoch"] == 3
    path.write_bytes(path.read_bytes()[:1000])
    assert repr(str(path)) in sentence(load_checkpoint, path)
    assert "'best'" in sentence(load_checkpoint, path, "best")


def test_checkpoint_without_backbone_tensors(tmp_path):
    checkpoint(tmp_path / "last.ckpt", network(), state_dict={"decoder.weight": torch.ones(2)})
    assert "None of the 0 tensors" in sentence(load_backbone, str(tmp_path / "last.ckpt"))


def test_timm_errors(monkeypatch):
    assert "test_resnet" in sentence(read_source, "timm:test_resnett")
    assert "resnet18.a1_in1k" in sentence(read_source, "timm:resnet18.nope")

    def offline(name, **kwargs):
        raise ConnectionError("Name or service not known\nlong\ntrace") if kwargs["pretrained"] else AssertionError

    monkeypatch.setattr(handover.timm, "create_model", offline)
    monkeypatch.setattr(handover, "create_backbone", lambda name: None)
    text = sentence(read_source, "timm:resnet18.a1_in1k")
    assert "Name or service not known" in text
    assert "check the network" in text


def test_wandb(model, monkeypatch, tmp_path):
    class Artifact:
        entity, project, name, digest = "me", "vision", "net:v3", "0123456789abcdef"

        def download(self, root):
            shutil.copytree(model, root, dirs_exist_ok=True)
            return root

    class Api:
        def artifact(self, name):
            if name != "me/vision/net:best":
                raise ValueError("artifact membership 'net:worst' not found")
            return Artifact()

    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = read_source("wandb:me/vision/net:best")
    assert source.location == "wandb:me/vision/net:best"
    assert source.sha256 == read_source(model).sha256
    assert (tmp_path / "cache/baton/artifacts/me/vision/net-v3-0123456789ab/config.json").is_file()
    assert "not found" in sentence(read_source, "wandb:me/vision/net:worst")
    assert "Expected wandb:" in sentence(read_source, "wandb:net")


def test_wandb_without_a_login(monkeypatch):
    wandb = pytest.importorskip("wandb")

    def no_login():
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "Api", no_login)
    text = sentence(read_source, "wandb:me/vision/net:best")
    assert "No API key configured" in text


def test_unreadable_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = checkpoint(tmp_path / "last.ckpt", network())
    path.chmod(0)
    assert "No permission" in sentence(read_source, path)


def test_safetensors_hold_what_the_public_library_reads(model):
    assert_same_bytes(safetensors.torch.load_file(model / "model.safetensors"), read_source(model).tensors)
