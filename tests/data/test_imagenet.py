import numpy as np
import pytest
import torch
from PIL import Image

from baton.data.decoding import centre_crop, decode
from baton.data.imagenet import ImageNet


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (60, 44, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.JPEG")
    return tmp_path


def test_validation_is_tested_on_and_resized_by_the_usual_ratio(root):
    data = ImageNet(str(root), image_size=28, num_workers=0)
    data.setup()
    assert (data.num_classes, len(data.train_set), len(data.val_set)) == (2, 6, 4)
    expected = [centre_crop(decode(root / "val" / f"{n}.JPEG"), 28, 32) for n in ("n01/0", "n01/1", "n02/0", "n02/1")]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images, targets = next(iter(loader))
        assert torch.equal(images, torch.stack(expected))
        assert targets.tolist() == [0, 0, 1, 1]


def test_validation_can_come_from_training(root):
    data = ImageNet(str(root), image_size=28, num_workers=0, val_size=2)
    data.setup()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (4, 2, 4)


def test_the_usual_sizes():
    data = ImageNet()
    assert (data.image_size, data.resize, data.scale, data.flip) == (224, 256, (0.08, 1.0), True)


def test_missing_folders_are_explained(root):
    with pytest.raises(FileNotFoundError, match=r"ImageNet needs .*/none/train/<class>/\*.JPEG and "):
        ImageNet(str(root / "none")).prepare_data()
