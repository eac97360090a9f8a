"""Maps of named modules are the ones that timm gives, for every kind of network, and mistakes are named."""

import copy

import pytest
import torch
from torch import nn

from baton.backbones import create_backbone
from baton.distill.taps import Taps, group_paths, pair_paths

NETWORKS = {
    "wide_resnet": {"depth": 10, "width": 1},
    "nin": {"width": 0.1},
    "vgg16_small": {"width": 0.1},
    "allcnn": {"width": 0.1},
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_mambaout": {},  # channels last
}


def network(name):
    torch.manual_seed(0)
    return create_backbone(name, num_classes=4, **NETWORKS[name]).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_what_timm_calls_the_intermediates(name):
    model, images = network(name), torch.randn(2, 3, 64, 48)
    paths = group_paths(model)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        plain = model(images)
        output, maps = Taps(model, paths)(images)
    assert torch.equal(output, plain)
    stem = len(expected) - len(maps)
    assert stem == (name in ("test_resnet", "test_nfnet"))  # a single layer
    for ours, theirs in zip(maps, expected[stem:], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert Taps(model, paths).shapes(images) == [tuple(each.shape) for each in maps]


def test_groups_of_wide_resnets_are_the_sums_before_batch_norm():
    model, images = network("wide_resnet"), torch.randn(2, 3, 16, 16)
    _, (_, _, last) = Taps(model, group_paths(model))(images)
    torch.testing.assert_close(model.forward_features(images), torch.relu(model.norm(last)))
    assert (last < 0).any()


def test_any_module_can_be_named_in_any_order_and_twice():
    model, images = network("wide_resnet"), torch.randn(2, 3, 16, 16)
    paths = ["group2.0", "stem", "group2.0", "group1.0.convs.1"]
    _, maps = Taps(model, paths)(images)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 8, 8), (2, 16, 16, 16), (2, 32, 8, 8), (2, 16, 16, 16)]
    torch.testing.assert_close(maps[1], model.stem(images))
    assert maps[0] is maps[2]
    assert maps[0].requires_grad


def test_looking_at_shapes_leaves_the_network_as_it_was():
    model = network("wide_resnet").train()
    model.group1.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    taps = Taps(model, group_paths(model))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert taps.shapes(torch.randn(1, 3, 16, 16)) == [(1, 16, 16, 16), (1, 32, 8, 8), (1, 64, 4, 4)]
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_runs_by_itself():
    model, images = network("wide_resnet"), torch.randn(2, 3, 16, 16)
    taps = Taps(model, ["group3"])
    copied = copy.deepcopy(taps)
    with torch.no_grad():
        for parameter in copied.network.parameters():
            parameter.zero_()
    assert copied.network is not model
    assert taps(images)[1][0].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("wide_resnet", "gruop1", r"The student \(WideResNet\) has no module 'gruop1'; the nearest are .*group1"),
        ("wide_resnet", "", "has no module ''"),
        ("wide_resnet", "fc", r"'fc' returns a Tensor of shape \(2, 4\), no map \(B, C, H, W\): name another one"),
        ("test_resnet", "layer1.0.bn1", "returns a map that the module after it overwrites"),
        ("wide_resnet", "idle", "takes no part in its forward pass"),
    ],
)
def test_modules_without_a_map_are_refused(name, path, message):
    model = network(name)
    model.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=message):
        Taps(model, [path]).shapes(torch.randn(2, 3, 32, 32))


def test_a_transformer_has_no_maps_to_compare():
    model = create_backbone("test_vit", num_classes=4, img_size=32)
    with pytest.raises(ValueError, match=r"'blocks\.0' returns a Tensor of shape \(1, 5, 64\), no map"):
        Taps(model, group_paths(model)).shapes(torch.randn(1, 3, 32, 32))


def test_pairs():
    thin, resnet = network("wide_resnet"), network("test_resnet")
    assert pair_paths(thin, network("nin"), None) == (["group1", "group2", "group3"],) * 2
    assert pair_paths(thin, resnet, [["group1", "layer2"], ["stem", "act1"]]) == (
        ["group1", "stem"],
        ["layer2", "act1"],
    )
    message = r"student has 3 groups of layers \(group1, group2, group3\), the teacher has 4 \(layer1, .*model\.pairs"
    with pytest.raises(ValueError, match=message):
        pair_paths(thin, resnet, None)
    with pytest.raises(ValueError, match=r"must be pairs of a path .* but got \[\['group1'\]\]"):
        pair_paths(thin, resnet, [["group1"]])
    with pytest.raises(ValueError, match=r"must be pairs .* but got \[\]"):
        pair_paths(thin, resnet, [])
