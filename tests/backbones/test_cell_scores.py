"""Scores of cells: the head of the network, cell by cell, for every way in which timm's networks give a map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.backbones import create_backbone
from baton.backbones.cell_scores import cell_scores, check_scores_cells

SMALL = {"depth": 10, "width": 1}


def build(name, **kwargs):
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in model.get_classifier().parameters():
        nn.init.normal_(parameter)
    check_scores_cells(model)
    return model.double().eval()


AVERAGED = [
    ("wide_resnet", SMALL, (13, 20)), ("unet", {"width": 2}, (9, 10)), ("simplenet", {}, (70, 64)),
    ("test_resnet", {}, (40, 75)), ("test_efficientnet", {}, (64, 33)), ("resnetv2_50", {}, (32, 40)),
    ("regnetx_002", {}, (40, 33)), ("test_nfnet", {}, (32, 64)), ("swin_s3_tiny_224", {}, (224, 224)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "size"), AVERAGED, ids=[name for name, *_ in AVERAGED])
def test_scores_average_to_what_the_network_says(name, kwargs, size):
    model = build(name, **kwargs)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        scores, expected = cell_scores(model, images), model(images)
    assert scores.shape[:2] == (2, 5)
    assert scores.shape[2] * scores.shape[3] > 1
    assert scores.std((2, 3)).min() > 0
    torch.testing.assert_close(scores.mean((2, 3)), expected)


@pytest.mark.parametrize("name", ["wide_resnet", "test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_scores_are_the_heads_of_single_cells(name):
    model = build(name, **(SMALL if name == "wide_resnet" else {}))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        scores, features = cell_scores(model, images), model.forward_features(images)
        assert scores.shape[2:] == features.shape[2:]
        for y in range(scores.shape[2]):
            for x in range(scores.shape[3]):
                cell = features[:, :, y : y + 1, x : x + 1]
                torch.testing.assert_close(scores[:, :, y, x], model.forward_head(cell))


@pytest.mark.parametrize("options", [{"global_pool": "token"}, {"global_pool": "avg", "fc_norm": True}])
def test_tokens_are_normalised_and_classified_one_by_one(options):
    model = build("test_vit", img_size=(32, 48), **options)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        scores = cell_scores(model, images)
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        norm = model.fc_norm
        assert isinstance(norm, nn.LayerNorm) == (options["global_pool"] == "avg")
        for number in range(6):
            token = norm(tokens[:, number])
            expected = F.linear(token, model.head.weight, model.head.bias)
            torch.testing.assert_close(scores[:, :, number // 3, number % 3], expected)


@pytest.mark.parametrize("name", ["wide_resnet", "test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_every_part_gets_a_gradient(name):
    model = build(name, **(SMALL if name == "wide_resnet" else {})).train()
    cell_scores(model, torch.randn(2, 3, 160, 160, dtype=torch.float64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ["wide_resnet", "test_resnet"])
def test_dropout_before_the_classifier_is_applied(name):
    model = build(name, drop_rate=0.5, **(SMALL if name == "wide_resnet" else {}))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        first, second = cell_scores(model, images), cell_scores(model, images)
        assert torch.equal(first, second)
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        assert not torch.allclose(cell_scores(model, images), cell_scores(model, images))


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("wide_resnet", {**SMALL, "global_pool": "map4"}, "sees 4 x 4 cells at once .global_pool='map4'.: leave"),
        ("wide_resnet", {**SMALL, "num_classes": 0}, "a linear classifier, but wide_resnet has Identity"),
        ("deit_tiny_distilled_patch16_224", {}, "a linear classifier, but deit_tiny_distilled_patch16_224 has tuple"),
        ("repvit_m0_9", {}, "but repvit_m0_9 has RepVitClassifier"),
    ],
)  # fmt: skip
def test_networks_that_cannot_score_cells(name, kwargs, said):
    with torch.device("meta"):
        model = create_backbone(name, **{"num_classes": 3, **kwargs})
    with pytest.raises(ValueError, match=said) as caught:
        check_scores_cells(model)
    assert "\n" not in str(caught.value)


def test_networks_without_a_map():
    class Flat(nn.Module):
        def get_classifier(self):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="Expected a backbone with a spatial map, but Flat gives none"):
        check_scores_cells(Flat())


def test_a_map_of_other_channels_than_the_classifiers():
    model = build("test_vit", img_size=32)
    model.head = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match="the map of test_vit has 64 and its classifier is Linear"):
        cell_scores(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_a_refusal_of_timms_is_a_sentence():
    model = build("hiera_tiny_224")
    with pytest.raises(ValueError, match=r"The backbone hiera_tiny_224 gives no last map \(normalization of features"):
        cell_scores(model, torch.randn(1, 3, 224, 224, dtype=torch.float64))
