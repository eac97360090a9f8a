import struct

import numpy as np
import pytest
import torch

from baton.data.mnist import MNIST, FashionMNIST


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def written(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 28, 28), dtype=np.uint8)
    for name in ("MNIST", "FashionMNIST"):
        for part, count in (("train", 8), ("t10k", 3)):
            write_idx(tmp_path / name / "raw" / f"{part}-images-idx3-ubyte", pixels[:count])
            write_idx(tmp_path / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    return tmp_path, torch.from_numpy(pixels)


@pytest.mark.parametrize("data_class", [MNIST, FashionMNIST])
def test_files_are_read_as_grey_images(written, data_class):
    root, pixels = written
    data = data_class(str(root))
    data.prepare_data()
    data.setup()
    assert torch.equal(data.train_set.images, pixels[:8, None])
    assert torch.equal(data.test_set.images, pixels[:3, None])
    assert data.train_set.targets.tolist() == list(range(8))
    assert data.num_classes == 10
    assert next(iter(data.test_dataloader()))[0].shape == (3, 3, 28, 28)


def test_padding_makes_32_pixels(written):
    root, pixels = written
    data = MNIST(str(root), pad=2)
    data.setup()
    assert torch.equal(data.train_set.images[:, 0, 2:-2, 2:-2], pixels[:8])
    assert data.train_set.images.shape[2:] == (32, 32)
    assert data.train_set.images.long().sum() == pixels[:8].long().sum()
    with pytest.raises(ValueError, match="pad must be at least 0"):
        MNIST(pad=-1)


def test_a_file_cut_short_is_named(written):
    root, _ = written
    path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: the file is damaged"):
        MNIST(str(root)).setup()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte: the file is damaged"):
        MNIST(str(root)).setup()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"FashionMNIST needs .*train-images-idx3-ubyte, which is missing"):
        FashionMNIST(str(tmp_path)).setup()


def test_images_are_resized_after_padding(written):
    root, pixels = written
    data = MNIST(str(root), pad=2, size=48)
    data.setup()
    padded = torch.nn.functional.pad(pixels[:8], [2] * 4)[:, None].float()
    expected = torch.nn.functional.interpolate(padded, (48, 48), mode="bilinear")  # enlarging has no aliases
    assert data.train_set.images.shape == (8, 1, 48, 48)
    assert (data.train_set.images.float() - expected).abs().max() <= 0.51
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        MNIST(size=0)


def test_images_made_smaller_are_averages(written):
    root, pixels = written
    data = FashionMNIST(str(root), size=1)
    data.setup()
    mean = pixels[:8].float().mean((1, 2))
    assert (data.train_set.images[:, 0, 0, 0].float() - mean).abs().max() < 20  # weights fall towards the border
