"""Whole images get the average of what the classifier says of every window of the last map."""

import pytest
import timm
import torch
from timm.models.vgg import VGG
from torch import nn

import baton  # noqa: F401
from baton.backbones.score_map import AveragedScoreMap

WRN = {"depth": 10, "width": 1}
#: Name, arguments, side of a crop, cells a side that the first layer behind the last map looks at.
AVERAGE = [
    ("vgg16_small", {"width": 0.1}, 32, 1),
    ("vgg16_small", {"width": 0.1}, 75, 1),
    ("wide_resnet", WRN, 32, 1),
    ("split_brain", {"base": "wide_resnet", "base_kwargs": WRN, "global_pool": "avg"}, 20, 1),
    ("test_resnet", {}, 64, 1),
    ("test_efficientnet", {}, 64, 1),
]
WINDOWS = [
    ("alexnet_bn", {"width": 0.1, "global_pool": "map6"}, 227, 6),
    ("alexnet_bn", {"width": 0.1, "global_pool": "map2"}, 227, 6),
    ("vgg16_small", {"width": 0.1, "global_pool": "map2"}, 133, 4),
    ("wide_resnet", {**WRN, "global_pool": "map8"}, 32, 8),
    ("wide_resnet", {**WRN, "global_pool": "map2"}, 23, 6),
    ("wide_resnet", {**WRN, "global_pool": "map1"}, 32, 8),
    ("split_brain", {"base": "wide_resnet", "base_kwargs": WRN, "global_pool": "map4"}, 32, 8),
]
VGGS = [("tiny vgg", {}, 224, 7), ("tiny vgg", {}, 263, 7)]


def build(name, num_classes=7, **kwargs):
    """In float64, in evaluation mode, with classifiers and norms that are not at their start."""
    torch.manual_seed(0)
    if name == "tiny vgg":
        row = [width for _ in range(5) for width in (6, "M")]
        network = VGG(row, num_classes, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d, drop_rate=0.5)
    else:
        network = timm.create_model(name, num_classes=num_classes, **kwargs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    classifier = network.get_classifier()
    nn.init.normal_(classifier.weight)
    nn.init.normal_(classifier.bias)
    return network.double().eval()


def images(height, width, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive(network, x, window):
    """The head sees every window of the map alone, and its answers are averaged."""
    features = network.forward_features(x)
    answers = [
        network.forward_head(features[:, :, y : y + window, x : x + window])
        for y in range(features.shape[2] - window + 1)
        for x in range(features.shape[3] - window + 1)
    ]
    return torch.stack(answers).mean(0), len(answers)


def assert_close(actual, expected):
    assert expected.std() > 1e-3, "the scores say nothing"
    assert not torch.allclose(expected[0], expected[1], rtol=1e-3), "the scores do not depend on the image"
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kwargs", "side", "window"), AVERAGE + WINDOWS + VGGS)
def test_an_image_of_a_crops_size_gets_the_scores_of_the_network(name, kwargs, side, window):
    network = build(name, **kwargs)
    with torch.no_grad():
        x = images(side, side)
        assert_close(AveragedScoreMap(network, side)(x), network(x))


@pytest.mark.parametrize(("more_height", "more_width"), [(0, 41), (70, 3), (37, 90)])
@pytest.mark.parametrize(("name", "kwargs", "side", "window"), AVERAGE + WINDOWS + VGGS)
def test_other_images_get_the_average_over_all_windows(name, kwargs, side, window, more_height, more_width):
    network = build(name, **kwargs)
    with torch.no_grad():
        x = images(side + more_height, side + more_width)
        expected, places = naive(network, x, window)
        assert places > 1
        scores = AveragedScoreMap(network, side)(x)
        assert_close(scores, expected)
        assert_close(torch.cat([AveragedScoreMap(network, side)(image[None]) for image in x]), scores)
        if (name, kwargs, side, window) in WINDOWS and kwargs["global_pool"] != "map1":  # the network squeezes instead
            assert (network(x) - scores).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn"])
def test_timms_own_vgg(name):
    network = build(name, mlp_ratio=0.01)
    with torch.no_grad():
        scores = AveragedScoreMap(network, 224)
        torch.testing.assert_close(scores(images(224, 224, 1)), network(images(224, 224, 1)), rtol=1e-10, atol=1e-10)
        x = images(256, 300, 1)
        expected, places = naive(network, x, 7)
        assert places == 2 * 3
        torch.testing.assert_close(scores(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_flow_to_the_image():
    network = build("wide_resnet", **WRN, global_pool="map2")
    scores = AveragedScoreMap(network, 8)
    assert torch.autograd.gradcheck(lambda x: scores(x)[:, :2], images(8, 11, 1).requires_grad_(), eps=1e-5)


def test_the_network_is_left_as_it_is():
    network = build("wide_resnet", **WRN, drop_rate=0.5).float().train()
    network.fc.eval()  # a part has its own mode
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    AveragedScoreMap(network, 32)
    assert modes == [module.training for module in network.modules()]
    assert set(modes) == {True, False}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_was_compiled_for_one_size_is_not_run():
    network = build("wide_resnet", **WRN)

    def compiled(x):
        raise AssertionError("it would be compiled once more")

    network.forward_features = compiled
    assert AveragedScoreMap(network, 32)(images(33, 40)).shape == (2, 7)


@pytest.mark.parametrize(("height", "width"), [(31, 40), (40, 31), (9, 9)])
@pytest.mark.parametrize("name", ["vgg16_small", "wide_resnet"])
def test_images_smaller_than_a_crop_are_refused(name, height, width):
    scores = AveragedScoreMap(build(name, **({"width": 0.1} if name == "vgg16_small" else WRN)), 32)
    said = f"^Expected images of at least 32 x 32 pixels, the crops' size, but got {height} x {width}: resize them to "
    with pytest.raises(ValueError, match=said):
        scores(images(height, width))


@pytest.mark.parametrize(
    ("name", "kwargs", "side", "said"),
    [
        ("test_vit", {}, 160, "but test_vit has one fixed size: choose another, or measure crops alone"),
        ("split_brain", {"base": "test_vit", "base_kwargs": {"img_size": 32}}, 32,
         r"but split_brain has refused 32 x 33 pixels \(.*33.*\): choose"),
        ("test_convnext", {}, 64, "whose linear classifier sees their last map or its average, but .* another head"),
        ("mobilenetv3_small_050", {}, 64, "another head"),
        ("resnet18", {"global_pool": "max"}, 32, "another head"),
        ("resnet18", {"global_pool": "catavgmax"}, 64, "another head"),
        ("vgg16_small", {"width": 0.1, "global_pool": "avgmax"}, 32, "another head"),
        ("wide_resnet", {**WRN, "num_classes": 0}, 32, "a linear classifier, but wide_resnet has Identity"),
        ("wide_resnet", {**WRN, "global_pool": "map3"}, 32, "multiple of 3 cells .* crops of 32 pixels give 8: use an"),
        ("alexnet_bn", {"width": 0.1, "global_pool": "map6"}, 100, "multiple of 6 cells .* of 100 pixels give 2"),
        ("vgg16_small", {"width": 0.1}, 20, r"refused 20 x 21 pixels \(Expected images of at least 32 pixels a side"),
        ("tiny vgg", {}, 223, "at least 7 cells a side, the kernel of VGG's .* crops of 223 pixels give 6: use larger"),
    ],
)  # fmt: skip
def test_networks_that_cannot_are_refused(name, kwargs, side, said):
    network = build(name) if name == "tiny vgg" else timm.create_model(name, **kwargs)
    with pytest.raises(ValueError, match=said) as caught:
        AveragedScoreMap(network, side)
    assert "\n" not in str(caught.value)
    assert network.training is (name != "tiny vgg")
