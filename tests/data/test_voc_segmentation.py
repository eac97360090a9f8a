import hashlib
import shutil
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from baton.data.decoding import decode
from baton.data.voc_segmentation import VOCSegmentation, read_voc_mask

VOC = "VOCdevkit/VOC2012"
#: Which images are in which list; an SBD list may name images of VOC's validation split.
VOC_LISTS = {"train": ["2007_01", "2007_02"], "val": ["2007_03", "2007_04", "2007_05"]}
SBD_LISTS = {"train": ["2008_01", "2007_02", "2007_03"], "val": ["2008_02", "2007_04"]}
SHAPES = {"2007_01": (14, 19), "2007_02": (12, 15), "2007_03": (18, 11), "2008_01": (13, 13)}


def shape(name):
    return SHAPES.get(name, (16, 12))


@pytest.fixture
def root(tmp_path):
    """VOC and SBD in their layouts, as their archives unpack."""
    generator = np.random.default_rng(0)
    for path in (f"{VOC}/JPEGImages", f"{VOC}/SegmentationClass", f"{VOC}/ImageSets/Segmentation", "SBD/cls"):
        (tmp_path / path).mkdir(parents=True)
    palette = generator.integers(0, 256, 768).astype(np.uint8).tobytes()
    for name in sorted({name for names in (VOC_LISTS | SBD_LISTS).values() for name in names} | {"2007_01", "2007_05"}):
        pixels = generator.integers(0, 256, (*shape(name), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / VOC / "JPEGImages" / f"{name}.jpg")
    for split, names in VOC_LISTS.items():
        (tmp_path / VOC / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            values = generator.integers(0, 22, shape(name)).astype(np.uint8)
            mask = Image.new("P", shape(name)[::-1])
            mask.putdata(np.where(values == 21, 255, values).flatten().tolist())
            mask.putpalette(palette)
            mask.save(tmp_path / VOC / "SegmentationClass" / f"{name}.png")
    for split, names in SBD_LISTS.items():
        (tmp_path / "SBD" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            values = generator.integers(0, 21, shape(name)).astype(np.uint8)
            boundaries = np.zeros((20, 1), object)
            content = {"Boundaries": boundaries, "Segmentation": values, "CategoriesPresent": np.array([1])}
            savemat(tmp_path / "SBD" / "cls" / f"{name}.mat", {"GTcls": content})
    return tmp_path


def ready(root, **options):
    data = VOCSegmentation(str(root), **{"num_workers": 0, "image_size": 20, **options})
    data.prepare_data()  # finds its files
    data.setup()
    return data


def stems(dataset):
    return [bytes(path).decode().rpartition("/")[2] for path in dataset.masks]


def test_training_adds_sbd_without_the_images_that_voc_validates_on(root):
    data = ready(root)
    assert stems(data.train_set) == ["2007_01.png", "2007_02.png", "2008_01.mat", "2008_02.mat"]
    assert stems(data.val_set) == ["2007_03.png", "2007_04.png", "2007_05.png"]
    assert data.test_set is data.val_set
    assert stems(ready(root, sbd=False).train_set) == ["2007_01.png", "2007_02.png"]
    assert (data.num_classes, data.classes[0], data.classes[15], data.classes[20]) == (
        21, "background", "person", "tvmonitor",
    )  # fmt: skip


def test_images_and_masks_are_those_of_torchvision(root):
    data = ready(root)
    voc = datasets.VOCSegmentation(root, "2012", "val")
    (root / "SBD/img").symlink_to(root / VOC / "JPEGImages")
    sbd = datasets.SBDataset(root / "SBD", "train", "segmentation")
    for index, name in enumerate(VOC_LISTS["val"]):
        image, mask = data.val_set[index]
        assert torch.equal(image, decode(root / VOC / "JPEGImages" / f"{name}.jpg"))
        assert np.array_equal(mask.numpy(), np.array(voc[index][1]))
    assert np.array_equal(data.train_set.evaluation()[2][1].numpy(), np.array(sbd[0][1]))
    images, masks = data.train_set.__getitems__(range(4))
    assert (images.shape, masks.shape) == ((4, 3, 20, 20), (4, 20, 20))


def test_the_defaults_are_deeplab_s():
    data = VOCSegmentation()
    assert (data.size, data.scale, data.flip, data.evaluation) == ((321, 321), (0.5, 1.5), True, "whole")


def test_archives_put_there_by_hand_are_unpacked(root, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("archives")
    (folder / "SBD").mkdir()
    (root / "SBD/img").mkdir()
    (root / "SBD/inst").mkdir()
    table = {**DATASET_YEAR_DICT["2012"]}
    with tarfile.open(folder / table["filename"], "w") as archive:
        archive.add(root / "VOCdevkit", "VOCdevkit")
    with tarfile.open(folder / "SBD/benchmark.tgz", "w:gz") as archive:
        archive.add(root / "SBD", "benchmark_RELEASE/dataset")
    table["md5"] = hashlib.md5((folder / table["filename"]).read_bytes()).hexdigest()
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", table)
    digest = hashlib.md5((folder / "SBD/benchmark.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.SBDataset, "md5", digest)
    data, expected = ready(folder), ready(root)
    assert all(map(torch.equal, data.train_set.__getitems__(range(4)), expected.train_set.__getitems__(range(4))))


def test_without_files_or_network_one_sentence_says_what_to_put_where(root, tmp_path_factory, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(
        FileNotFoundError, match=r"^VOCSegmentation needs VOCdevkit/VOC2012/.*put VOCtrainval_11-May-2012"
    ):
        VOCSegmentation(str(empty)).prepare_data()
    shutil.rmtree(root / "SBD")
    with pytest.raises(
        FileNotFoundError, match=r"^VOCSegmentation needs train.txt, val.txt in .*/SBD, and .* benchmark.t"
    ):
        VOCSegmentation(str(root)).prepare_data()
    VOCSegmentation(str(root), sbd=False).prepare_data()


@pytest.mark.parametrize(
    "file",
    [f"{VOC}/ImageSets/Segmentation/val.txt", f"{VOC}/JPEGImages/2008_02.jpg", "SBD/cls/2008_01.mat", "SBD/val.txt"],
)
def test_a_missing_file_is_named(root, file):
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}, which is missing"):
        VOCSegmentation(str(root)).setup()


def test_a_broken_mask_is_named(root):
    (root / "SBD/cls/2008_01.mat").write_bytes(b"no MATLAB file at all" * 20)
    with pytest.raises(ValueError, match=r"^Cannot read the mask .*SBD/cls/2008_01\.mat: "):
        ready(root).train_set.__getitems__([2])
    savemat(root / "SBD/cls/2008_01.mat", {"other": np.zeros(3)})
    with pytest.raises(ValueError, match=r"^Cannot read the mask .*2008_01\.mat: 'GTcls'\.$"):
        read_voc_mask(root / "SBD/cls/2008_01.mat")
