"""The seam every data module obeys: `(image, target)` batches, uint8 on the host, RGB in [0, 1] on the device."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, Subset

from baton.data.augment import random_crop_flip
from baton.data.loading import ResumableLoader, evaluation_loader
from baton.data.selection import split_stratified, take_per_class

Batch = tuple[Tensor, Tensor]


class ImageSet(Protocol):
    """What a data source hands to `ImageData`: a map-style data set that is fetched a batch at a time.

    One that augments on the host also has `set_epoch(epoch)`, so that its draws are a function of the epoch, and
    `evaluation()`, which returns the same samples without augmentation.
    """

    targets: Int[Tensor, " samples"]
    """Class of every sample, -1 where there is no label; known without decoding an image."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return uint8 RGB images (B, 3, H, W) and int64 targets (B,)."""
        ...


class ArraySet(Dataset):
    """Images that live in memory; a batch is one indexing operation.

    Args:
        images: uint8, (N, C, H, W); one channel is repeated to RGB when a batch is fetched.
        targets: int64, (N,), -1 where there is no label.
    """

    def __init__(self, images: UInt8[Tensor, "n c h w"], targets: Int[Tensor, " n"]) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch: uint8 (B, 3, H, W) and int64 (B,)."""
        index = torch.from_numpy(np.asarray(indices))  # four times as fast as a tensor of a list
        images = self.images.index_select(0, index)
        return images.expand(-1, 3, -1, -1), self.targets.index_select(0, index)


class ImageData(LightningDataModule):
    """Base of all data modules: splits, few labels, loaders, and augmentation on the device.

    A source subclasses this, names its `classes`, and implements `sources()`. Images are normalised by the task,
    never here.

    Attributes:
        tells_indices: a task that must know which training images it sees sets this before training begins.
        batch_indices: then, on the host, the indices of the present training batch in `train_set`; else None.

    Args:
        root: folder that holds (or receives) the data.
        batch_size: samples a step and process.
        num_workers: worker processes that decode images; data sets in memory are fastest with 0.
        val_size: validation samples taken from the training split (a number, or a fraction below 1), stratified and
            drawn from `seed`. `None`: the source's own validation split if it has one, else none.
        labels_per_class: keep only this many training samples of each class (drawn from `seed`); the validation split
            is taken first and keeps its size.
        subset: keep only this many training samples, stratified where there are labels.
        crop_padding: random crop after padding by this many pixels, per sample; 0 is none.
        padding_mode: `reflect` or `zeros`.
        flip: random horizontal flip, per sample.
        drop_last: drop the last training batch when it is not full.
        seed: draws the splits and the order of the training samples, not the augmentation; `None` is the run's own
            seed (`seed_everything`), so that seeds of a chain differ in their labelled samples, too.
    """

    classes: list[str]

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        val_size: float | None = None,
        labels_per_class: int | None = None,
        subset: int | None = None,
        crop_padding: int = 0,
        padding_mode: str = "reflect",
        flip: bool = False,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if padding_mode not in ("reflect", "zeros"):
            raise ValueError(f"padding_mode must be 'reflect' or 'zeros', got {padding_mode!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.root = Path(root)
        self.batch_size, self.num_workers, self.drop_last = batch_size, num_workers, drop_last
        self.val_size, self.labels_per_class, self.subset = val_size, labels_per_class, subset
        self.crop_padding, self.padding_mode, self.flip = crop_padding, padding_mode, flip
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.train_set: Any = None
        self.val_set: Any = None
        self.test_set: Any = None
        self.tells_indices = False
        self.batch_indices: Int[Tensor, " b"] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for unlabelled data."""
        return len(self.classes)

    def sources(self) -> tuple[Any, Any | None, Any | None]:
        """Return the train, validation and test `ImageSet`s of this source; the last two may be None."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Build the splits once; later calls keep them."""
        if self.train_set is not None:
            return
        train, val, test = self.sources()
        keep = torch.arange(len(train))
        if self.val_size:
            keep, held_out = split_stratified(train.targets, self.val_size, seed=self.seed)
            val = _Part(as_evaluated(train), held_out)
        if self.labels_per_class is not None:
            keep = keep[take_per_class(train.targets[keep], self.labels_per_class, seed=self.seed)]
        if self.subset is not None:
            if self.subset > len(keep):
                raise ValueError(f"subset asks for {self.subset} training samples, but only {len(keep)} are there.")
            if self.subset < len(keep):
                _, chosen = split_stratified(train.targets[keep], self.subset, seed=self.seed)
                keep = keep[chosen]
        self.train_set = train if len(keep) == len(train) else _Part(train, keep)
        self.val_set, self.test_set = val, test

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled anew each epoch from (seed, epoch), sharded over processes, resumable in the middle of an epoch."""
        return ResumableLoader(
            _Numbered(self.train_set) if self.tells_indices else self.train_set,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            drop_last=self.drop_last,
            seed=self.seed,
            **self._distribution(),
        )

    def val_dataloader(self) -> Any:
        """The validation split in order, each sample exactly once over all processes; empty without a split."""
        return self._evaluation(self.val_set)

    def test_dataloader(self) -> Any:
        """The test split in order, each sample exactly once over all processes."""
        if self.test_set is None:
            raise ValueError(f"{type(self).__name__} has no test split here; give it one, or set run.test=false.")
        return self._evaluation(self.test_set)

    def predict_dataloader(self) -> Any:
        """The test split where there is one, else validation, else training images, in order."""
        return self._evaluation(self.test_set or self.val_set or as_evaluated(self.train_set))

    def labelled_loaders(self, limit: int | None = None) -> tuple[Any, Any] | None:
        """Plain loaders over labelled training and validation samples, for evaluation on the side; None without.

        Args:
            limit: use at most this many training samples, spread evenly: files are often sorted by class.
        """
        if self.train_set is None or not self.val_set:
            return None
        parts = [_labelled(self.train_set, limit), _labelled(self.val_set, None)]
        if not all(map(len, parts)):
            return None
        return self._evaluation(parts[0]), self._evaluation(parts[1])

    def training_images(self, limit: int | None = None) -> Any:
        """The labelled training samples in order and without augmentation, each exactly once over all processes.

        Args:
            limit: take at most this many, spread evenly: files are often sorted by class.

        Raises:
            ValueError: no training sample has a label.
        """
        part = _labelled(self.train_set, limit)
        if not len(part):
            raise ValueError(f"{type(self).__name__} has no labelled training images here; use labelled data.")
        return self._evaluation(part)

    def whole_images(self, shorter_side: int) -> Any:
        """The test split in order, not cropped but resized, each sample exactly once over all processes.

        A batch is a list of uint8 images (3, H, W), of different shapes, and their targets (B,).

        Args:
            shorter_side: of the images after resizing, in pixels.

        Raises:
            ValueError: there are no whole images, no test split, or the images would be smaller than the crops.
        """
        raise ValueError(
            f"{type(self).__name__} has images of one size alone and no whole ones: use ImageFolder or ImageNet, or "
            "leave out what measures whole images."
        )

    def examples(self, count: int) -> UInt8[Tensor, "n 3 h w"]:
        """At most so many validation images (without a split: training images, not augmented), spread evenly.

        Args:
            count: how many.
        """
        dataset = self.val_set or as_evaluated(self.train_set)
        count = min(count, len(dataset))
        return dataset.__getitems__([index * len(dataset) // count for index in range(count)])[0]

    def augmentation(self) -> str:
        """Name the settings that vary the training images from epoch to epoch; empty where they stay the same.

        A module whose `ImageSet` augments on the host adds its own.
        """
        if type(self).augment is not ImageData.augment:
            return f"{type(self).__name__}.augment"
        settings = {"data.crop_padding": self.crop_padding, "data.flip": str(self.flip).lower() if self.flip else ""}
        return " and ".join(f"{name}={value}" for name, value in settings.items() if value)

    def to_float(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Turn uint8 images into floats in [0, 1] without augmentation."""
        return images.float().div_(255)

    def augment(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Augment a uint8 training batch on its device, one random draw per sample; floats in [0, 1]."""
        if self.crop_padding or self.flip:
            images = random_crop_flip(images, self.crop_padding, flip=self.flip, mode=self.padding_mode)
        return self.to_float(images)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep the indices of a batch that tells them: they stay on the host, and tasks see pairs only."""
        images, targets, *indices = batch
        self.batch_indices = indices[0] if indices else None
        return images, targets

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 into floats on the device; augment while training."""
        images, targets = batch
        training = self.trainer is not None and self.trainer.training
        return (self.augment(images) if training else self.to_float(images)), targets

    def evaluation_batches(self, dataset: Any) -> list[list[int]]:
        """Indices of every batch in which this process evaluates a split."""
        return self._evaluation(dataset).sampler.batches

    def _evaluation(self, dataset: Any) -> Any:
        if dataset is None:
            return []
        return evaluation_loader(dataset, self.batch_size, self.num_workers, **self._distribution())

    def _distribution(self) -> dict[str, int]:
        if self.trainer is None:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}


class _Numbered(Dataset):
    """Tells with every batch the indices of its samples, so that they come with it through workers and processes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        return *self.dataset.__getitems__(indices), torch.as_tensor(indices)

    def set_epoch(self, epoch: int) -> None:
        """Pass on the epoch, from which the host draws its augmentation."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class _Part(Subset):
    """A subset that keeps `targets`."""

    def __init__(self, dataset: Any, indices: Int[Tensor, " kept"]) -> None:
        super().__init__(dataset, indices.tolist())
        self.targets = dataset.targets[indices]

    def set_epoch(self, epoch: int) -> None:
        """Pass on the epoch, from which the host draws its augmentation."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def evaluation(self) -> "_Part":
        """The same samples without augmentation."""
        return _Part(as_evaluated(self.dataset), torch.tensor(self.indices, dtype=torch.long))


def _labelled(dataset: Any, limit: int | None) -> _Part:
    """Samples with a label, without augmentation; at most so many, spread evenly."""
    known = (dataset.targets >= 0).nonzero().flatten()
    if limit is not None and limit < len(known):
        known = known[torch.arange(limit) * len(known) // limit]
    return _Part(as_evaluated(dataset), known)


def as_evaluated(dataset: Any) -> Any:
    """A data set that augments on the host offers its samples without it as `evaluation()`."""
    return dataset.evaluation() if hasattr(dataset, "evaluation") else dataset
