"""DeepLab: a trunk of timm's at its resolution, pyramids by hand, and trunks that come from elsewhere."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from baton.backbones import create_backbone
from baton.backbones.deeplab import AtrousPyramid
from baton.data.masks import IGNORE
from baton.handover import read_source
from baton.layers import NJetPyramid2d
from baton.optim import Optimizer
from baton.supervised import Classification, Segmentation
from tiny import Arrays, MaskArrays, fit, hand_over, same, state

SMALL = {"base": "test_resnet", "width": 5, "rates": [1, 2, 3, 4]}
KINDS = ["atrous", "atrous_shared", "njet"]


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return create_backbone("deeplab", **{**SMALL, **kwargs})


# ------------------------------------------------------------------------------------------------------------- pyramid


@pytest.mark.parametrize("shared", [False, True])
def test_an_atrous_pyramid_by_hand(shared):
    torch.manual_seed(0)
    pyramid = AtrousPyramid(3, 2, (1, 2, 4), shared).double()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    y = pyramid(x)
    padded = F.pad(x, (4, 4, 4, 4))
    expected = torch.zeros_like(y)
    for number, rate in enumerate((1, 2, 4)):
        conv = pyramid.branches[0 if shared else number]
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                top, left = 4 + down * rate, 4 + right * rate
                seen = padded[:, :, top : top + 7, left : left + 5]
                expected = expected + torch.einsum("oc,bchw->bohw", conv.weight[:, :, down + 1, right + 1], seen)
        if number == 0 or not shared:
            expected = expected + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.gradcheck(pyramid, x)


def test_numbers_of_parameters():
    found = {}
    with torch.device("meta"):
        for kind in KINDS:
            model = create_backbone("deeplab", aspp=kind, num_classes=0)
            found[kind] = [sum(p.numel() for p in part.parameters()) for part in (model, model.aspp)]
    assert {kind: parts[1] for kind, parts in found.items()} == {
        "atrous": 1_548_288 + 84, "atrous_shared": 387_072 + 21, "njet": 430_080 + 4 + 21,
    }  # fmt: skip
    assert {whole - aspp for whole, aspp in found.values()} == {42_500_160}
    text = timm.models.model_entrypoint("deeplab").__doc__
    assert all(f"{found[kind][0]:,} " in text for kind in ("atrous", "njet"))


def test_scales_begin_with_the_windows_of_the_rates():
    with torch.device("meta"):
        model = create_backbone("deeplab", base="test_resnet", aspp="njet", order=1)
    assert isinstance(model.aspp, NJetPyramid2d)
    assert model.aspp.sigmas == (3, 6, 9, 12)
    assert model.aspp.kernel_size == 2 * 24 + 1
    assert build(aspp="njet", sigmas=[1.0, 1.5], extent=3.0).aspp.sigma.tolist() == pytest.approx([1.0, 1.5])
    assert build(aspp="njet", order=1).aspp.weight.shape[2] == 3


def test_convolutions_begin_as_deeplabs_and_the_classifier_keeps_sizes():
    for kind in ("atrous", "atrous_shared"):
        model = build(aspp=kind, width=64, num_classes=64)
        for conv in model.aspp.branches:
            assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not conv.bias.any()
    scores = torch.randn(4, 64)
    assert torch.allclose(model.fc(scores).norm(dim=1), scores.norm(dim=1), rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- trunk


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_map_has_the_resolution_that_was_asked_for(kind, stride):
    model = build(aspp=kind, output_stride=stride).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        last, maps = model.forward_intermediates(images)
    assert last.shape == (2, 5, math.ceil(65 / stride), math.ceil(97 / stride))
    assert [info["reduction"] for info in model.feature_info][-2:] == [stride, stride]
    assert model.feature_info[-1] == {"num_chs": 5, "reduction": stride, "module": "aspp"}
    assert len(maps) == len(model.trunk.feature_info) + 1
    torch.testing.assert_close(last, model.aspp(maps[-2]))


def test_the_trunk_computes_what_timms_network_does():
    model = build().eval()
    theirs = timm.create_model("test_resnet", output_stride=8, num_classes=0, global_pool="").eval()
    theirs.load_state_dict(model.trunk.state_dict())
    images = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_intermediates(images)[1][-2], theirs(images))


def test_other_trunks():
    model = build(base="test_vit", base_kwargs={"img_size": 32}, output_stride=32)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 5, 2, 2)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_layers_sort_from_the_stem_to_the_classifier():
    model = build()
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        number = {name: n for n, names in groups.items() for name in names}
        order = ["trunk.conv1.weight", "trunk.bn1.weight", "trunk.layer1.0.conv1.weight", "aspp.branches.0.weight"]
        places = [number[name] for name in order if name in number]
        assert places == sorted(places)
        assert number["trunk.layer4.0.conv1.weight"] < number["aspp.branches.3.bias"] < number["fc.weight"]
        assert number["trunk.bn1.weight"] <= number["trunk.layer1.0.conv1.weight"]


@pytest.mark.parametrize("last", [1, 3])
def test_features_of_the_trunk_alone(last):
    extractor = create_backbone("deeplab", **SMALL, features_only=True, out_indices=(last,))
    assert not any("aspp" in name or ".fc" in name for name, _ in extractor.named_parameters())
    found = extractor(torch.randn(1, 3, 64, 64))
    assert [f.shape[1] for f in found] == extractor.feature_info.channels()


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"aspp": "atrou"}, "Expected aspp 'atrous', 'atrous_shared', 'njet', but got 'atrou'"),
        ({"output_stride": 4}, "Expected output_stride 8, 16 or 32, but got 4"),
        ({"rates": [6, 0]}, r"width and rates of at least 1, but got 5 and \[6, 0\]"),
        ({"base_kwargs": {"in_chans": 1}}, "base_kwargs without in_chans: it is an option of deeplab itself"),
        ({"base": "resnet_101"}, "got 'resnet_101', which neither Baton nor timm knows"),
        ({"base": "test_vit"}, "backbone 'test_vit' takes, but it has no 'output_stride'"),
        ({"aspp": "njet", "sigmas": [0.0]}, "all above 0 pixels"),
        ({"sigmas": [1.0]}, "Expected sigmas with aspp='njet' alone, but aspp is 'atrous': its dilations are rates"),
    ],
)
def test_what_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said) as caught:
        build(**kwargs)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- a trunk from elsewhere

TASK = {"backbone": "deeplab", "backbone_kwargs": SMALL}


def test_a_trunk_comes_from_a_classification_run(tmp_path, capsys):
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    folder = hand_over(tmp_path / "pre", "test_resnet", cfg=own)
    task = Segmentation(trunk_from=folder, freeze_batchnorm=True, optimizer=Optimizer("momentum", 0.01), **TASK)
    source = read_source(folder)
    trunk = {name: value for name, value in source.tensors.items() if not name.startswith("fc.")}
    assert same(state(task.backbone.trunk), trunk)
    assert f"test_resnet, {len(trunk)} of {len(trunk)} tensors" in capsys.readouterr().out
    assert task.parent["sha256"] == source.sha256
    assert task.mean.flatten().tolist() == pytest.approx(own["mean"])
    assert task.std.flatten().tolist() == pytest.approx(own["std"])
    assert tuple(task.backbone.pretrained_cfg["mean"]) == own["mean"]
    fit(task, MaskArrays(4, val=2, batch_size=2, size=(33, 40)))
    after = state(task.backbone.trunk)
    moved = {name for name, value in trunk.items() if not torch.equal(after[name], value)}
    norms = {name for name, module in task.backbone.trunk.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert moved
    assert not {name.rpartition(".")[0] for name in moved} & norms
    checkpoint = {"hyper_parameters": {"trunk_from": folder}}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["hyper_parameters"]["trunk_from"] is None


def test_a_trunk_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"do not fit|fits"):
        Segmentation(trunk_from=hand_over(tmp_path / "pre"), **TASK)
    whole = hand_over(tmp_path / "deeplab", "deeplab", **SMALL)
    with pytest.raises(ValueError, match=r"deeplab comes from model.init_from as a whole: leave one of them out"):
        Segmentation(init_from=whole, trunk_from=hand_over(tmp_path / "again", "test_resnet"))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_with_ten_times_the_rate_for_the_pyramid(kind):
    torch.manual_seed(0)
    overrides = {"backbone.aspp.*": {"lr_factor": 10.0}, "backbone.fc.*": {"lr_factor": 10.0}}
    task = Segmentation(
        optimizer=Optimizer("momentum", 0.002, overrides=overrides),
        **{**TASK, "backbone_kwargs": {**SMALL, "aspp": kind}},
    )
    data = MaskArrays(8, val=4, batch_size=4, size=(32, 32))
    data.setup()
    for dataset in (data.train_set, data.val_set):  # one class a quadrant, which its red channel knows
        corners = dataset.masks.masked_fill(dataset.masks == IGNORE, 0)[:, ::16, ::16]
        dataset.masks = corners.repeat_interleave(16, 1).repeat_interleave(16, 2)
        dataset.images[:, 0] = dataset.masks * 100
    rows = fit(task, data, 15, log_every_n_steps=1)
    assert rows.column("train/loss")[-1] < 0.7 * rows.column("train/loss")[0]
    scales = task.backbone.aspp.sigma.tolist() if kind == "njet" else None
    assert scales is None or scales != [0.5, 1.0, 1.5, 2.0]


def test_hand_over_into_classification(tmp_path):
    folder = hand_over(tmp_path / "deeplab", "deeplab", **{**SMALL, "aspp": "njet"})
    task = Classification(init_from=folder, optimizer=Optimizer("momentum", 0.01))
    source = read_source(folder)
    assert same(state(task.backbone), {n: v for n, v in source.tensors.items() if not n.startswith("fc.")})
    fit(task, Arrays(4, size=(32, 32), batch_size=2))
