import hashlib
import pickle
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torchvision import datasets

from baton.data.cifar import CIFAR10, CIFAR100


def write_batches(root, source, labels, monkeypatch):
    """Write small files in CIFAR's format and tell torchvision their md5; returns all pixels, file by file."""
    generator = np.random.default_rng(0)
    pixels = {}
    for table in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(source, table):
            pixels[name] = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels[name], labels: [1, 0, 2, 9, 8, 3]})
            path = root / source.base_folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            entries.append([name, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(source, table, entries)
    return pixels


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(
    ("data_class", "source", "labels"),
    [(CIFAR10, datasets.CIFAR10, "labels"), (CIFAR100, datasets.CIFAR100, "fine_labels")],
)
def test_batches_are_read_as_torchvision_reads_them(tmp_path, monkeypatch, data_class, source, labels):
    pixels = write_batches(tmp_path, source, labels, monkeypatch)
    data = data_class(str(tmp_path))
    data.prepare_data()
    data.setup()
    train = np.concatenate([pixels[name] for name, _ in source.train_list])
    # The file holds 1024 red, then 1024 green, then 1024 blue values, row by row.
    assert data.train_set.images[4, 2, 7, 30] == train[4, 2 * 1024 + 7 * 32 + 30]
    assert torch.equal(data.train_set.images.flatten(1), torch.from_numpy(train))
    assert torch.equal(data.test_set.images.flatten(1), torch.from_numpy(pixels[source.test_list[0][0]]))
    assert data.test_set.targets.tolist() == [1, 0, 2, 9, 8, 3]
    assert data.val_set is None


def test_names_of_classes_are_known_before_any_file():
    assert CIFAR10().num_classes == 10
    assert CIFAR10().classes[3] == "cat"
    names = CIFAR100().classes
    assert len(set(names)) == 100
    assert names == sorted(names)


def test_the_usual_augmentation_is_the_default():
    data = CIFAR10("somewhere", batch_size=7, flip=False)
    assert (str(data.root), data.batch_size, data.crop_padding, data.flip) == ("somewhere", 7, 4, False)


@pytest.mark.usefixtures("offline")
def test_without_files_or_network_one_sentence_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR10(str(tmp_path)).prepare_data()
    for part in ("CIFAR10 needs", "cifar-10-batches-py/data_batch_1", str(tmp_path), "cifar-10-python.tar.gz"):
        assert part in str(caught.value)
    assert "Name or service not known" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="data_batch_1, which is missing"):
        CIFAR10(str(tmp_path)).setup()


def test_a_damaged_file_is_never_unpickled(tmp_path, monkeypatch):
    write_batches(tmp_path, datasets.CIFAR10, "labels", monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="data_batch_3: the file is damaged"):
        CIFAR10(str(tmp_path)).setup()
