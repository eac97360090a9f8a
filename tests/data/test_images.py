import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from baton.data.images import ArraySet, ImageData


class Toy(ImageData):
    """Forty images, each of one colour that is its number; four classes."""

    classes = ["a", "b", "c", "d"]

    def sources(self):
        numbers = torch.arange(40)
        images = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
        test = ArraySet(images[:5] + 100, numbers[:5] % 4)
        return ArraySet(images, numbers % 4), None, test


def numbers(loader):
    return sorted(int(image[0, 0, 0]) for images, _ in loader for image in images)


def ready(**options):
    data = Toy(batch_size=8, **options)
    data.setup()
    return data


def test_a_batch_is_rgb_uint8_with_integer_targets():
    data = ready()
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 8, 8)
    assert (images.dtype, targets.dtype) == (torch.uint8, torch.long)
    assert torch.equal(images[:, 0, 0, 0] % 4, targets)


def test_grey_images_are_repeated():
    grey = torch.randint(0, 256, (5, 1, 4, 6), dtype=torch.uint8)
    images, targets = ArraySet(grey, torch.arange(5)).__getitems__([3, 0])
    assert torch.equal(images, grey[[3, 0]].repeat(1, 3, 1, 1))
    assert targets.tolist() == [3, 0]
    image, target = ArraySet(grey, torch.arange(5))[2]
    assert image.shape == (3, 4, 6)
    assert target == 2


def test_without_options_everything_is_trained_on_and_there_is_no_validation():
    data = ready()
    assert numbers(data.train_dataloader()) == list(range(40))
    assert data.val_dataloader() == []
    assert numbers(data.test_dataloader()) == list(range(100, 105))
    assert data.labelled_loaders() is None
    assert data.num_classes == 4


@pytest.mark.parametrize("val_size", [8, 0.2])
def test_validation_is_taken_from_training_and_stratified(val_size):
    data = ready(val_size=val_size)
    train, val = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert sorted(train + val) == list(range(40))
    assert torch.tensor(val).remainder(4).bincount().tolist() == [2, 2, 2, 2]
    assert data.val_set.targets.bincount().tolist() == [2, 2, 2, 2]


def test_few_labels_leave_the_validation_split_as_it_is():
    data = ready(val_size=8, labels_per_class=3)
    train, val = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert torch.tensor(train).remainder(4).bincount().tolist() == [3, 3, 3, 3]
    assert val == numbers(ready(val_size=8).val_dataloader())
    assert not set(train) & set(val)
    assert data.train_set.targets.tolist() == [number % 4 for number in data.train_set.indices]
    loaders = data.labelled_loaders()
    assert [numbers(loader) for loader in loaders] == [train, val]


def test_a_subset_is_stratified_and_comes_last():
    data = ready(val_size=8, labels_per_class=6, subset=12)
    train = numbers(data.train_dataloader())
    assert torch.tensor(train).remainder(4).bincount().tolist() == [3, 3, 3, 3]
    assert set(train) < set(numbers(ready(val_size=8, labels_per_class=6).train_dataloader()))
    assert len(numbers(ready(subset=40).train_dataloader())) == 40
    with pytest.raises(ValueError, match="subset asks for 41 training samples, but only 40"):
        ready(subset=41)


def test_the_seed_draws_the_split_and_setup_keeps_it():
    first, again, other = (ready(val_size=8, seed=seed) for seed in (0, 0, 1))
    assert numbers(first.val_dataloader()) == numbers(again.val_dataloader()) != numbers(other.val_dataloader())
    kept = first.train_set
    first.setup("test")
    assert first.train_set is kept


def test_floats_are_exact_and_augmentation_is_cropping_and_mirroring():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    assert torch.equal(Toy().to_float(images), images.double().div(255).float())
    assert torch.equal(Toy().augment(images), Toy().to_float(images))
    assert not torch.equal(Toy(crop_padding=2).augment(images), Toy().to_float(images))
    mirrored = [Toy(flip=True).augment(images) for _ in range(10)]
    assert any(torch.equal(batch[0], Toy().to_float(images)[0].flip(2)) for batch in mirrored)


def test_training_images_are_the_labelled_ones_spread_evenly():
    data = ready(val_size=8)
    train = numbers(data.train_dataloader())
    assert numbers(data.training_images()) == numbers(data.training_images(32)) == train
    assert numbers(data.training_images(100)) == train
    assert numbers(data.training_images(4)) == [train[index] for index in (0, 8, 16, 24)]
    data.train_set.targets[:20] = -1
    assert numbers(data.training_images(2)) == [train[20], train[26]]
    data.train_set.targets[:] = -1
    with pytest.raises(ValueError, match=r"^Toy has no labelled training images here; use labelled data"):
        data.training_images()


def test_images_in_memory_are_not_whole():
    with pytest.raises(ValueError, match=r"^Toy has images of one size alone and no whole ones: use ImageFolder or Im"):
        ready().whole_images(8)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_tell_their_indices(workers, replicas):
    """Shuffled, of a part of the images, through workers, shared by processes, and after a resumption."""
    data = ready(val_size=8, num_workers=workers, drop_last=True)
    plain, data.tells_indices = next(iter(data.train_dataloader())), True
    seen = []
    for rank in range(replicas):
        data._distribution = lambda rank=rank: {"num_replicas": replicas, "rank": rank}
        loader = data.train_dataloader()
        for epoch in range(2):
            loader._order.set_epoch(epoch)
            if epoch:
                loader.load_state_dict({"epoch": 1, "batches": 1})
            for images, targets, indices in loader:
                assert torch.equal(images, data.train_set.__getitems__(indices.tolist())[0])
                assert torch.equal(targets, data.train_set.targets[indices])
                pair = data.on_before_batch_transfer((images, targets, indices), 0)
                assert [each is other for each, other in zip(pair, (images, targets), strict=True)] == [True, True]
                assert data.batch_indices is indices
                seen.append(indices)
    assert [len(each) for each in seen] == [8] * (7 if replicas == 1 else 6)
    assert len(torch.cat(seen[:4]).unique()) == 32 if replicas == 1 else True
    data.on_before_batch_transfer(plain, 0)
    assert data.batch_indices is None


def test_tasks_see_pairs_and_evaluation_tells_nothing(tmp_path):
    told = []

    class Watch(Recorder):
        def training_step(self, batch):
            told.append((len(batch), self.trainer.datamodule.batch_indices))
            return super().training_step(batch)

        def validation_step(self, batch):
            told.append((len(batch), self.trainer.datamodule.batch_indices))

    data, model = Toy(batch_size=16, val_size=8), Watch()
    data.tells_indices = True
    trainer(tmp_path, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert [count for count, _ in told] == [2, 2, 2]
    assert told[2][1] is None
    for images, (_, indices) in zip(model.seen["training"], told[:2], strict=True):
        expected = data.to_float(data.train_set.__getitems__(indices.tolist())[0])
        assert torch.equal(images, expected)


def test_what_varies_training_images_is_named():
    assert Toy().augmentation() == ""
    assert Toy(flip=True).augmentation() == "data.flip=true"
    assert Toy(flip=True, crop_padding=2).augmentation() == "data.crop_padding=2 and data.flip=true"

    class Noisy(Toy):
        def augment(self, images):
            return super().augment(images) + 0.1

    assert Noisy().augmentation() == "Noisy.augment"


def test_examples_are_spread_evenly():
    data = ready(val_size=8)
    assert torch.equal(data.examples(4), data.val_set.__getitems__([0, 2, 4, 6])[0])
    assert torch.equal(data.examples(99), data.val_set.__getitems__(range(8))[0])
    assert torch.equal(ready().examples(3)[:, 0, 0, 0], torch.tensor([0, 13, 26], dtype=torch.uint8))


class Recorder(LightningModule):
    """Stores what arrives in each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"training": [], "validation": [], "test": []}

    def training_step(self, batch):
        self.seen["training"].append(batch[0].clone())
        return self.weight * 0

    def validation_step(self, batch):
        self.seen["validation"].append(batch[0].clone())

    def test_step(self, batch):
        self.seen["test"].append(batch[0].clone())

    def predict_step(self, batch):
        return batch[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, "max_epochs": 1, **options},
    )  # fmt: skip


def test_lightning_trains_augmented_and_evaluates_plain_floats(tmp_path):
    model = Recorder()
    data = Toy(batch_size=8, val_size=8, crop_padding=3, padding_mode="zeros")
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    predicted = torch.cat(run.predict(model, datamodule=data))
    training, val, test = (torch.cat(model.seen[name]) for name in ("training", "validation", "test"))
    assert training.dtype == val.dtype == torch.float32
    assert (training.flatten(1).amin(1) != training.flatten(1).amax(1)).any()  # zeros at a border
    assert sorted(set((val[:, 0, 0, 0] * 255).round().int().tolist())) == numbers(data.val_dataloader())
    for images in (val, test, predicted):
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
    assert (test[:, 0, 0, 0] * 255).round().tolist() == (predicted[:, 0, 0, 0] * 255).round().tolist()
    assert (predicted[:, 0, 0, 0] * 255).round().tolist() == list(range(100, 105))


@pytest.mark.parametrize("limit", [1.0, 3])
def test_lightning_goes_on_exactly_where_it_was_interrupted(tmp_path, limit):
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_epochs": 3, "limit_train_batches": limit, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=keep, **options).fit(whole, datamodule=Toy(batch_size=8))
    expected = whole.seen["training"]
    for stop in (2, len(expected) // 3, len(expected) // 3 + 1):
        again = Recorder()
        trainer(tmp_path, **options).fit(again, datamodule=Toy(batch_size=8), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert len(again.seen["training"]) == len(expected) - stop
        assert all(torch.equal(a, b) for a, b in zip(again.seen["training"], expected[stop:], strict=True))


class FakeTrainer:
    world_size, global_rank = 2, 1


def test_loaders_know_the_processes():
    data = ready()
    data.trainer = FakeTrainer()
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (2, 1)
    assert numbers(data.test_dataloader()) == [101, 103]


def test_missing_splits_are_explained():
    class Unlabelled(Toy):
        classes = []

        def sources(self):
            return ArraySet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.full((4,), -1)), None, None

    data = Unlabelled(val_size=2)
    data.setup()
    assert data.num_classes == 0
    assert data.labelled_loaders() is None
    assert len(numbers(data.predict_dataloader())) == 2
    with pytest.raises(ValueError, match="Unlabelled has no test split"):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"), [({"padding_mode": "edge"}, "'edge'"), ({"batch_size": 0}, "batch_size must be at least 1")]
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        Toy(**options)
