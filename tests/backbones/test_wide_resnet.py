"""Wide ResNets: parameter counts of the papers, an independent reference forward, dropout, shortcuts, errors."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

from baton.backbones import create_backbone, list_backbones
from baton.backbones.wide_resnet import WideResNet
from baton.backbones.wide_resnet_blocks import WideBlock, blocks_per_group, parse_block


def count(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("wrn_16_1", 10, 175_066),
        ("wrn_16_1", 100, 180_916),
        ("wrn_16_2", 10, 691_674),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_1", 10, 563_930),
        ("wrn_40_1", 100, 569_780),
        ("wrn_40_2", 10, 2_243_546),
        ("wrn_40_2", 100, 2_255_156),
        ("wrn_16_4", 10, 2_748_890),
        ("wrn_16_8", 10, 10_961_370),
        ("wrn_40_4", 10, 8_949_210),
        ("wrn_40_4", 100, 8_972_340),
        ("wrn_28_10", 10, 36_479_194),
        ("wrn_28_10", 100, 36_536_884),
        ("wrn_52_1", 10, 758_362),
        ("wrn_22_8", 10, 17_158_106),
        ("wrn_28_12", 10, 52_517_850),
    ],
)
def test_published_parameter_counts(name, classes, parameters):
    assert count(name, num_classes=classes) == parameters


@pytest.mark.parametrize(
    ("depth", "block", "millions", "exact"),
    [
        (40, "B(1,3,1)", 1.4, 1_429_082),
        (40, (3, 1), 1.2, 1_211_354),
        (40, (1, 3), 1.3, 1_297_370),
        (40, "3,1,1", 1.3, 1_343_066),
        (28, (3, 3), 1.5, 1_467_610),
        (22, [3, 1, 3], 1.1, 1_145_498),
    ],
)
def test_table_5_2_block_types_of_width_2(depth, block, millions, exact):
    parameters = count("wide_resnet", depth=depth, width=2, block=block)
    assert round(parameters / 1e6, 1) == millions
    assert parameters == exact


@pytest.mark.parametrize(
    ("depth", "width", "millions"), [(40, 8, 35.7), (22, 10, 26.8), (16, 10, 17.1), (40, 2, 2.2), (28, 12, 52.5)]
)
def test_table_5_4_sizes_without_a_name(depth, width, millions):
    assert round(count("wide_resnet", depth=depth, width=width) / 1e6, 1) == millions


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["paper", "convolutions"])
def test_table_5_3_deepening_keeps_parameters_and_convolutions(factor, rule):
    with torch.device("meta"):
        model = WideResNet(40, 2, block=(3,) * factor, depth_rule=rule)
    assert sum(p.numel() for p in model.parameters()) == 2_243_546
    threes = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == 40 - 3  # the name counts the three projections, not the classifier


@pytest.mark.parametrize(
    ("depth", "block", "n"),
    [(40, (1, 3, 1), 4), (22, (3, 1, 3), 2), (40, (3, 1), 6), (28, (3, 3), 4), (13, (3, 1, 1), 1)],
)
def test_depth_rule_convolutions_counts_every_convolution(depth, block, n):
    assert blocks_per_group(depth, block, "convolutions") == n
    with torch.device("meta"):
        model = WideResNet(depth, 1, block, depth_rule="convolutions")
    in_blocks = sum(len(m.convs) for m in model.modules() if isinstance(m, WideBlock))
    assert in_blocks == depth - 4


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("wrn18_1", 11.7),
        ("wrn18_1_5", 25.9),
        ("wrn18_2", 45.6),
        ("wrn18_3", 101.8),
        ("wrn34_1", 21.8),
        ("wrn34_1_5", 48.6),
        ("wrn34_2", 86.0),
        ("wrn50_2", 68.9),
    ],
)
def test_tables_5_7_and_5_8_for_imagenet(name, millions):
    assert round(count(name) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("ours", "timms"), [("wrn18_1", "resnet18"), ("wrn34_1", "resnet34"), ("wrn50_2", "wide_resnet50_2")]
)
def test_imagenet_networks_take_timms_weights(ours, timms):
    with torch.device("meta"):
        own, other = (timm.create_model(name).state_dict() for name in (ours, timms))
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in other.items()}


def test_generic_entry_point_builds_the_named_networks():
    with torch.device("meta"):
        named, generic = timm.create_model("wrn_40_1"), timm.create_model("wide_resnet", depth=40, width=1)
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in generic.state_dict().items()}


# ---------------------------------------------------------------- what it computes


def reference(weights, x, blocks, counts):
    """WRN with B(3,3) from the authors' description, written over a dictionary of tensors and in its own order.

    `counts` collects how often each tensor is read.
    """

    def get(key):
        counts[key] = counts.get(key, 0) + 1
        return weights[key]

    def activate(t, prefix):
        mean = t.mean((0, 2, 3), keepdim=True)
        variance = ((t - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scale, shift = (get(f"{prefix}.{kind}").view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return torch.clamp((t - mean) / torch.sqrt(variance + 1e-5) * scale + shift, min=0)

    t = F.conv2d(x, get("stem.weight"), padding=1)
    for group in (1, 2, 3):
        for block in range(blocks):
            prefix = f"group{group}.{block}"
            stride = 2 if group > 1 and block == 0 else 1
            o = activate(t, f"{prefix}.norms.0")
            y = F.conv2d(o, get(f"{prefix}.convs.0.weight"), stride=stride, padding=1)
            y = F.conv2d(activate(y, f"{prefix}.norms.1"), get(f"{prefix}.convs.1.weight"), padding=1)
            widens = y.shape[1] != t.shape[1]
            t = y + (F.conv2d(o, get(f"{prefix}.projection.weight"), stride=stride) if widens else t)
    t = activate(t, "norm").mean((2, 3))
    return t @ get("fc.weight").T + get("fc.bias")


@pytest.mark.parametrize("size", [(32, 32), (33, 35), (13, 7)])
@pytest.mark.parametrize("name", ["wrn_16_2", "wrn_16_1"])
def test_equals_the_reference_with_gradients(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, dtype=torch.float64).train()
    for module in model.modules():  # shifts start at zero, where they could not be told apart
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            nn.init.normal_(module.bias)
    x = torch.randn(3, 3, *size, dtype=torch.float64, requires_grad=True)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    other_x = x.detach().clone().requires_grad_()
    counts = {}

    scores, expected = model(x), reference(weights, other_x, blocks=2, counts=counts)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)
    assert counts == dict.fromkeys(weights, 1), "the reference and the model have other tensors"

    direction = torch.randn_like(scores)
    scores.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-8, atol=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[key].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kernels", [(3, 3), (1, 3, 1), (3, 1), (1, 3), (3, 1, 1), (3, 1, 3), (3,), (3, 3, 3, 3)])
@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_blocks_of_every_type(kernels, in_channels, stride):
    torch.manual_seed(0)
    block = WideBlock(in_channels, 6, kernels, stride, dtype=torch.float64).eval()
    for norm in block.norms:
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, in_channels, 9, 7, dtype=torch.float64)
    before = x.clone()

    y, inputs = x, []
    for i, (norm, conv) in enumerate(zip(block.norms, block.convs, strict=True)):
        assert conv.kernel_size == (kernels[i], kernels[i])
        assert conv.bias is None
        view = (1, -1, 1, 1)
        y = (y - norm.running_mean.view(view)) / torch.sqrt(norm.running_var.view(view) + 1e-5)
        y = torch.relu(y * norm.weight.view(view) + norm.bias.view(view))
        inputs.append(y)
        y = F.conv2d(y, conv.weight, stride=stride if i == 0 else 1, padding=kernels[i] // 2)
    shortcut = x if in_channels == 6 else F.conv2d(inputs[0], block.projection.weight, stride=stride)
    assert (block.projection is None) == (in_channels == 6)

    torch.testing.assert_close(block(x), y + shortcut, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before), "the block changed its input, which is a feature of the group before"


def test_projection_shares_the_first_batchnorm_and_relu():
    block = WideBlock(4, 8).eval()
    seen = []
    for conv in (block.projection, block.convs[0]):
        conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block(torch.randn(2, 4, 5, 5))
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert seen[0].min() == 0


def test_only_the_groups_that_widen_project():
    thin, wide = (timm.create_model(name) for name in ("wrn_16_1", "wrn_16_2"))
    projecting = [[n for n, m in model.named_modules() if n.endswith("projection")] for model in (thin, wide)]
    assert projecting[0] == ["group2.0.projection", "group3.0.projection"]
    assert projecting[1] == ["group1.0.projection", "group2.0.projection", "group3.0.projection"]


def test_group_outputs_are_sums_before_batchnorm_and_relu():
    torch.manual_seed(0)
    model = timm.create_model("wrn_16_1").eval()
    taps = {}
    for name in ("group1", "group2", "group3"):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: taps.update({name: out}))
    x = torch.randn(2, 3, 17, 15)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=False)
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert [list(m.shape[1:]) for m in maps] == [[16, 17, 15], [32, 9, 8], [64, 5, 4]]
    for tap, found in zip(taps.values(), maps, strict=True):
        assert found.min() < 0
        assert torch.equal(tap, found)
    assert torch.equal(normed[0], final)
    assert torch.equal(torch.relu(model.norm(maps[-1])), final)


def test_stopping_early_skips_the_later_groups():
    model = timm.create_model("wrn_16_1").eval()
    ran = []
    for name in ("group1", "group2", "group3", "norm"):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: ran.append(name))
    final, maps = model.forward_intermediates(torch.randn(1, 3, 8, 8), indices=[1], stop_early=True)
    assert ran == ["group1", "group2"]
    assert final is maps[0]


def test_final_batchnorm_learns_with_the_last_block():
    model = timm.create_model("wrn_16_1")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["norm.weight"] == layers["group3.1.convs.1.weight"] == 6
    assert layers["stem.weight"] == 0
    assert layers["fc.weight"] == 7
    assert max(group_parameters(model, model.group_matcher(coarse=True))) == 4


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), 2])
def test_pruned_network_gives_the_same_intermediates(wanted):
    torch.manual_seed(0)
    model = timm.create_model("wrn_16_1").eval()
    x = torch.randn(2, 3, 16, 16)
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=wanted, intermediates_only=True)
        kept = model.prune_intermediate_layers(wanted, prune_norm=True)
        found = model.forward_intermediates(x, indices=kept, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert model(x).shape[1] == model.num_features == model.feature_info[max(kept)]["num_chs"]
    assert sum(p.numel() for p in model.parameters()) < before


# ---------------------------------------------------------------- dropout


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    plain, dropping = timm.create_model("wrn_16_1"), timm.create_model("wrn_16_1", drop_rate=0.3)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(dropping.eval()(x), plain.eval()(x))
        assert not torch.equal(dropping.train()(x), plain.train()(x))
        assert not torch.equal(dropping(x), dropping(x))


def test_every_block_of_the_network_drops():
    model = timm.create_model("wrn_16_1", drop_rate=0.3)
    assert [m.drop_rate for m in model.modules() if isinstance(m, WideBlock)] == [0.3] * 6


@pytest.mark.parametrize("kernels", [(3, 3), (3, 1, 3)])
def test_dropout_sits_between_activation_and_every_convolution_but_the_first(kernels):
    torch.manual_seed(0)
    block = WideBlock(16, 32, kernels, drop_rate=0.4).train()
    activated, convolved = [], []
    for norm, conv in zip(block.norms, block.convs, strict=True):
        norm.register_forward_hook(lambda m, i, out: activated.append(torch.relu(out)))
        conv.register_forward_pre_hook(lambda m, inputs: convolved.append(inputs[0]))
    block(torch.randn(8, 16, 12, 12))
    assert torch.equal(convolved[0], activated[0]), "the first convolution sees dropout"
    for before, after in zip(activated[1:], convolved[1:], strict=True):
        alive = before > 0
        dropped = alive & (after == 0)
        assert dropped.sum() / alive.sum() == pytest.approx(0.4, abs=0.03)
        torch.testing.assert_close(after[~dropped], before[~dropped] / 0.6)


# ---------------------------------------------------------------- initialisation, configuration


def test_initial_weights_follow_the_authors_code():
    torch.manual_seed(0)
    model = timm.create_model("wrn_16_4")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert module.momentum == 0.1
            assert 0 <= module.weight.min() < 0.25
            assert 0.75 < module.weight.max() <= 1
            assert not module.bias.any()
    model.reset_classifier(100)
    assert model.fc.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not model.fc.bias.any()
    assert model.no_weight_decay() == set()


def test_configuration_holds_cifar_statistics():
    config = timm.create_model("wrn_16_1").pretrained_cfg
    assert config["mean"] == pytest.approx((125.3 / 255, 123.0 / 255, 113.9 / 255))
    assert config["std"] == pytest.approx((63.0 / 255, 62.1 / 255, 66.7 / 255))
    assert config["input_size"] == (3, 32, 32)
    assert config["num_classes"] == 10
    assert timm.create_model("wrn18_1").pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))


def test_digits_of_one_channel():
    model = timm.create_model("wrn_16_1", in_chans=1)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert model.in_chans == 1


def test_timms_own_layout_on_disk_brings_the_block_back(tmp_path):
    torch.manual_seed(0)
    arguments = {"depth": 10, "width": 1, "block": (3, 1), "drop_rate": 0.1}
    model = timm.create_model("wide_resnet", num_classes=4, **arguments).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=arguments)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.group1[0].drop_rate == 0.1


def test_names_of_tensors_in_checkpoints_stay():
    keys = timm.create_model("wrn_16_1").state_dict().keys()
    assert {"stem.weight", "group2.0.convs.0.weight", "group2.0.projection.weight", "group3.1.norms.1.bias"} <= keys
    assert {k.split(".")[0] for k in keys} == {"stem", "group1", "group2", "group3", "norm", "fc"}


# ---------------------------------------------------------------- names and errors


def test_no_name_is_timms():
    assert hasattr(timm.models, "resnet18")  # where timm keeps its own entry points, whatever is registered later
    own = list_backbones(baton_only=True)
    assert {"wrn_16_2", "wide_resnet", "wrn50_2"} <= set(own)
    assert [name for name in own if hasattr(timm.models, name)] == []
    assert "resnet18" not in own


def test_list_backbones_filters():
    assert list_backbones("wrn_40_*") == ["wrn_40_1", "wrn_40_2", "wrn_40_4"]
    assert list_backbones(["wrn50*", "wide_resnet50*"]) == ["wide_resnet50_2", "wrn50_2"]
    assert set(list_backbones()) == set(timm.list_models())
    assert list_backbones("*resnet50*", baton_only=True) == []


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("3,1,3", (3, 1, 3)),
        ("B(3,1,3)", (3, 1, 3)),
        (" B( 1, 3 ) ", (1, 3)),
        ("(3,)", (3,)),
        ("3", (3,)),
        ([3, 3], (3, 3)),
    ],
)
def test_block_notations(text, sizes):
    assert parse_block(text) == sizes


@pytest.mark.parametrize("block", ["", "B()", "5,3", (3, 2), (), "B(3,3", "3;3", "C(3,3)", "3,-1", "33"])
def test_block_errors(block):
    with pytest.raises(ValueError, match="kernel sizes 1 and 3"):
        parse_block(block)


@pytest.mark.parametrize(
    ("depth", "block", "rule", "said"),
    [
        (27, (3, 3), "paper", r"6n \+ 4 .* got 27; the nearest valid depths are 22 and 28"),
        (23, (3, 1, 3), "paper", r"6n \+ 4 .* B\(3,1,3\) .* nearest valid depths are 22 and 28"),
        (23, (3, 1, 3), "convolutions", r"9n \+ 4 .* nearest valid depths are 22 and 31"),
        (4, (3, 3, 3, 3), "paper", r"12n \+ 4 .* nearest valid depth is 16"),
        (-5, (3,), "paper", r"3n \+ 4 .* nearest valid depth is 7"),
    ],
)
def test_impossible_depths_name_the_nearest(depth, block, rule, said):
    with pytest.raises(ValueError, match=said):
        WideResNet(depth, 1, block, depth_rule=rule)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"width": 0}, "width of 1 or more"),
        ({"drop_rate": 1.0}, r"drop_rate in \[0, 1\)"),
        ({"drop_rate": 0.3, "block": (3,)}, "two or more convolutions"),
        ({"global_pool": ""}, "num_classes=0"),
    ],
)
def test_arguments_that_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said):
        create_backbone("wide_resnet", **{"depth": 10, "width": 1, **kwargs})


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match=r"'wrn_16'.*wrn_16_1") as raised:
        create_backbone("wrn_16")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="resnet18"):
        create_backbone("resnet_18")
    with pytest.raises(ValueError, match="list_backbones"):
        create_backbone("qqqqqqqqqq")
    with pytest.raises(ValueError, match=r"source 'local-dir:somewhere'"):
        create_backbone("local-dir:somewhere")
    with pytest.raises(ValueError, match=r"resnet18\.a1_in1k.*but got 'resnet18\.nonsense'"):
        create_backbone("resnet18.nonsense")


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet10t"])
def test_a_pooling_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be built with .*'global_pool': 'nonsense'.*: Invalid pool"):
        create_backbone(name, num_classes=3, global_pool="nonsense")


@pytest.mark.parametrize(
    ("name", "argument", "advice"),
    [
        ("wrn_16_1", "colour", "it takes depth, width, block, "),
        ("wrn_16_1", "widht", r"the nearest is width\."),
        ("wrn18_1", "colour", "it takes "),
        ("test_resnet", "colour", r"it takes block, layers, .* and others\."),
        ("test_resnet", "droprate", r"the nearest is drop_rate\b"),
    ],
)
def test_unknown_arguments_are_named(name, argument, advice):
    with pytest.raises(ValueError, match=rf"'{name}' takes, but it has no '{argument}'; {advice}"):
        create_backbone(name, **{argument: 3})


@pytest.mark.parametrize(
    "message", ["build() got an unexpected keyword argument 'inner'", "'int' object is not iterable"]
)
def test_a_type_error_of_another_cause_is_not_disguised(monkeypatch, message):
    def fail(*args, **kwargs):
        raise TypeError(message)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(TypeError, match=re.escape(message)):
        create_backbone("test_resnet", num_classes=3)


def test_create_backbone_builds_ours_and_timms():
    assert create_backbone("wrn_16_1", num_classes=3).fc.out_features == 3
    assert create_backbone("test_resnet.r160_in1k", num_classes=3, in_chans=None).fc.out_features == 3
