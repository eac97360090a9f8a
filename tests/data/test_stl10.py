import numpy as np
import pytest
import torch

from baton.data.stl10 import STL10


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 96, 96), dtype=np.uint8)  # channel, column, row
    for split, count in (("train", 4), ("test", 3), ("unlabeled", 5)):
        pixels[:count].tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    return tmp_path, pixels


def test_labelled_images_stand_upright(written):
    root, pixels = written
    data = STL10(str(root))
    data.prepare_data()
    data.setup()
    images, targets = data.train_set.__getitems__([2, 0])
    assert images[0, 1, 80, 7] == pixels[2, 1, 7, 80]
    assert torch.equal(images, torch.from_numpy(pixels[[2, 0]]).transpose(2, 3))
    assert targets.tolist() == [2, 0]
    assert data.num_classes == 10
    assert data.val_set is None
    assert len(data.test_set) == 3


def test_the_unlabelled_split_has_no_classes_and_validates_on_labelled_images(written):
    root, _ = written
    data = STL10(str(root), unlabeled=True)
    data.setup()
    assert data.train_set.targets.tolist() == [-1] * 5
    assert data.num_classes == 0
    assert data.val_set.targets.tolist() == [0, 1, 2, 3]
    split = STL10(str(root), unlabeled=True, val_size=2)
    split.setup()
    assert (len(split.train_set), split.val_set.targets.tolist()) == (3, [-1, -1])


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin"])
def test_a_file_cut_short_is_named(written, name):
    root, _ = written
    path = root / "stl10_binary" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train_X.bin: the file is damaged"):
        STL10(str(root)).setup()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"STL10 needs .*train_X.bin, which is missing"):
        STL10(str(tmp_path)).setup()
