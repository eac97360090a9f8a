import numpy as np
import pytest
import torch

from baton.data.shapes import SPLITS, ShapesDataset, labels_of, render_shapes
from baton.data.shapes_rendering import CLASS_NAMES, Draws, hashed_uniforms, signed_distance, splitmix64, texture_bank


@pytest.fixture(scope="module")
def batch():
    return render_shapes(range(200), size=33)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_splitmix64_is_the_published_generator():
    # The first outputs of the reference implementation started at 1234567 (Vigna's splitmix64.c).
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashed_uniforms_are_uniform_and_uncorrelated():
    table = hashed_uniforms(7, np.arange(4000), 6)
    assert table.min() >= 0
    assert table.max() < 1
    assert np.abs(table.mean(0) - 0.5).max() < 0.02
    assert np.abs(table.std(0) - 12**-0.5).max() < 0.01
    correlation = np.corrcoef(np.hstack([table[:-1], table[1:]]).T) - np.eye(12)
    assert np.abs(correlation).max() < 0.07


def test_draws_directions_follow_their_angles():
    draws = Draws(0, np.arange(500))
    cosine, sine = draws.direction(30.0, 60.0)
    assert torch.allclose(cosine**2 + sine**2, torch.ones_like(cosine), atol=1e-5)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    assert 29.9 <= float(angle.min()) < 31
    assert 59 < float(angle.max()) <= 60.1


def test_texture_lookup_equals_a_naive_bilinear_one():
    bank, side = texture_bank(33), texture_bank(33).side
    grid = torch.arange(side) / bank.texels_per_unit
    tile = bank.sample(torch.full((1, 1, 1), 5), grid[None, None, :] + 0 * grid[None, :, None], grid[None, :, None])[0]
    x, y = 3.3717, -2.6391  # in half images; negative coordinates wrap
    u, v = x * bank.texels_per_unit, y * bank.texels_per_unit
    left, top = int(np.floor(u)), int(np.floor(v))
    expected = 0.0
    for row, weight_y in ((top, top + 1 - v), (top + 1, v - top)):
        for column, weight_x in ((left, left + 1 - u), (left + 1, u - left)):
            expected += weight_x * weight_y * float(tile[row % side, column % side])
    got = bank.sample(torch.full((1, 1, 1), 5), torch.full((1, 1, 1), x), torch.full((1, 1, 1), y))
    assert float(got) == pytest.approx(expected, abs=1e-4)
    assert 0 <= float(tile.min()) < 0.3 < 0.7 < float(tile.max()) <= 1


@pytest.mark.parametrize("label", range(10), ids=CLASS_NAMES)
def test_outlines_are_closed_fit_the_unit_disc_and_have_unit_slope(label):
    axis = torch.linspace(-1.5, 1.5, 301)
    x, y = axis[None, None].expand(1, 301, 301), axis[None, :, None].expand(1, 301, 301)
    distance = signed_distance(torch.tensor([label]), x, y)[0]
    inside = distance < 0
    assert 0.5 < float(inside.float().mean()) * 9 < 2.6
    assert float((x[0] ** 2 + y[0] ** 2).sqrt()[inside].max()) < 1.12
    slope_y, slope_x = torch.gradient(distance, spacing=0.01)
    slope = (slope_x**2 + slope_y**2).sqrt()[distance.abs() < 0.02]
    assert float((slope - 1).abs().median()) < 0.02


def test_a_sample_does_not_depend_on_its_batch(batch):
    for size in (1, 3, 7, 64, 65):
        start = 0
        for start in range(0, 130 if size > 7 else 21, size):
            part = render_shapes(range(start, start + size), size=33)
            assert equal(part, [field[start : start + size] for field in batch]), (size, start)
    order = torch.tensor([199, 5, 5, 77, 0])
    assert equal(render_shapes(order, size=33), [field[order] for field in batch])


def test_threads_do_not_change_the_picture(batch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert equal(render_shapes(range(40), size=33), [field[:40] for field in batch])
    finally:
        torch.set_num_threads(threads)


def test_the_seed_changes_the_picture_and_repeats_it():
    first, second = render_shapes([3], seed=1), render_shapes([3], seed=2)
    assert not torch.equal(first.images, second.images)
    assert equal(first, render_shapes([3], seed=1))


@pytest.mark.parametrize("size", [16, 33, 48, 97])
def test_any_size(size):
    images, labels, boxes, masks = render_shapes(range(20), size=size)
    assert images.shape == (20, 3, size, size)
    assert images.dtype == torch.uint8
    assert masks.shape == (20, size, size)
    assert labels.dtype == torch.int64
    assert boxes.shape == (20, 4)
    assert bool(masks.any(dim=2).any(dim=1).all())
    assert float(images.float().std(dim=(2, 3)).min()) > 4  # no flat picture


def test_sizes_show_the_same_scene():
    small, large = render_shapes(range(30), size=32), render_shapes(range(30), size=96)
    assert torch.equal(small.labels, large.labels)
    shrunk = torch.nn.functional.avg_pool2d(large.masks[:, None].float(), 3)[:, 0]
    union = ((shrunk > 0.5) | small.masks).sum()
    assert float(((shrunk > 0.5) & small.masks).sum() / union) > 0.93
    assert float((large.boxes / 3 - small.boxes).abs().median()) < 0.7
    difference = torch.nn.functional.avg_pool2d(large.images.float(), 3) - small.images
    assert float(difference.abs().mean()) < 12


def test_no_indices_give_an_empty_batch():
    images, labels, boxes, masks = render_shapes([], size=20)
    assert (images.shape, labels.shape, boxes.shape, masks.shape) == ((0, 3, 20, 20), (0,), (0, 4), (0, 20, 20))


def test_boxes_are_tight_around_masks(batch):
    for box, mask in zip(batch.boxes[:60], batch.masks[:60], strict=True):
        pixels = [(row, column) for row in range(33) for column in range(33) if mask[row, column]]
        rows, columns = [p[0] for p in pixels], [p[1] for p in pixels]
        assert box.tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def test_the_object_differs_from_what_surrounds_it(batch):
    # A mask that were shifted or empty would not separate colours: compare it with its own mirror image.
    def contrast(masks):
        weights, images = masks[:, None].float(), batch.images.float()
        inside = (images * weights).sum((2, 3)) / weights.sum((2, 3))
        outside = (images * (1 - weights)).sum((2, 3)) / (1 - weights).sum((2, 3))
        return float((inside - outside).norm(dim=1).mean())

    assert contrast(batch.masks) > 1.3 * contrast(batch.masks.flip(1).flip(2))


def test_classes_are_balanced_in_every_run_of_ten():
    for seed in (0, 5):
        labels = labels_of(np.arange(1000), seed).reshape(100, 10)
        assert torch.equal(labels.sort(dim=1).values, torch.arange(10).expand(100, 10))
        assert len({tuple(row.tolist()) for row in labels}) > 90  # and in a different order each time


def test_colour_tells_a_little_about_the_class_but_not_much():
    # Nearest class mean of the colour under the true mask: the most that colour alone could give a simple classifier.
    train, test = (render_shapes(range(start, start + 1200), size=16) for start in (0, 10_000))

    def colours(samples):
        weights = samples.masks[:, None].float()
        return (samples.images * weights).sum((2, 3)) / weights.sum((2, 3))

    means = torch.stack([colours(train)[train.labels == label].mean(0) for label in range(10)])
    accuracy = float((torch.cdist(colours(test), means).argmin(1) == test.labels).float().mean())
    assert 0.17 < accuracy < 0.40


def test_a_patch_tells_where_it_comes_from():
    # What patch location learns from. A linear classifier on mean colour and contrast of the top and bottom quarter,
    # judged on other scenes; a coin would give 0.5.
    images = render_shapes(range(600), size=16).images.double() / 255

    def features(start):
        patch = images[:, :, start : start + 4].flatten(2)
        return torch.cat([patch.mean(2), patch.std(2), torch.ones(600, 1, dtype=torch.float64)], dim=1)

    top, bottom = features(0), features(12)
    fit = torch.cat([top[:300], bottom[:300]])
    side = torch.cat([torch.ones(300, 1), -torch.ones(300, 1)]).double()
    weights = torch.linalg.lstsq(fit, side).solution
    correct = torch.cat([top[300:] @ weights > 0, bottom[300:] @ weights < 0])
    assert float(correct.double().mean()) > 0.7


@pytest.mark.parametrize("size", [15, 0, -48, True])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(ValueError, match="at least 16 pixels"):
        render_shapes([0], size=size)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        ShapesDataset(size=size, length=10)


@pytest.mark.parametrize("indices", [[-1], np.array([0.5]), torch.tensor([3, -2])])
def test_wrong_indices_are_refused(indices):
    with pytest.raises(ValueError, match="0 or more"):
        render_shapes(indices)


def test_wrong_splits_and_lengths_are_refused():
    with pytest.raises(ValueError, match=r"train, val, test, unlabeled, got 'training'"):
        ShapesDataset(split="training")
    for length in (0, -3, 10**9 + 1, True):
        with pytest.raises(ValueError, match="length of 1 to"):
            ShapesDataset(length=length)


def test_splits_share_no_sample():
    seen = set()
    for split in SPLITS:
        images, _ = ShapesDataset(size=16, length=150, split=split).__getitems__(list(range(150)))
        seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 150 * len(SPLITS)


def test_a_longer_split_begins_with_the_shorter_one():
    short, long = ShapesDataset(size=16, length=20), ShapesDataset(size=16, length=50)
    assert equal(short.__getitems__(range(20)), long.__getitems__(range(20)))
    assert torch.equal(short.targets, long.targets[:20])


@pytest.mark.parametrize("cache", [True, False])
def test_fetching_a_batch_equals_fetching_one_by_one(cache):
    dataset = ShapesDataset(size=17, length=40, seed=3, split="val", cache=cache)
    order = [39, 0, 7, 7, 12]
    images, labels = dataset.__getitems__(order)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for place, index in enumerate(order):
        image, label = dataset[index]
        assert isinstance(label, int)
        assert torch.equal(image, images[place])
        assert label == int(labels[place]) == int(dataset.targets[index])
    drawn = render_shapes([10**9 + index for index in order], size=17, seed=3)
    assert torch.equal(images, drawn.images)
    assert torch.equal(labels, drawn.labels)
    assert torch.equal(dataset.boxes(order), drawn.boxes)
    assert torch.equal(dataset.masks(order), drawn.masks)


def test_changing_a_fetched_image_leaves_the_data_set_alone():
    dataset = ShapesDataset(size=16, length=10)
    image, _ = dataset[4]
    kept = image.clone()
    image.zero_()
    assert torch.equal(dataset[4][0], kept)


def test_a_data_set_has_a_length_an_end_and_classes():
    dataset = ShapesDataset(size=16, length=13)
    assert len(dataset) == 13 == len(dataset.targets) == len(dataset.boxes())
    assert dataset.classes == list(CLASS_NAMES)
    assert sum(1 for _ in dataset) == 13  # iteration stops at the IndexError
    for index in (13, -1):
        with pytest.raises(IndexError, match="from 0 to 12"):
            dataset[index]
    assert torch.bincount(ShapesDataset(length=100).targets).tolist() == [10] * 10
