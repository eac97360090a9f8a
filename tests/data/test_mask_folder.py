import numpy as np
import pytest
import torch
from PIL import Image

from baton.data.mask_files import MaskFileSet
from baton.data.mask_folder import MaskFolder
from baton.data.masks import IGNORE

NAMES = ["sky", "road", "car"]


def write_split(folder, names, seed):
    """Images and masks of three classes; ignored pixels are 3."""
    generator = np.random.default_rng(seed)
    for name in names:
        shape = tuple(generator.integers(12, 25, 2))
        image, mask = folder / "images" / f"{name}.jpg", folder / "masks" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(image)
        Image.fromarray(generator.integers(0, 4, shape, dtype=np.uint8)).save(mask)


@pytest.fixture
def root(tmp_path):
    write_split(tmp_path / "train", ["b", "a", "city/1", "city/ö", "x.y"], 0)
    write_split(tmp_path / "val", ["v", "w"], 1)
    (tmp_path / "classes.txt").write_text("sky")
    return tmp_path


def folder(root, **options):
    defaults = {"classes": NAMES, "ignore_value": 3, "image_size": 10, "num_workers": 0, "batch_size": 2}
    return MaskFolder(str(root), **{**defaults, **options})


def ready(root, **options):
    data = folder(root, **options)
    data.setup()
    return data


def test_images_are_paired_with_masks_of_their_name(root):
    data = ready(root, evaluation="crop", image_size=(9, 11))
    names = [f"{part}/{name}" for part, name in (("images", "{}.jpg"), ("masks", "{}.png"))]
    images, masks = ([str(root / "train" / n.format(s)) for s in ("a", "b", "x.y", "city/1", "city/ö")] for n in names)
    expected = MaskFileSet(images, masks, 3, (9, 11), ignore_value=3, crop="center")
    batch = data.train_set.evaluation().__getitems__(range(5))
    assert all(map(torch.equal, batch, expected.__getitems__(range(5))))
    assert batch[1].shape == (5, 9, 11)
    assert (data.classes, data.num_classes, data.test_set) == (NAMES, 3, None)


@pytest.mark.parametrize("cache", [False, True])
def test_training_is_cropped_at_random_and_evaluation_sees_whole_images(root, cache):
    data = ready(root, cache=cache)
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((2, 3, 10, 10), (2, 10, 10))
    first = data.train_set.__getitems__(range(5))
    data.train_set.set_epoch(1)
    assert not torch.equal(first[0], data.train_set.__getitems__(range(5))[0])
    ((images, masks),) = list(data.val_dataloader())
    shapes = [Image.open(root / "val" / "images" / f"{name}.jpg").size[::-1] for name in "vw"]
    assert masks.shape == (2, max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
    stored = np.array(Image.open(root / "val" / "masks" / "w.png"))
    inside = masks[1, : shapes[1][0], : shapes[1][1]].numpy()
    assert np.array_equal(inside, np.where(stored == 3, IGNORE, stored))
    assert (masks[1, shapes[1][0] :] == IGNORE).all()


def test_crops_follow_the_seed_not_the_loader(root):
    epochs = []
    for workers, seed in ((0, 0), (2, 0), (0, 1)):
        loader = ready(root, num_workers=workers, seed=seed).train_dataloader()
        loader.sampler.set_epoch(2)
        epochs.append(torch.cat([masks for _, masks in loader]))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_validation_from_training_is_not_augmented(root):
    data = ready(root, val_size=2, subset=2)
    plain = ready(root).train_set.evaluation().__getitems__(data.val_set.indices)
    assert all(map(torch.equal, next(iter(data.val_dataloader())), plain))
    assert len(data.train_set) == 2


def test_without_splits_the_folder_is_the_training_split(root):
    data = ready(root / "train", val_size=1)
    assert (len(data.train_set), len(data.val_set), data.test_set) == (4, 1, None)


def test_pixels_are_counted_in_whole_images(root):
    data = folder(root)
    masks = [np.array(Image.open(path)) for path in sorted((root / "train/masks").rglob("*.png"))]
    assert data.class_counts().tolist() == [sum(int((mask == k).sum()) for mask in masks) for k in range(3)]


def test_classes_by_number_and_what_varies_images(root):
    assert folder(root, classes=None, num_classes=4).classes == ["class 0", "class 1", "class 2", "class 3"]
    assert folder(root, num_classes=3).classes == NAMES
    assert folder(root, scale=(1, 2)).augmentation() == (
        "the random crops of data.image_size and data.scale=[1.0, 2.0] and data.flip=true"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": None}, "MaskFolder needs data.classes, the names of the values in the masks, or data.num_classes"),
        ({"num_classes": 4}, "data.num_classes=4, but data.classes has 3 names"),
        ({"classes": None, "num_classes": 256}, "1 to 255 classes, got 256"),
        ({"classes": None, "num_classes": 0}, "1 to 255 classes, got 0"),
        ({"ignore_value": 256}, "from 0 to 255, got 256"),
        ({"image_size": (0, 4)}, "image_size must be at least 1"),
        ({"scale": (0.0, 1.0)}, "scale must be a range of factors above 0"),
        ({"scale": (2.0, 1.0)}, "scale must be a range of factors above 0"),
        ({"evaluation": "squash"}, "evaluation must be one of whole, crop, got 'squash'"),
    ],
)
def test_wrong_options_are_explained(options, said):
    with pytest.raises(ValueError, match=said):
        folder("somewhere", **options)


def test_images_without_masks_are_counted_and_one_is_named(root):
    (root / "train/masks/city/1.png").unlink()
    (root / "train/masks/b.png").rename(root / "train/masks/c.png")
    with pytest.raises(
        ValueError, match=r"^2 of 5 images in .*train/images have no mask: .*b\.jpg, for one, needs .*b\."
    ):
        ready(root)


def test_missing_folders_are_named(root):
    with pytest.raises(FileNotFoundError, match=r"none does not exist"):
        ready(root / "none")
    (root / "val/masks").rename(root / "val/labels")
    with pytest.raises(ValueError, match=r"val must hold the folders images and masks, but .*val/masks is missing"):
        ready(root)
    (root / "val/labels").rename(root / "val/masks")
    for path in (root / "val/images").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"val/images holds no images"):
        ready(root)


def test_a_mask_with_an_unknown_value_is_named(root):
    data = ready(root, classes=NAMES[:2])
    with pytest.raises(ValueError, match=r"train/masks/.*\.png has the value 2, but the classes are 0 to 1 and 3 is"):
        data.class_counts()
