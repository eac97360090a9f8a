import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from baton.data.decoding import centre_crop, decode, resize_shorter, squash
from baton.data.image_folder import EncodedSet, ImageFolder


@pytest.fixture
def root(tmp_path):
    """Two classes of six images of odd sizes."""
    generator = np.random.default_rng(0)
    for name in ("a cat", "dög"):
        (tmp_path / name).mkdir()
        for number in range(6):
            shape = (*generator.integers(9, 40, 2), 3)
            image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            image.save(tmp_path / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return tmp_path


def ready(root, **options):
    data = ImageFolder(str(root), **{"image_size": 12, "num_workers": 0, "batch_size": 5, **options})
    data.setup()
    return data


def images_of(loader):
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_batches_are_decoded_and_cropped_files(root, crop, cache):
    data = ready(root, crop=crop, cache=cache, resize=14)
    assert (data.classes, data.num_classes, len(data.train_set)) == (["a cat", "dög"], 2, 12)
    images, targets = data.train_set.__getitems__([11, 0, 3])
    decoded = [decode(root / name) for name in ("dög/5.png", "a cat/0.jpg", "a cat/3.png")]
    cropped = [centre_crop(image, 12, 14) if crop == "center" else squash(image, 12) for image in decoded]
    assert torch.equal(images, torch.stack(cropped))
    assert targets.tolist() == [1, 0, 0]
    assert torch.equal(data.train_set[3][0], cropped[2])


def test_classes_are_known_before_setup(root):
    assert ImageFolder(str(root)).num_classes == 2


def test_random_crops_follow_seed_epoch_and_sample_alone(root):
    sets = [ready(root, seed=seed).train_set for seed in (0, 0, 1)]
    images = [dataset.__getitems__(range(12))[0] for dataset in sets]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert torch.equal(sets[0].__getitems__([7, 2])[0], images[0][[7, 2]])
    sets[0].set_epoch(1)
    changed = (sets[0].__getitems__(range(12))[0] != images[0]).flatten(1).any(1)
    assert changed.all()
    state = torch.get_rng_state()
    sets[0].__getitems__([0])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_workers_that_live_on_learn_the_epoch(root):
    loaders = [ready(root, num_workers=workers).train_dataloader() for workers in (0, 2)]
    epochs = []
    for loader in loaders:
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(images_of(loader))
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])


def test_validation_from_training_is_not_augmented(root):
    data = ready(root, val_size=4, labels_per_class=2)
    plain = ready(root, crop="center").train_set
    assert torch.equal(images_of(data.val_dataloader()), plain.__getitems__(data.val_set.indices)[0])
    train, val = data.labelled_loaders()
    assert torch.equal(images_of(train), plain.__getitems__(data.train_set.indices)[0])
    assert len(images_of(val)) == 4
    before = images_of(data.train_dataloader())
    data.train_set.set_epoch(9)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    assert torch.equal(before, images_of(loader))


def test_own_splits(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    for split in ("train", "val", "test"):
        (folder / split).symlink_to(root)
    data = ready(folder)
    plain = ready(root, crop="center").train_set.__getitems__(range(12))[0]
    assert torch.equal(images_of(data.val_dataloader()), plain)
    assert torch.equal(images_of(data.test_dataloader()), plain)


@pytest.fixture
def splits(root, tmp_path_factory):
    """A folder whose training and test splits are the images of `root`."""
    folder = tmp_path_factory.mktemp("splits")
    for split in ("train", "test"):
        (folder / split).symlink_to(root)
    return folder


@pytest.mark.parametrize("crop", ["random_resized", "squash"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_whole_images_keep_their_shape(splits, crop, workers):
    data = ready(splits, crop=crop, num_workers=workers)
    batches = list(data.whole_images(20))
    assert [len(images) for images, _ in batches] == [4, 4, 4]
    assert torch.cat([targets for _, targets in batches]).tolist() == [0] * 6 + [1] * 6
    files = sorted((splits / "test").glob("*/*"))
    shapes = set()
    for image, file in zip([image for images, _ in batches for image in images], files, strict=True):
        original = decode(file)
        assert torch.equal(image, resize_shorter(original, 20))
        assert torch.equal(centre_crop(image, 12, 20), centre_crop(original, 12, 20))
        shapes.add(image.shape)
    assert len(shapes) > 5


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_whole_images_are_shared_by_the_processes(splits, replicas):
    (splits / "test" / "dög" / "5.png").unlink()
    ranks = []
    for rank in range(replicas):
        data = ready(splits, batch_size=2)
        data.trainer = SimpleNamespace(world_size=replicas, global_rank=rank)
        ranks.append([[image.double().mean().item() for image in images] for images, _ in data.whole_images(12)])
    assert {len(batches) for batches in ranks} == {{1: 6, 2: 3, 3: 2}[replicas]}
    files = sorted((splits / "test").glob("*/*"))
    everything = [resize_shorter(decode(file), 12).double().mean().item() for file in files]
    assert sorted(mean for batches in ranks for batch in batches for mean in batch) == sorted(everything)
    assert len(everything) == 11


def test_whole_images_that_are_not_there_are_explained(splits, root):
    with pytest.raises(ValueError, match=r"at least the 12 pixels of data.image_size, but got shorter_side=11: make"):
        ready(splits).whole_images(11)
    with pytest.raises(ValueError, match=r"^data.cache=true keeps cropped images alone: set it to false"):
        ready(splits, crop="center", cache=True).whole_images(12)
    with pytest.raises(ValueError, match="ImageFolder has no test split here to measure whole images of; give it one"):
        ready(root).whole_images(12)


def test_training_images_are_not_augmented(root):
    data = ready(root, val_size=4)
    plain = ready(root, crop="center").train_set
    assert torch.equal(images_of(data.training_images()), plain.__getitems__(data.train_set.indices)[0])
    chosen = [data.train_set.indices[index] for index in (0, 2, 5)]  # three of eight, spread evenly
    assert torch.equal(images_of(data.training_images(3)), plain.__getitems__(chosen)[0])


def test_random_crops_vary_training_images(root):
    assert ImageFolder(str(root)).augmentation() == "data.crop=random_resized and data.flip=true"
    assert ImageFolder(str(root), crop="center", crop_padding=2, flip=False).augmentation() == "data.crop_padding=2"
    assert ImageFolder(str(root), crop="squash", flip=False).augmentation() == ""


def test_unlabelled_folders(root):
    nested = ready(root, labelled=False, val_size=0.25)
    assert (nested.num_classes, len(nested.train_set), len(nested.val_set)) == (0, 9, 3)
    assert nested.train_set.targets.tolist() == [-1] * 9
    flat = ready(root / "dög")
    assert (flat.classes, flat.train_set.targets.tolist()) == ([], [-1] * 6)
    assert flat.labelled_loaders() is None


def test_an_unreadable_file_stops_or_is_skipped_and_counted(root):
    (root / "a cat" / "1.png").write_bytes((root / "a cat" / "1.png").read_bytes()[:100])
    (root / "dög" / "9.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"Cannot read the image .*(a cat/1.png|dög/9.jpg)"):
        images_of(ready(root).train_dataloader())
    with pytest.warns(UserWarning, match=r"Skipped 2 unreadable of 13 images, e.g. .*a cat/1.png\."):
        data = ready(root, unreadable="skip", crop="center")
    assert len(images_of(data.train_dataloader())) == 11
    assert data.train_set.targets.tolist() == [0] * 5 + [1] * 6
    assert torch.equal(data.train_set[1][0], centre_crop(decode(root / "a cat" / "2.jpg"), 12, 12))


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"None of the 1 images can be read, the first being .*a.jpg"):
        ready(tmp_path, unreadable="skip")


def test_modules_and_sets_can_be_pickled(root):
    data = pickle.loads(pickle.dumps(ready(root)))
    assert torch.equal(data.train_set[4][0], ready(root).train_set[4][0])
    assert isinstance(data.train_set, EncodedSet)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        ready(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images"):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "crop must be one of random_resized, center, squash, got 'centre'"),
        ({"unreadable": "ignore"}, "'ignore'"),
        ({"cache": True}, "crop must be 'center' or 'squash'"),
        ({"resize": 3}, "got 12 and 3"),
        ({"scale": (0.5, 0.2)}, "scale must be a range"),
    ],
)
def test_wrong_options_are_explained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ready(tmp_path, **options)
