import struct

import numpy as np
import pytest
import torch

from baton.data.masks import IGNORE
from baton.data.multi_scale_fashion_mnist import ComposedSet, MultiScaleFashionMNIST


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture(scope="module")
def objects():
    """Thirty grey noisy discs, each with a black rim, and their classes."""
    generator = np.random.default_rng(0)
    axis = np.arange(28) - 13.5
    disc = axis[:, None] ** 2 + axis**2 < 130
    images = (generator.integers(0, 256, (30, 1, 28, 28)) * disc).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(generator.integers(0, 10, 30))


@pytest.fixture(scope="module")
def root(objects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part, chosen in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        images, labels = (values[chosen].numpy() for values in objects)
        write_idx(folder / "FashionMNIST" / "raw" / f"{part}-images-idx3-ubyte", images[:, 0])
        write_idx(folder / "FashionMNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8))
    return str(folder)


def composed(objects, scales, quadrant, length=50, **options):
    return ComposedSet(*objects, length, scales=scales, quadrant=quadrant, **options)


def enlarged(image, scale):
    """Bilinear interpolation in float64, pixel by pixel; pixels are squares and the border is repeated."""
    side = 28 * scale
    result = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            y, x = (np.clip((place + 0.5) / scale - 0.5, 0, 27) for place in (row, column))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 27), min(left + 1, 27)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@pytest.mark.parametrize(("scales", "quadrant"), [((1,), 28), ((2,), 61), ((1, 2, 3), 91)])
def test_images_are_enlarged_objects_in_their_quadrants(objects, scales, quadrant):
    dataset = composed(objects, scales, quadrant)
    indices = torch.tensor([7, 0, 31])
    images, masks = dataset.__getitems__(indices.tolist())
    assert images.shape == (3, 3, 2 * quadrant, 2 * quadrant)
    numbers, factors, rows, columns = dataset.layout(indices)
    for sample in range(3):
        expected = np.zeros((2 * quadrant, 2 * quadrant))
        labels = np.zeros((2 * quadrant, 2 * quadrant), int)
        for place in range(4):
            number, scale = int(numbers[sample, place]), int(factors[sample, place])
            top, left = place // 2 * quadrant, place % 2 * quadrant
            labels[top : top + quadrant, left : left + quadrant] = objects[1][number] + 1
            row, column = int(rows[sample, place]), int(columns[sample, place])
            assert 0 <= row <= quadrant - 28 * scale
            assert 0 <= column <= quadrant - 28 * scale
            window = slice(top + row, top + row + 28 * scale), slice(left + column, left + column + 28 * scale)
            expected[window] = enlarged(objects[0][number, 0].double().numpy(), scale)
        assert np.abs(images[sample, 0].numpy() - expected).max() <= 0.5001  # rounded to whole grey values
        grey = images[sample, 1].numpy() / 255  # of what a network sees
        mask = np.where(grey >= 0.2, labels, np.where(grey == 0, 0, IGNORE))
        assert np.array_equal(masks[sample].numpy(), mask)
        assert torch.equal(images[sample, 0], images[sample, 2])


def test_the_threshold_is_exact(objects):
    grey = torch.arange(28 * 28).view(1, 1, 28, 28).clamp(max=255).to(torch.uint8)
    for threshold, first in ((0.2, 51), (0.5, 128), (1.0, 255), (0.001, 1), (0.4, 102)):
        dataset = ComposedSet(grey, torch.tensor([6]), 1, scales=(1,), quadrant=28, threshold=threshold)
        mask = dataset.__getitems__([0])[1][0, :28, :28].flatten()[:256].tolist()
        assert mask == [0] + [IGNORE] * (first - 1) + [7] * (256 - first), threshold


def test_a_sample_depends_on_seed_split_and_index_alone(objects):
    first = composed(objects, (1, 2), 56)
    images, masks = first.__getitems__(range(20))
    longer = composed(objects, (1, 2), 56, length=500, cache=True)
    for _ in range(2):  # from the cache, too
        for start in (17, 3, 0):
            part = longer.__getitems__([start, start + 2])
            assert torch.equal(part[0], images[[start, start + 2]])
            assert torch.equal(part[1], masks[[start, start + 2]])
    for options in ({"seed": 1}, {"split": 1}, {"seed": -1}):
        other = composed(objects, (1, 2), 56, **options).__getitems__(range(20))[0]
        assert (other != images).flatten(1).any(1).all()
    assert first.targets.tolist() == [-1] * 50


def test_every_object_comes_once_before_any_comes_again(objects):
    numbers = composed(objects, (1,), 28, length=100).layout(torch.arange(45))[0].flatten()
    rounds = numbers.view(6, 30)
    assert torch.equal(rounds.sort(1).values, torch.arange(30).expand(6, -1))
    assert len({tuple(order) for order in rounds.tolist()}) == 6


def test_scales_and_places_are_uniform_and_independent(objects):
    dataset = composed(objects, (1, 2, 3, 4), 120, length=4000)
    _, scales, rows, columns = dataset.layout(torch.arange(4000))
    for place in range(4):
        counts = scales[:, place].bincount(minlength=5)[1:]
        assert (counts - 1000).abs().max() < 110  # four standard deviations
    for scale in (1, 2, 3, 4):
        room = 120 - 28 * scale
        for offsets in (rows[scales == scale], columns[scales == scale]):
            assert (offsets.min(), offsets.max()) == (0, room)
            assert abs(offsets.double().mean() / room - 0.5) < 0.02
    relative = torch.cat([scales, rows / (120 - 28 * scales), columns / (120 - 28 * scales)], 1)
    assert (torch.corrcoef(relative.T) - torch.eye(12)).abs().max() < 0.08


@pytest.mark.parametrize(("scale", "side"), [(1, 64), (2, 128), (4, 256), ("mixed", 256)])
def test_splits_and_sizes(root, objects, scale, side):
    data = MultiScaleFashionMNIST(root, scale=scale, length=6, val_length=5, test_length=3, batch_size=2)
    data.prepare_data()  # finds its files
    data.setup()
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((2, 3, side, side), (2, side, side))
    assert [len(dataset) for dataset in (data.train_set, data.val_set, data.test_set)] == [6, 5, 3]
    assert torch.equal(data.train_set.objects, objects[0][:20])
    assert torch.equal(data.val_set.objects, objects[0][20:])
    assert torch.equal(data.test_set.__getitems__([2])[0], data.val_set.__getitems__([2])[0])
    labels = [sorted(set(mask.flatten().tolist()) - {0, IGNORE}) for mask in data.train_set.__getitems__(range(6))[1]]
    numbers = data.train_set.layout(torch.arange(6))[0]
    assert labels == [sorted(set((objects[1][row] + 1).tolist())) for row in numbers]
    assert data.num_classes == 11
    assert data.classes[:3] == ["background", "T-shirt/top", "Trouser"]


def test_the_paper_s_lengths_show_every_object_once(root):
    data = MultiScaleFashionMNIST(root)
    assert [4 * length for length in data.lengths.values()] == [60_000, 10_000, 10_000]
    data = MultiScaleFashionMNIST(root, val_length=0, cache=True, scale=1, length=3)
    data.setup()
    assert data.val_dataloader() == []
    assert data.class_counts().sum() < 3 * 64 * 64
    assert data.train_set._drawn.all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": "big"}, "at least 1, or 'mixed', got 'big'"),
        ({"scale": 0}, "got 0"),
        ({"scale": 4, "quadrant": 111}, r"quadrant=111 is too small: the largest object has 112 x 112 pixels"),
        ({"threshold": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"length": 0}, "length must be a number of images from 1"),
        ({"val_length": -1}, "val_length must be"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(ValueError, match=said):
        MultiScaleFashionMNIST(**options)


def test_missing_files_are_those_of_fashion_mnist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^FashionMNIST needs .*train-images-idx3-ubyte, which is missing"):
        MultiScaleFashionMNIST(str(tmp_path)).setup()
