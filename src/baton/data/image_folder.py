"""Your own images: a folder for each class, or a folder of unlabelled images; decoded by the loader's workers."""

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from baton.data.decoding import (
    UnreadableImageError,
    centre_crop,
    decode,
    random_resized_crop,
    resize_shorter,
    squash,
)
from baton.data.folders import find_classes, find_splits, label_images
from baton.data.images import ArraySet, Batch, ImageData

CROPS = ("random_resized", "center", "squash")


class EncodedSet(Dataset):
    """Images that stay in their files; a batch is decoded and cropped when it is fetched.

    Random crops are a function of (seed, epoch, sample): equal for any number of workers and processes, and after
    resuming in the middle of an epoch.

    Args:
        files: paths of the images.
        targets: class of each image, -1 where there is no label.
        size: side of the images, in pixels.
        crop: `random_resized`, `center` or `squash`.
        resize: length of the shorter side before a centre crop, in pixels.
        scale: range of the area of a random crop, as a fraction of the image.
        seed: of the random crops.
    """

    def __init__(
        self,
        files: Sequence[str],
        targets: Sequence[int],
        size: int,
        *,
        crop: str = "center",
        resize: int | None = None,
        scale: tuple[float, float] = (0.25, 1.0),
        seed: int = 0,
    ) -> None:
        # One array of bytes: a list of a million paths would be copied into every worker, reference by reference.
        self.files = np.array([os.fsencode(file) for file in files])
        self.targets = torch.tensor(targets, dtype=torch.long)
        self.size, self.crop, self.resize, self.scale, self.seed = size, crop, resize or size, scale, seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # reaches workers that live on

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Decode a batch: uint8 (B, 3, size, size) and int64 (B,)."""
        images = torch.stack([self._load(int(index)) for index in indices])
        return images, self.targets[torch.as_tensor(indices)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch from which random crops are drawn."""
        self._epoch.fill_(epoch)

    def evaluation(self) -> "EncodedSet":
        """The same images with a centre crop in place of a random one."""
        plain = copy.copy(self)
        plain.crop = "center" if self.crop == "random_resized" else self.crop
        return plain

    def whole(self, shorter_side: int) -> "WholeSet":
        """The same images, resized and not cropped."""
        return WholeSet(self.files, self.targets, shorter_side)

    def in_memory(self) -> ArraySet:
        """Decode every image once, in threads."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)

        def load(index: int) -> None:
            images[index] = self._load(index)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(load, range(len(self))))
        return ArraySet(images, self.targets)

    def readable(self) -> Int[Tensor, " readable"]:
        """Decode every image, in threads, and return the indices of those that can be decoded."""

        def check(file: bytes) -> bool:
            try:
                decode(os.fsdecode(file))
            except UnreadableImageError:
                return False
            return True

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return torch.tensor(list(pool.map(check, self.files))).nonzero().flatten()

    def keep(self, indices: Int[Tensor, " kept"]) -> "EncodedSet":
        """A data set of these images alone."""
        kept = copy.copy(self)
        kept.files, kept.targets = self.files[indices.numpy()], self.targets[indices]
        return kept

    def _load(self, index: int) -> UInt8[Tensor, "3 size size"]:
        image = decode(os.fsdecode(self.files[index]))
        if self.crop == "random_resized":
            generator = np.random.default_rng((self.seed, int(self._epoch), index))
            return random_resized_crop(image, self.size, self.scale, (3 / 4, 4 / 3), generator)
        return squash(image, self.size) if self.crop == "squash" else centre_crop(image, self.size, self.resize)


class WholeSet(Dataset):
    """Images that stay in their files and are resized, not cropped, when they are fetched.

    Args:
        files: paths of the images, encoded.
        targets: class of each image, -1 where there is no label.
        shorter_side: of the images after resizing, in pixels.
    """

    def __init__(self, files: np.ndarray, targets: Int[Tensor, " n"], shorter_side: int) -> None:
        self.files, self.targets, self.shorter_side = files, targets, shorter_side

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Decode a batch: a list of uint8 (3, H, W), of different shapes, and int64 (B,)."""
        images = [decode(os.fsdecode(self.files[int(index)])) for index in indices]
        return [resize_shorter(image, self.shorter_side) for image in images], self.targets[torch.as_tensor(indices)]


class ImageFolder(ImageData):
    """A folder of images: JPEG, PNG, WebP, BMP or TIFF, of any size, depth and colour mode (see `decoding.decode`).

    The folder holds `train`, and possibly `val` and `test`; without `train` it is the training split itself, from
    which `val_size` takes a validation split. A split holds a folder for each class, or images without labels.

    Args:
        root: the folder.
        image_size: side of the square images, in pixels.
        crop: how training images become square: `random_resized` cuts out a random area, `center` resizes the shorter
            side and cuts out the centre, `squash` changes the shape. Evaluation squashes if training does, and else
            cuts out the centre.
        scale: range of the area of a random crop, as a fraction of the image.
        resize: length of the shorter side before the centre is cut out, in pixels; `image_size` if None.
        labelled: whether folders are classes. None: yes, if there are at least two and no loose images.
        unreadable: `error` stops at a file that cannot be decoded; `skip` decodes every file once at the start, and
            leaves out (and counts) those that cannot.
        cache: decode every image once, into memory (3 x `image_size`^2 bytes an image); needs a crop that is not
            random. `crop_padding` and `flip` still vary the images.
        num_workers: processes that decode; 0 is enough with `cache`.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 64,
        crop: str = "random_resized",
        scale: tuple[float, float] = (0.25, 1.0),
        resize: int | None = None,
        labelled: bool | None = None,
        unreadable: str = "error",
        cache: bool = False,
        num_workers: int = 2,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, num_workers=num_workers, flip=flip, **kwargs)
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}.")
        if unreadable not in ("error", "skip"):
            raise ValueError(f"unreadable must be 'error' or 'skip', got {unreadable!r}.")
        if cache and crop == "random_resized":
            raise ValueError("cache=true keeps one version of each image, so crop must be 'center' or 'squash'.")
        if image_size < 1 or (resize is not None and resize < image_size):
            raise ValueError(f"image_size must be at least 1 and resize no smaller, got {image_size} and {resize}.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be a range within (0, 1], got {tuple(scale)}.")
        self.image_size, self.crop, self.scale, self.resize = image_size, crop, (scale[0], scale[1]), resize
        self.labelled, self.unreadable, self.cache = labelled, unreadable, cache

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Names of the training split's class folders; empty for unlabelled images."""
        return find_classes(find_splits(self.root)["train"], self.labelled)

    def sources(self) -> tuple[Any, Any | None, Any | None]:
        """Return the splits that are there."""
        splits = {name: self._split(name) for name in find_splits(self.root)}
        return splits["train"], splits.get("val"), splits.get("test")

    def augmentation(self) -> str:
        """Name the settings that vary the training images; see `ImageData`."""
        crop = "data.crop=random_resized" if self.crop == "random_resized" else ""
        return " and ".join(filter(None, [crop, super().augmentation()]))

    def whole_images(self, shorter_side: int) -> Any:
        """The test split in order, not cropped but resized; see `ImageData`."""
        if self.cache:
            raise ValueError("data.cache=true keeps cropped images alone: set it to false to measure whole ones.")
        if shorter_side < self.image_size:
            raise ValueError(
                f"Expected whole images whose shorter side has at least the {self.image_size} pixels of "
                f"data.image_size, but got shorter_side={shorter_side}: make it larger."
            )
        if self.test_set is None:
            raise ValueError(f"{type(self).__name__} has no test split here to measure whole images of; give it one.")
        return self._evaluation(self.test_set.whole(shorter_side))

    def _split(self, name: str) -> EncodedSet | ArraySet:
        files, targets = label_images(find_splits(self.root)[name], self.classes)
        crop = "center" if name != "train" and self.crop == "random_resized" else self.crop
        images = EncodedSet(
            files, targets, self.image_size, crop=crop, resize=self.resize, scale=self.scale, seed=self.seed
        )
        if self.unreadable == "skip":
            images = self._skip_unreadable(images)
        return images.in_memory() if self.cache else images

    def _skip_unreadable(self, images: EncodedSet) -> EncodedSet:
        readable = images.readable()
        if len(readable) == len(images):
            return images
        broken = sorted(set(range(len(images))) - set(readable.tolist()))
        example = os.fsdecode(images.files[broken[0]])
        if not len(readable):
            raise ValueError(f"None of the {len(images)} images can be read, the first being {example}.")
        rank_zero_warn(f"Skipped {len(broken)} unreadable of {len(images)} images, e.g. {example}.")
        return images.keep(readable)
