"""U-Nets: by hand in numpy, with as many convolutions as the paper says, and receptive fields that are real."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.ops import DeformConv2d

from baton.backbones import create_backbone
from baton.layers import NJetConv2d

KINDS = ["conv", "njet", "atrous", "deformable"]


def build(seed=0, name="unet", **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_backbone(name, **kwargs)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") and "offset" not in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    return model


# ------------------------------------------------------------------------------------------------------------ by hand


def conv_relu(x, conv, kernel):
    """Zeros around; an even kernel has one row and column more of them at the end."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    before, after = (kernel - 1) // 2, kernel - 1 - (kernel - 1) // 2
    padded = np.pad(x, ((0, 0), (before, after), (before, after)))
    out = np.zeros((len(weight), *x.shape[1:]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.tensordot(weight, padded[:, i : i + kernel, j : j + kernel], 3) + bias
    return np.maximum(out, 0)


def pool(x):
    height, width = (side // 2 for side in x.shape[1:])
    return x[:, : 2 * height, : 2 * width].reshape(len(x), height, 2, width, 2).max((2, 4))


def enlarge(x, height, width):
    """Centres of pixels at halves; the nearest pixels outside are those of the border."""

    def positions(before, after):
        place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, None)
        low = np.minimum(place.astype(int), before - 1)
        return low, np.minimum(low + 1, before - 1), place - low

    y0, y1, dy = positions(x.shape[1], height)
    x0, x1, dx = positions(x.shape[2], width)
    rows = x[:, y0] * (1 - dy)[:, None] + x[:, y1] * dy[:, None]
    return rows[:, :, x0] * (1 - dx) + rows[:, :, x1] * dx


def naive(model, image, levels, convs, kernel):
    rows = {name: [m for m in getattr(model, name).modules() if isinstance(m, nn.Conv2d)] for name in model.stage_names}
    x, kept, maps = image, [], []
    for level in range(1, levels + 1):
        x = pool(x) if level > 1 else x
        for conv in rows[f"down{level}"]:
            x = conv_relu(x, conv, kernel)
        kept.append(x)
        maps.append(x)
    for level in range(levels - 1, 0, -1):
        x = np.concatenate([kept[level - 1], enlarge(x, *kept[level - 1].shape[1:])])
        for conv in rows[f"up{level}"]:
            x = conv_relu(x, conv, kernel)
        maps.append(x)
    assert all(len(row) == convs for row in rows.values())
    return maps


@pytest.mark.parametrize(
    ("levels", "convs", "kernel", "size"),
    [(3, 2, 3, (13, 10)), (3, 2, 4, (8, 12)), (4, 1, 3, (9, 23)), (2, 3, 5, (7, 6)), (1, 2, 3, (5, 4))],
)
def test_maps_by_hand(levels, convs, kernel, size):
    model = build(levels=levels, convs=convs, kernel_size=kernel, width=2, in_chans=2, num_classes=3).double()
    images = torch.randn(2, 2, *size, dtype=torch.float64)
    last, maps = model.forward_intermediates(images)
    assert last.shape == (2, 2, *size)
    for number, image in enumerate(images.numpy()):
        by_hand = naive(model, image, levels, convs, kernel)
        assert len(by_hand) == len(maps) == 2 * levels - 1
        for info, found, expected in zip(model.feature_info, maps, by_hand, strict=True):
            assert info["num_chs"] == len(expected)
            np.testing.assert_allclose(found[number].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("layer", KINDS)
def test_gradients(layer):
    model = build(levels=2, width=2, in_chans=1, num_classes=2, layer=layer).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DeformConv2d):  # offsets of zero are corners of bilinear interpolation
                nn.init.normal_(module.offset.weight, std=0.3)
    images = torch.rand(1, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run(images, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), images)

    fast = layer in ("njet", "deformable")  # random directions in place of every parameter by itself
    options = {"eps": 1e-7, "atol": 1e-5, "nondet_tol": 1e-9, "fast_mode": fast}
    assert torch.autograd.gradcheck(run, (images, *parameters), **options)


# ----------------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize(("levels", "count"), [(3, 10), (4, 14), (5, 18)])
def test_as_many_convolutions_as_in_the_paper(levels, count):
    with torch.device("meta"):
        model = create_backbone("unet", levels=levels)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == count
    assert {conv.kernel_size for conv in convolutions} == {(3, 3)}
    assert [info["num_chs"] for info in model.feature_info][:levels] == [64 << level for level in range(levels)]


@pytest.mark.parametrize(("name", "count"), [("unet", 1_883_072), ("njet_unet", 1_255_818)])
def test_parameters(name, count):
    model = create_backbone(name, num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert f"{count:,} parameters" in timm.models.model_entrypoint(name).__doc__


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("norm", [False, True])
def test_layers_are_of_their_kind(layer, norm):
    model = build(layer=layer, norm=norm, width=4, levels=2)
    types = {"conv": nn.Conv2d, "atrous": nn.Conv2d, "njet": NJetConv2d, "deformable": DeformConv2d}
    rows = [module for name in model.stage_names for module in getattr(model, name)]
    layers = [module for module in rows if isinstance(module, types[layer])]
    assert len(layers) == 6
    assert all((module.bias is None) == norm for module in layers)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in rows) == 6 * norm
    if layer == "atrous":
        assert {module.dilation for module in layers} == {(2, 2)}
    if layer == "deformable":
        assert not any(module.offset.weight.any() for module in layers)
    assert model(torch.rand(2, 3, 11, 6)).shape == (2, 11)


def test_layers_get_their_options():
    model = build(name="njet_unet", width=4, layer_kwargs={"order": 3, "sigma": 1.7, "size_rule": "code"})
    layers = [module for module in model.modules() if isinstance(module, NJetConv2d)]
    assert len(layers) == 10
    assert all(layer.order == 3 and layer.size_rule == "code" for layer in layers)
    assert all(layer.sigma.item() == pytest.approx(1.7) for layer in layers)
    assert {
        module.order for module in build(name="njet_unet", width=4).modules() if isinstance(module, NJetConv2d)
    } == {2}


def test_convolutions_begin_as_ronneberger_draws_them():
    model = create_backbone("unet", width=32, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            fan_in = module.in_channels * 9
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
            assert not module.bias.any()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    energies = [m.square().mean().item() for m in maps]
    assert max(energies) < 30 * min(energies), "maps vanish or explode"


# ----------------------------------------------------------------------------------------------------- receptive field


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"kernel_size": 4}, {"kernel_size": 5, "convs": 1}, {"layer": "atrous"},
        {"layer": "atrous", "layer_kwargs": {"dilation": 3}, "kernel_size": 2},
        {"layer": "njet"}, {"layer": "njet", "layer_kwargs": {"sigma": 1.6, "order": 1}, "convs": 1},
        {"layer": "deformable"},
    ],
    ids=str,
)  # fmt: skip
def test_receptive_field_is_what_a_cell_depends_on(options, levels):
    model = build(levels=levels, width=1, in_chans=1, num_classes=0, **options).double()
    for parameter_name, parameter in model.named_parameters():
        if "offset" not in parameter_name and "log2_sigma" not in parameter_name:
            nn.init.uniform_(parameter, 0.5, 1.5)
            if parameter_name.endswith("bias"):
                nn.init.constant_(parameter, 1e6)  # no ReLU is closed
    expected = model.receptive_field()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MaxPool2d):  # all four pixels count
            model.set_submodule(name, nn.AvgPool2d(2))
    side = 3 * expected // (1 << levels) * (1 << levels)
    images = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    last = model.forward_intermediates(images, indices=[levels - 1], stop_early=True, intermediates_only=True)[0]
    last[0, 0, last.shape[2] // 2, last.shape[3] // 2].backward()
    rows, columns = images.grad[0, 0].nonzero().T
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == expected


def test_receptive_fields_of_figure_11():
    found = {}
    with torch.device("meta"):
        for levels in (3, 4, 5):
            for kernel in (3, 4, 5):
                found[levels, kernel] = create_backbone("unet", levels=levels, kernel_size=kernel).receptive_field()
    # 1 + sum over levels of 2 (k - 1) 2^l, and 2^l for each pooling
    expected = {
        (levels, kernel): 1 + 2 * (kernel - 1) * (2**levels - 1) + 2 ** (levels - 1) - 1
        for levels in (3, 4, 5)
        for kernel in (3, 4, 5)
    }
    assert found == expected


def test_receptive_field_follows_the_scales():
    model = build(name="njet_unet", width=2)
    before = model.receptive_field()
    with torch.no_grad():
        model.down3[1].log2_sigma += 1
    assert model.receptive_field() == before + 4 * 4  # two pixels more on either side, of four pixels each


# ----------------------------------------------------------------------------------------------------------- the rest


def test_features_of_the_encoder_alone():
    extractor = create_backbone("unet", width=4, features_only=True, out_indices=(0, 2))
    assert extractor.feature_info.channels() == [4, 16]
    assert extractor.feature_info.reduction() == [1, 4]
    x = torch.rand(1, 3, 20, 12)
    maps = extractor(x)
    assert [tuple(m.shape) for m in maps] == [(1, 4, 20, 12), (1, 16, 5, 3)]
    assert not any(name.startswith(("model.up", "model.fc")) for name, _ in extractor.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"levels": 0}, "levels, convs and kernel_size of at least 1, but got 0, 2 and 3"),
        ({"convs": 0}, "at least 1, but got 3, 0 and 3"),
        ({"layer": "convv"}, "Expected a layer of kind 'conv', 'njet'"),
        ({"layer": "njet", "layer_kwargs": {"ordr": 2}}, "do not take these options: .*ordr"),
        ({"layer": "deformable", "kernel_size": 4}, "Expected an odd kernel_size"),
        ({"width": 0}, "Expected a width multiplier above 0"),
    ],
)
def test_what_cannot_be_built(kwargs, said):
    with pytest.raises(ValueError, match=said) as caught:
        create_backbone("unet", **kwargs)
    assert "\n" not in str(caught.value)


def test_images_that_are_too_small():
    model = build(width=2, levels=4)
    assert model.forward_features(torch.rand(1, 3, 8, 9)).shape == (1, 2, 8, 9)
    with pytest.raises(ValueError, match="at least 8 pixels a side for 4 levels, but got 7 x 9; use larger ones, or"):
        model(torch.rand(1, 3, 7, 9))
