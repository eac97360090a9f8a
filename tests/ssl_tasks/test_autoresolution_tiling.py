"""Super patches and the centres of their cells, by hand and against loops."""

import pytest
import torch

from baton.ssl_tasks.autoresolution_tiling import Tiling

PAPER = Tiling(super_patch=127, receptive_field=35, stride=2, factor=8)


def test_the_papers_grid():
    assert PAPER.cells == 47


def test_centres_by_hand():
    """A 12 x 8 image (width, height), super patch 5, patches of 3 pixels every 2: 2 x 2 cells."""
    tiling = Tiling(super_patch=5, receptive_field=3, stride=2, factor=1)
    centres = tiling.centres(torch.tensor([0, 3]), torch.tensor([0, 7]), height=8, width=12)
    # image 0: patches cover columns 0-2 and 2-4: centres 1.5 and 3.5 pixels from the left border of 12
    assert torch.allclose(centres[0, 0], torch.tensor([[-0.75, -5 / 12], [-0.75, -5 / 12]]))
    assert torch.allclose(centres[0, 1], torch.tensor([[-0.625, -0.625], [-0.125, -0.125]]))
    # image 1: columns 7-9 and 9-11: centres 8.5 and 10.5; rows 3-5 and 5-7: centres 4.5 and 6.5 of 8
    assert torch.allclose(centres[1, 0], torch.tensor([[5 / 12, 0.75], [5 / 12, 0.75]]))
    assert torch.allclose(centres[1, 1], torch.tensor([[0.125, 0.125], [0.625, 0.625]]))


def test_the_centre_of_the_whole_image_is_zero_and_borders_are_one():
    whole = Tiling(super_patch=9, receptive_field=9, stride=2, factor=3)
    assert torch.equal(whole.centres(torch.zeros(1).long(), torch.zeros(1).long(), 9, 9), torch.zeros(1, 2, 1, 1))
    pixel = Tiling(super_patch=9, receptive_field=1, stride=1, factor=1)
    x = pixel.centres(torch.zeros(1).long(), torch.zeros(1).long(), 9, 9)[0, 0, 0]
    assert torch.allclose(x, (2 * torch.arange(9) + 1) / 9 - 1)


def test_centres_find_their_pixel_exactly():
    """An image whose pixels hold their own coordinates: the middle pixel of every patch says its centre."""
    tiling = Tiling(super_patch=21, receptive_field=7, stride=2, factor=1)
    height, width = 33, 47
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1])
    images = image.expand(5, -1, -1, -1).double()
    tops, lefts = torch.tensor([0, 3, 12, 7, 1]), torch.tensor([26, 0, 13, 4, 9])
    crops = tiling.crop(images, tops, lefts)
    centres = tiling.centres(tops, lefts, height, width).double()
    assert tiling.cells == 8
    for i in range(8):
        for j in range(8):
            patch = crops[:, :, 2 * i : 2 * i + 7, 2 * j : 2 * j + 7]
            assert torch.allclose(patch[:, :, 3, 3], centres[:, :, i, j], atol=1e-6)
            assert torch.allclose(patch.mean((2, 3)), centres[:, :, i, j], atol=1e-6)


def test_crops_are_slices():
    tiling = Tiling(super_patch=5, receptive_field=3, stride=1, factor=1)
    images = torch.rand(4, 3, 9, 12)
    tops, lefts = torch.tensor([0, 4, 2, 1]), torch.tensor([7, 0, 3, 5])
    for b, crop in enumerate(tiling.crop(images, tops, lefts)):
        assert torch.equal(crop, images[b, :, tops[b] : tops[b] + 5, lefts[b] : lefts[b] + 5])


def test_drawn_places_are_uniform_and_reach_every_border():
    tiling = Tiling(super_patch=5, receptive_field=3, stride=1, factor=1)
    torch.manual_seed(0)
    tops, lefts = tiling.draw(torch.rand(4000, 1, 8, 7))
    assert torch.allclose(torch.bincount(tops, minlength=4) / 4000, torch.full((4,), 1 / 4), atol=0.03)
    assert torch.allclose(torch.bincount(lefts, minlength=3) / 4000, torch.full((3,), 1 / 3), atol=0.03)


def test_fixed_places_depend_on_the_image_alone():
    tiling = Tiling(super_patch=9, receptive_field=3, stride=1, factor=1)
    images = torch.randint(256, (2000, 3, 16, 12), generator=torch.Generator().manual_seed(0)) / 255
    tops, lefts = tiling.fixed(images)
    order = torch.randperm(2000)
    again = tiling.fixed(images[order])
    assert torch.equal(again[0], tops[order])
    assert torch.equal(again[1], lefts[order])
    assert torch.equal(torch.cat([tiling.fixed(images[:1])[0], tiling.fixed(images[1:])[0]]), tops)
    assert torch.allclose(torch.bincount(tops, minlength=8) / 2000, torch.full((8,), 1 / 8), atol=0.03)
    assert torch.allclose(torch.bincount(lefts, minlength=4) / 2000, torch.full((4,), 1 / 4), atol=0.04)
    joint = torch.bincount(tops * 4 + lefts, minlength=32) / 2000
    assert (joint > 0.01).all(), "rows and columns hang together"


def test_fixed_places_do_not_overflow():
    tiling = Tiling(super_patch=127, receptive_field=35, stride=2, factor=1)
    tops, lefts = tiling.fixed(torch.ones(2, 3, 600, 700))
    assert (tops >= 0).all()
    assert (tops <= 600 - 127).all()
    assert (lefts >= 0).all()
    assert (lefts <= 700 - 127).all()


@pytest.mark.parametrize(("sizes", "words"), [
    ((128, 35, 2, 8), r"leaves 1 of its pixels unseen: \(128 - 35\) / 2 \+ 1 = 47.5 cells; use 127 \(47"),
    ((33, 35, 2, 8), "smaller than the patch tower's receptive field of 35"),
    ((127, 35, 2, 0), "low_resolution_factor must be at least 1"),
])  # fmt: skip
def test_super_patches_that_do_not_fit_are_refused_with_the_arithmetic(sizes, words):
    with pytest.raises(ValueError, match=words):
        Tiling(*sizes)


@pytest.mark.parametrize(("height", "width", "words"), [
    (96, 256, "super_patch=127 does not fit into images of 96 x 256 pixels: make it at most 95"),
    (256, 33, "make it at most 33 with a tower of a receptive field below 35"),
    (260, 256, r"averaged in squares of 8: 260 / 8 = 32.5; .* images of 256 or 264 pixels"),
    (256, 132, r"132 / 8 = 16.5"),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused_with_the_arithmetic(height, width, words):
    with pytest.raises(ValueError, match=words):
        PAPER.check(height, width)
    PAPER.check(128, 256)
