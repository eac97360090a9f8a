import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from baton.data.masks import IGNORE, DrawnMaskSet, MaskArraySet, MaskData

SIZE = (7, 9)


def pairs(count, classes=5, channels=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, *SIZE), generator=draw, dtype=torch.uint8)
    masks = torch.randint(0, classes + 1, (count, *SIZE), generator=draw, dtype=torch.uint8)
    return images, masks.where(masks < classes, torch.tensor(IGNORE, dtype=torch.uint8))


class Toy(MaskData):
    """Forty random images with masks of five classes and ignored pixels."""

    classes = list("abcde")

    def sources(self):
        return MaskArraySet(*pairs(40)), None, MaskArraySet(*pairs(6, seed=1))


def ready(**options):
    data = Toy(batch_size=8, **options)
    data.setup()
    return data


def test_a_batch_is_rgb_with_masks():
    images, masks = next(iter(ready().train_dataloader()))
    assert (images.shape, masks.shape) == ((8, 3, *SIZE), (8, *SIZE))
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.uint8)
    assert ready().train_set.targets.tolist() == [-1] * 40


def test_pairs_in_memory():
    images, masks = pairs(5, channels=1)
    dataset = MaskArraySet(images, masks)
    some = dataset.__getitems__([3, 0])
    assert torch.equal(some[0], images[[3, 0]].repeat(1, 3, 1, 1))
    assert torch.equal(some[1], masks[[3, 0]])
    assert torch.equal(dataset[2][0], images[2].repeat(3, 1, 1))
    assert torch.equal(dataset[2][1], masks[2])


def shifted(image, row, column, flip, padding, mode):
    """One image or mask (C, H, W), pixel by pixel: the naive reference. None is outside."""
    height, width = image.shape[1:]
    result = torch.full(image.shape, -1)
    for y in range(height):
        for x in range(width):
            source_y, source_x = y + row, (width - 1 - x if flip else x) + column
            if mode == "reflect":
                source_y, source_x = (
                    2 * (size - 1) - index if index >= size else abs(index)
                    for index, size in ((source_y, height), (source_x, width))
                )
            if 0 <= source_y < height and 0 <= source_x < width:
                result[:, y, x] = image[:, source_y, source_x].int()
    return result


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_image_and_mask_are_augmented_together_and_the_outside_is_ignored(mode):
    data = Toy(crop_padding=2, flip=True, padding_mode=mode)
    images, masks = pairs(30)
    torch.manual_seed(0)
    new_images, new_masks = data.augment_pair(images, masks)
    assert (new_images.dtype, new_masks.dtype) == (torch.float32, torch.int64)
    draws = [(r, c, f) for r in range(-2, 3) for c in range(-2, 3) for f in (False, True)]
    seen = set()
    for image, mask, new_image, new_mask in zip(images, masks, new_images, new_masks, strict=True):
        known = (new_image * 255).round().int()
        matching = [d for d in draws if torch.equal(shifted(image, *d, 2, mode).clamp(min=0), known)]
        assert len(matching) == 1
        expected = shifted(mask[None], *matching[0], 2, mode)[0]
        assert torch.equal(new_mask, expected.where(expected >= 0, torch.tensor(IGNORE)).long())
        seen.add(matching[0])
    assert len(seen) > 12
    assert torch.equal(images, pairs(30)[0])
    assert torch.equal(masks, pairs(30)[1])


def test_without_augmentation_pairs_stay_as_they_are():
    images, masks = pairs(4)
    floats, classes = Toy().augment_pair(images, masks)
    assert torch.equal(floats, images.double().div(255).float())
    assert torch.equal(classes, masks.long())


@pytest.mark.parametrize("options", [{}, {"subset": 13, "crop_padding": 2}, {"val_size": 9, "num_workers": 1}])
def test_class_counts_are_those_of_the_training_split(options):
    data = Toy(batch_size=8, **options)
    counts = data.class_counts()  # before setup, too
    masks = torch.cat([masks for _, masks in data.train_dataloader()])
    assert counts.tolist() == [int((masks == value).sum()) for value in range(5)]
    assert data.class_counts() is counts


def test_a_value_beyond_the_classes_is_named():
    data = Toy()
    data.classes = list("abc")
    with pytest.raises(
        ValueError, match=r"^Toy has 3 classes, 0 to 2, and 255 for ignored.* a mask has the value 3\.$"
    ):
        data.class_counts()


def test_subsets_and_validation_from_training():
    data = ready(val_size=0.2, subset=10)
    images, masks = pairs(40)
    assert (len(data.train_set), len(data.val_set)) == (10, 8)
    assert not set(data.train_set.indices) & set(data.val_set.indices)
    assert torch.equal(torch.cat([mask for _, mask in data.val_dataloader()]), masks[data.val_set.indices])
    assert torch.equal(torch.cat([image for image, _ in data.val_dataloader()]), images[data.val_set.indices])


def test_examples_come_with_their_masks():
    data = ready(val_size=8)
    some = data.example_pairs(4)
    assert all(map(torch.equal, some, data.val_set.__getitems__([0, 2, 4, 6])))
    assert torch.equal(data.examples(4), some[0])
    assert torch.equal(ready().example_pairs(3)[1], pairs(40)[1][[0, 13, 26]])


def test_no_image_has_one_class():
    data = ready(val_size=8)
    assert data.labelled_loaders() is None
    with pytest.raises(ValueError, match=r"^Toy has a mask for every image, not one class: leave out"):
        data.training_images()
    with pytest.raises(ValueError, match=r"use data\.subset to keep a part, not data\.labels_per_class"):
        Toy(labels_per_class=2)


def test_what_varies_training_images_is_named():
    assert Toy().augmentation() == ""
    assert Toy(flip=True, crop_padding=2).augmentation() == "data.crop_padding=2 and data.flip=true"

    class Noisy(Toy):
        def augment_pair(self, images, masks):
            return super().augment_pair(images, masks)

    assert Noisy().augmentation() == "Noisy.augment_pair"


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), {"train": [], "val": []}

    def training_step(self, batch):
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch):
        self.seen["val"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_augmented_and_evaluates_plain(tmp_path):
    model, data = Recorder(), Toy(batch_size=8, val_size=8, crop_padding=3, padding_mode="zeros")
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert [masks.dtype for _, masks in model.seen["train"]] == [torch.int64] * 4
    outside = torch.cat([masks[:, 0] for _, masks in model.seen["train"]])
    assert (outside == IGNORE).all(1).any()
    images, masks = model.seen["val"][0]
    expected = data.val_set.__getitems__(range(8))
    assert torch.equal(images, data.to_float(expected[0]))
    assert torch.equal(masks, expected[1].long())


class Numbers(DrawnMaskSet):
    def __init__(self, **options):
        super().__init__(10, 4, channels=1, **options)
        self.asked = []

    def draw(self, indices):
        self.asked.append(indices.tolist())
        plane = indices.to(torch.uint8)[:, None, None].expand(-1, 4, 4)
        return plane[:, None], plane + 100


@pytest.mark.parametrize("cache", [True, False])
def test_samples_are_drawn_once(cache):
    dataset = Numbers(cache=cache)
    for indices in ([3, 1, 3], [1, 9], [9]):
        images, masks = dataset.__getitems__(indices)
        assert images.shape == (len(indices), 3, 4, 4)
        assert images[:, 2, 3, 3].tolist() == indices
        assert masks[:, 0, 0].tolist() == [index + 100 for index in indices]
    assert dataset.asked == ([[1, 3], [9]] if cache else [[3, 1, 3], [1, 9], [9]])
    assert dataset[4][1][0, 0] == 104
    assert dataset.targets.tolist() == [-1] * len(dataset)
    for wrong in ([10], [-1]):
        with pytest.raises(IndexError, match="Expected indices from 0 to 9"):
            dataset.__getitems__(wrong)
