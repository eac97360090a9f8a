"""The quantizer equals a loop over pixels with numpy's own binning; edges, grey images, decoding, soft targets."""

import itertools

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from baton.ssl_tasks import ColorQuantizer
from baton.ssl_tasks.color_quantizer import gamut_bins

SPACES = ["rgb", "lab", "lab_rescaled", "lab_gamut"]


def images(count=3, height=29, width=35, dtype=torch.float64, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(channels, space, bins):
    """Classes of one small image (3, s, s), pixel by pixel."""
    first, rest = np.zeros(channels.shape[1:], int), np.zeros(channels.shape[1:], int)
    if space == "rgb":
        edges = [np.linspace(0, 1.01, n + 1) for n in (bins[0], bins[1], bins[1])]
    else:
        edges = [
            np.linspace(0, 101, bins[0] + 1),
            np.linspace(-87, 99, bins[1] + 1),
            np.linspace(-108, 95, bins[1] + 1),
        ]
    if space == "lab_rescaled":
        edges[1:] = [np.linspace(channels[i].min(), channels[i].max() + 1, bins[1] + 1) for i in (1, 2)]
    for y, x in np.ndindex(*channels.shape[1:]):
        pixel = channels[:, y, x]
        places = [int(np.digitize(value, edge)) - 1 for value, edge in zip(pixel, edges, strict=True)]
        first[y, x], rest[y, x] = places[0], places[1] * bins[1] + places[2]
        if space == "lab_gamut":
            rest[y, x] = min(range(len(gamut_bins())), key=lambda k: ((gamut_bins()[k].numpy() - pixel[1:]) ** 2).sum())
    return first, rest


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("size", "bins"), [(12, (100, 10)), (16, (200, 16)), (25, (100, 25)), (5, (7, 3))])
def test_classes_equal_a_loop_over_pixels(space, size, bins):
    rgb = images() ** torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    quantizer = ColorQuantizer(space, bins, size)
    first, rest = quantizer(rgb)
    small = quantizer.channels(rgb)
    assert small.shape == (3, 3, size, size)
    for index in range(len(rgb)):
        expected = naive(small[index].numpy(), space, bins)
        assert np.array_equal(first[index].numpy(), expected[0])
        assert np.array_equal(rest[index].numpy(), expected[1])
    assert first.max() < quantizer.num_classes[0]
    assert rest.max() < quantizer.num_classes[1]


def test_the_small_image_is_the_mean_over_a_triangle_of_lab():
    rgb = images(1, 24, 24)
    lab = rgb2lab(rgb[0].permute(1, 2, 0).numpy())
    factor, size = 4, 6
    weights = np.zeros((size, 24))
    for row, pixel in itertools.product(range(size), range(24)):  # bilinear, stretched by the factor
        weights[row, pixel] = max(0.0, 1 - abs((pixel + 0.5) / factor - (row + 0.5)))
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("iy,jx,yxc->cij", weights, weights, lab)
    found = ColorQuantizer("lab", size=size).channels(rgb)[0].numpy()
    assert np.abs(found - expected).max() < 2e-3


def test_values_on_an_edge_belong_to_the_upper_bin_and_the_largest_to_the_last():
    quantizer = ColorQuantizer("lab", (101, 10), 2)
    edge = -87 + 186 / 10
    rows = [[0.0, 1.0, 99.0, 100.0], [-87.0, edge, 99.0, 120.0], [-108.0, -200.0, 95.0, 0.0]]
    first, rest = quantizer.quantize(torch.tensor(rows, dtype=torch.float64).view(1, 3, 2, 2))
    assert first.flatten().tolist() == [0, 1, 99, 100]
    assert rest.flatten().tolist() == [0, 10, 99, 95]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_grey_images_have_one_class(space, value):
    quantizer = ColorQuantizer(space)
    first, rest = quantizer(torch.full((2, 3, 96, 96), value))
    assert len(first.unique()) == len(rest.unique()) == 1
    if space == "lab_rescaled":
        assert rest.unique().item() == 0


def test_rescaled_bins_belong_to_each_image_alone():
    rgb = images(4)
    quantizer = ColorQuantizer("lab_rescaled")
    together = quantizer(rgb)
    for index in range(4):
        alone = quantizer(rgb[index : index + 1])
        assert all(torch.equal(a[0], t[index]) for a, t in zip(alone, together, strict=True))
    faint = 0.5 + 0.3 * (rgb - 0.5)  # the same contrasts, paler
    pale, full = (ColorQuantizer("lab")(faint)[1], ColorQuantizer("lab")(rgb)[1])
    assert len(quantizer(faint)[1].unique()) > len(pale.unique())
    assert len(full.unique()) > len(pale.unique())


@pytest.mark.parametrize("space", SPACES)
def test_decoded_colours_are_at_most_half_a_bin_away(space):
    quantizer = ColorQuantizer(space, (100, 10), 12)
    small = quantizer.channels(images())
    first, rest = quantizer.quantize(small)
    decoded = quantizer.decode(first, rest, small)
    low, high = quantizer.bounds(small)
    half = ((high - low) / torch.tensor([100, 10, 10]) / 2).view(-1, 3, 1, 1)
    if space == "lab_gamut":
        half[:, 1:] = 5.0
    assert ((decoded - small).abs() <= half + 1e-9).all()
    one_hot = torch.nn.functional.one_hot
    both = zip((first, rest), quantizer.num_classes, strict=True)
    hot = [one_hot(classes, count).movedim(-1, 1).double() for classes, count in both]
    torch.testing.assert_close(quantizer.decode(*hot, small), decoded)
    again = quantizer.quantize(decoded)
    if space != "lab_rescaled":  # whose range is that of the image itself
        assert torch.equal(again[0], first)
        assert torch.equal(again[1], rest)
    picture = quantizer.to_rgb(decoded)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_soft_targets_equal_a_loop():
    quantizer = ColorQuantizer("lab_gamut", size=3)
    small = quantizer.channels(images(2))
    weights, classes = quantizer.soft(small, neighbours=4, sigma=5.0)
    for b, y, x in np.ndindex(2, 3, 3):
        squares = ((gamut_bins().double() - small[b, 1:, y, x]) ** 2).sum(1)
        nearest = squares.argsort()[:4]
        expected = torch.exp(-squares[nearest] / 50)
        assert set(classes[b, :, y, x].tolist()) == set(nearest.tolist())
        torch.testing.assert_close(weights[b, :, y, x], expected / expected.sum())


def test_the_gamut_holds_every_colour_and_nothing_else():
    levels = np.linspace(0, 1, 33)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(1, -1, 3)
    occupied = {tuple(bin_) for bin_ in np.round(rgb2lab(cube)[0, :, 1:] / 10).astype(int).tolist()}
    bins = {tuple(bin_) for bin_ in (gamut_bins() / 10).int().tolist()}
    assert len(gamut_bins()) == len(bins) == 261
    assert occupied <= bins
    assert len(bins - occupied) <= 3  # corners that only the finer cube reaches


def test_casts_and_autocast_change_no_class():
    rgb = images(dtype=torch.float32)
    for space in SPACES:
        quantizer = ColorQuantizer(space)
        expected = quantizer(rgb)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, quantizer(rgb), expected))
        assert all(map(torch.equal, quantizer.bfloat16()(rgb), expected))


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="at least 1, got"):
        ColorQuantizer("lab", (0, 10))
    quantizer = ColorQuantizer("lab")
    small = quantizer.channels(images(1))
    with pytest.raises(ValueError, match="Only lab_gamut has soft targets, this is lab"):
        quantizer.soft(small)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("space", SPACES)
def test_a_gpu_gives_the_same_classes(space):
    rgb = images(dtype=torch.float64)
    quantizer = ColorQuantizer(space)
    expected = quantizer(rgb)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(quantizer.cuda()(rgb.cuda()), expected, strict=True))
