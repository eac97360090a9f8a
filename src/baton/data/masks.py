"""The seam of segmentation: `(image, mask)` batches, uint8 on the host; a mask holds the class of every pixel."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from baton.data.augment import random_crop_flip
from baton.data.images import Batch, ImageData, as_evaluated
from baton.data.loading import evaluation_loader

IGNORE = 255
"""Value of the pixels of a mask that count neither for a loss nor for a metric."""


class MaskSet(Protocol):
    """What a data source with masks hands to `MaskData`; otherwise as `ImageSet`, with `set_epoch`, `evaluation`."""

    targets: Int64[Tensor, " samples"]
    """-1 for every sample: an image has no one class."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return uint8 RGB images (B, 3, H, W) and uint8 masks (B, H, W): the class of each pixel, or `IGNORE`."""
        ...


class MaskArraySet(Dataset):
    """Images and masks that live in memory; a batch is one indexing operation.

    Args:
        images: uint8, (N, C, H, W); one channel is repeated to RGB when a batch is fetched.
        masks: uint8, (N, H, W), the class of each pixel, or `IGNORE`.
    """

    def __init__(self, images: UInt8[Tensor, "n c h w"], masks: UInt8[Tensor, "n h w"]) -> None:
        self.images, self.masks = images, masks
        self.targets = torch.full((len(images),), -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch: uint8 (B, 3, H, W) and uint8 (B, H, W)."""
        index = torch.as_tensor(indices)
        return self.images[index].expand(-1, 3, -1, -1), self.masks[index]


class DrawnMaskSet(Dataset):
    """Images and masks that are drawn when first asked for, and kept in memory as uint8.

    A subclass implements `draw`, whose sample i must depend on i alone.

    Args:
        length: number of samples.
        side: of the square images, in pixels.
        channels: 3, or 1 for grey images, which are repeated to RGB when a batch is fetched.
        cache: keep what was drawn, (`channels` + 1) x `side`^2 bytes a sample; otherwise every fetch draws.
    """

    def __init__(self, length: int, side: int, channels: int = 3, cache: bool = True) -> None:
        self.targets = torch.full((length,), -1)
        kept = length if cache else 0
        self._drawn = torch.zeros(kept, dtype=torch.bool)
        self._images = torch.empty((kept, channels, side, side), dtype=torch.uint8)
        self._masks = torch.empty((kept, side, side), dtype=torch.uint8)

    def draw(self, indices: Int64[Tensor, " b"]) -> tuple[UInt8[Tensor, "b c h w"], UInt8[Tensor, "b h w"]]:
        """Draw samples: images of `channels` channels, and masks."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch: uint8 (B, 3, side, side) and uint8 (B, side, side).

        Raises:
            IndexError: an index is outside 0 … length - 1.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise IndexError(f"Expected indices from 0 to {len(self) - 1}, got {chosen.min()} to {chosen.max()}.")
        if not len(self._drawn):
            images, masks = self.draw(chosen)
            return images.expand(-1, 3, -1, -1), masks
        missing = chosen[~self._drawn[chosen]].unique()
        if len(missing):
            self._images[missing], self._masks[missing] = self.draw(missing)
            self._drawn[missing] = True
        return self._images[chosen].expand(-1, 3, -1, -1), self._masks[chosen]


class MaskData(ImageData):
    """Base of data modules with masks: batches of images and, for each of their pixels, a class or `IGNORE`.

    On the device a batch is float images in [0, 1], (B, 3, H, W), and int64 masks, (B, H, W). Images and masks are
    augmented together. Where an image is cropped after padding, pixels from outside are `IGNORE` with
    `padding_mode: zeros` and mirrored, in image and mask, with `reflect`.

    Since no image has one class, `subset` and `val_size` draw at random, and `labels_per_class` is a mistake.

    Attributes:
        classes: names of all classes, the background's first where there is one: names of the values in a mask.

    Args:
        kwargs: see `ImageData`; its sources are `MaskSet`s here.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.labels_per_class is not None:
            raise ValueError(
                f"{type(self).__name__} has a mask for every image, not one class: use data.subset to keep a part, "
                "not data.labels_per_class."
            )
        self._class_counts: Int64[Tensor, " classes"] | None = None

    def class_counts(self) -> Int64[Tensor, " classes"]:
        """Count the pixels of each class in the training split, without augmentation; counted once, then kept.

        Raises:
            ValueError: a mask has a value that is neither a class nor `IGNORE`.
        """
        if self._class_counts is None:
            self.setup()
            pixels = torch.zeros(IGNORE + 1, dtype=torch.int64)
            # Not shared by processes: each needs the counts of all images, and needs them before the first step.
            for _, masks in evaluation_loader(as_evaluated(self.train_set), self.batch_size, self.num_workers):
                pixels += masks.flatten().bincount(minlength=IGNORE + 1)
            beyond = pixels[self.num_classes : IGNORE].nonzero().flatten()
            if len(beyond):
                raise ValueError(
                    f"{type(self).__name__} has {self.num_classes} classes, 0 to {self.num_classes - 1}, and {IGNORE} "
                    f"for ignored pixels, but a mask has the value {int(beyond[0]) + self.num_classes}."
                )
            self._class_counts = pixels[: self.num_classes].clone()
        return self._class_counts

    def labelled_loaders(self, limit: int | None = None) -> None:
        """None: no image has one class, which evaluation on the side compares."""
        return None

    def training_images(self, limit: int | None = None) -> Any:
        """Say that no image has one class.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} has a mask for every image, not one class: leave out what measures the classes of "
            "training images."
        )

    def example_pairs(self, count: int) -> tuple[UInt8[Tensor, "n 3 h w"], UInt8[Tensor, "n h w"]]:
        """At most so many validation images with their masks, the images being those of `examples`.

        Args:
            count: how many.
        """
        dataset = self.val_set or as_evaluated(self.train_set)
        count = min(count, len(dataset))
        return dataset.__getitems__([index * len(dataset) // count for index in range(count)])

    def examples(self, count: int) -> UInt8[Tensor, "n 3 h w"]:
        """The images of `example_pairs`."""
        return self.example_pairs(count)[0]

    def augmentation(self) -> str:
        """Name the settings that vary the training images; see `ImageData`."""
        if type(self).augment_pair is not MaskData.augment_pair:
            return f"{type(self).__name__}.augment_pair"
        return super().augmentation()

    def augment_pair(
        self, images: UInt8[Tensor, "b 3 h w"], masks: UInt8[Tensor, "b h w"]
    ) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b h w"]]:
        """Augment a uint8 training batch on its device, one random draw per sample, the same for image and mask."""
        if self.crop_padding or self.flip:
            # The mask travels as a fourth channel, upside down: padding by zeros is then padding by `IGNORE`.
            both = torch.cat([images, (IGNORE - masks)[:, None]], dim=1)
            both = random_crop_flip(both, self.crop_padding, flip=self.flip, mode=self.padding_mode)
            images, masks = both[:, :3], IGNORE - both[:, 3]
        return self.to_float(images), masks.long()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 into floats and classes on the device; augment while training."""
        images, masks = batch
        if self.trainer is not None and self.trainer.training:
            return self.augment_pair(images, masks)
        return self.to_float(images), masks.long()
