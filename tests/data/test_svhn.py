import hashlib

import numpy as np
import pytest
import torch
from torchvision import datasets

from baton.data.svhn import SVHN

scipy_io = pytest.importorskip("scipy.io")


@pytest.fixture
def written(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    pixels, table = {}, {}
    for split, count in (("train", 6), ("test", 3), ("extra", 4)):
        pixels[split] = generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        url, name, _ = datasets.SVHN.split_list[split]
        labels = np.arange(10, 10 - count, -1)[:, None]
        scipy_io.savemat(tmp_path / name, {"X": pixels[split], "y": labels})
        table[split] = [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", table)
    return tmp_path, pixels


def test_images_and_digits(written):
    root, pixels = written
    data = SVHN(str(root))
    data.prepare_data()
    data.setup()
    assert data.train_set.images.shape == (6, 3, 32, 32)
    assert data.train_set.images[4, 2, 7, 30] == pixels["train"][7, 30, 2, 4]
    assert data.train_set.targets.tolist() == [0, 9, 8, 7, 6, 5]  # the file says 10 for the digit 0
    assert len(data.test_set) == 3


def test_the_extra_images_come_behind_the_training_images(written):
    root, pixels = written
    data = SVHN(str(root), extra=True)
    data.prepare_data()
    data.setup()
    assert len(data.train_set) == 10
    assert torch.equal(data.train_set.images[6:], torch.from_numpy(pixels["extra"]).permute(3, 2, 0, 1))
    assert data.train_set.targets[6:].tolist() == [0, 9, 8, 7]


def test_a_damaged_file_is_named(written):
    root, _ = written
    (root / "test_32x32.mat").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"test_32x32.mat: the file is damaged"):
        SVHN(str(root)).setup()
