"""Two disjoint halves as one backbone: what each sees, what touches what, any base."""

import pytest
import timm
import torch
from skimage.color import rgb2lab

import baton  # noqa: F401
from baton.backbones import create_backbone

SMALL = {"base": "fc_resnet18", "base_kwargs": {"width": 0.25}, "out_chans": [9, 5], "num_classes": 4}


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("base", "values"), [("simplenet", 779_072), ("fc_alexnet", 144_642_440), ("fc_resnet18", 6_610_160)]
)
def test_published_parameter_counts(base, values):
    with torch.device("meta"):
        model = timm.create_model("split_brain", base=base, num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == values


def test_halves_see_scaled_lab_and_are_concatenated():
    model = create_backbone("split_brain", **SMALL).eval()
    lab = torch.from_numpy(rgb2lab(images().permute(0, 2, 3, 1).double().numpy())).permute(0, 3, 1, 2)
    unit = (lab - torch.tensor([0, -87, -108]).view(3, 1, 1)) / torch.tensor([100, 186, 203]).view(3, 1, 1)
    first, rest = model.see(images())
    torch.testing.assert_close(torch.cat([first, rest], 1).double(), unit, atol=1e-5, rtol=0)
    with torch.no_grad():
        both = torch.cat([model.first.forward_features(first), model.rest.forward_features(rest)], 1)
        assert torch.equal(model.forward_features(images()), both)
    assert model.half_features == (9, 5)
    assert [info["num_chs"] for info in model.feature_info] == [32, 32, 64, 128, 14]


def test_rgb_halves_see_red_and_the_other_two():
    model = create_backbone("split_brain", space="rgb", **SMALL)
    first, rest = model.see(images())
    assert torch.equal(first, images()[:, :1])
    assert torch.equal(rest, images()[:, 1:])


def test_no_gradient_of_one_half_touches_the_other():
    model = create_backbone("split_brain", **SMALL)
    for own, other, channels in ((model.first, model.rest, slice(0, 9)), (model.rest, model.first, slice(9, 14))):
        model.zero_grad()
        model.forward_features(images())[:, channels].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in own.parameters())
        assert not any(p.grad is not None and p.grad.any() for p in other.parameters())


def test_a_half_knows_nothing_of_the_channels_it_must_predict():
    model = create_backbone("split_brain", space="rgb", **SMALL).eval()
    changed = images().clone()
    changed[:, 1:] = changed[:, 1:].flip(2)
    with torch.no_grad():
        before, after = model.forward_features(images()), model.forward_features(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [("wide_resnet", {"depth": 10, "width": 1}), ("test_resnet", {}), ("test_efficientnet", {}), ("test_convnext", {})],
)
def test_any_backbone_with_maps_is_a_base(base, kwargs):
    model = create_backbone("split_brain", base=base, base_kwargs=kwargs, num_classes=3)
    scores = model(images(size=64))
    assert scores.shape == (2, 3)
    scores.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_autocast_converts_colours_in_full_precision():
    model = create_backbone("split_brain", **SMALL)
    expected = model.see(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, model.see(images()), expected))


def test_the_posters_fine_tuning_is_one_layer_on_both_logit_maps():
    model = create_backbone("split_brain", base="simplenet", num_classes=1000, global_pool="map12")
    assert model.fc.weight.shape == (1000, 28_800)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="it has no 'out_chans'"):
        create_backbone("split_brain", base="test_resnet", out_chans=[3, 4])
    with pytest.raises(ValueError, match="neither Baton nor timm knows"):
        create_backbone("split_brain", base="fc_resnet81")
