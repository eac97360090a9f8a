import numpy as np
import pytest
import torch

from baton.data.augment import crop_flip, random_crop_flip


def reference(image, row, column, flip, padding, mode):
    """One sample: pad, crop, mirror, with numpy alone."""
    padded = np.pad(
        image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect" if mode == "reflect" else "constant"
    )
    height, width = image.shape[1:]
    top, left = padding + row, padding + column
    crop = padded[:, top : top + height, left : left + width]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(
    ("height", "width", "channels", "padding"),
    [(32, 32, 3, 4), (7, 11, 1, 6), (5, 3, 3, 2), (9, 6, 2, 1), (8, 8, 3, 0)],
)
def test_every_offset_equals_padding_cropping_and_mirroring_one_image(mode, height, width, channels, padding):
    offsets = range(-padding, padding + 1)
    draws = [(row, column, flip) for row in offsets for column in offsets for flip in (False, True)]
    images = torch.randint(0, 256, (len(draws), channels, height, width), dtype=torch.uint8)
    rows, columns, flips = (torch.tensor(values) for values in zip(*draws, strict=True))
    result = crop_flip(images, rows, columns, flips, padding, mode=mode)
    expected = [reference(images[i].numpy(), *draw, padding, mode) for i, draw in enumerate(draws)]
    assert torch.equal(result, torch.from_numpy(np.stack(expected)))


def test_every_sample_has_its_own_draw_and_all_draws_are_equally_likely():
    # Each pixel carries its column, row and 1, so that a result tells its offset and whether it was mirrored.
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    image = torch.stack([row + 1, column + 1, torch.ones_like(row)]).to(torch.uint8)
    torch.manual_seed(0)
    result = random_crop_flip(image.expand(20_000, -1, -1, -1), 2, mode="zeros").int()
    flipped = result[:, 1, 8, 9] < result[:, 1, 8, 8]
    rows = result[:, 0, 8, 8] - 9
    columns = torch.where(flipped, result[:, 1, 8, 7], result[:, 1, 8, 8]) - 9
    table = torch.zeros(5, 5, 2)
    table.index_put_((rows + 2, columns + 2, flipped.long()), torch.ones(20_000), accumulate=True)
    assert table.min() > 320  # 400 expected, standard deviation 20
    assert table.max() < 480


def test_images_are_not_changed_and_results_follow_the_seed():
    images = torch.randint(0, 256, (9, 3, 6, 5), dtype=torch.uint8)
    before = images.clone()
    torch.manual_seed(3)
    first = random_crop_flip(images, 2)
    torch.manual_seed(3)
    assert torch.equal(first, random_crop_flip(images, 2))
    assert not torch.equal(first, random_crop_flip(images, 2))
    assert torch.equal(images, before)


def test_flips_alone_and_crops_alone():
    images = torch.randint(0, 256, (64, 3, 6, 5), dtype=torch.uint8)
    flipped = random_crop_flip(images, 0)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 0 < same.sum() < 64
    assert torch.equal(random_crop_flip(images, 0, flip=False), images)


def test_expanded_and_strided_images_are_accepted():
    grey = torch.randint(0, 256, (4, 1, 6, 5), dtype=torch.uint8)
    offsets, flips = torch.tensor([-2, 0, 1, 2]), torch.tensor([True, False, True, False])
    expected = crop_flip(grey.repeat(1, 3, 1, 1), offsets, offsets, flips, 2)
    assert torch.equal(crop_flip(grey.expand(-1, 3, -1, -1), offsets, offsets, flips, 2), expected)
    columns_first = grey.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(crop_flip(columns_first, offsets, offsets, flips, 2), expected[:, :1])


def test_reflection_needs_an_image_larger_than_the_padding():
    with pytest.raises(ValueError, match="crop_padding=5 must be smaller than the image, 5 x 9"):
        random_crop_flip(torch.zeros(2, 3, 5, 9, dtype=torch.uint8), 5)
    random_crop_flip(torch.zeros(2, 3, 5, 9, dtype=torch.uint8), 5, mode="zeros")
