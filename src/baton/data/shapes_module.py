"""Temporary."""

from typing import Any
import torch
from baton.data.images import ImageData
from baton.data.shapes import CLASS_NAMES, ShapesDataset, _check_size


class Shapes(ImageData):
    """The embedded data: procedural images of ten classes of objects, the same everywhere from the same seed.

    Args:
        size: image side in pixels.
        length: training images (of which `labels_per_class` or `subset` may keep a part; only those are drawn).
        val_length: validation images, 0 for none.
        test_length: test images.
        unlabeled: train on the unlabelled split: targets are -1.
        picture_seed: seed of the pictures; `seed` draws the splits and the order, as everywhere.
        crop_padding: random crop after padding by this many pixels.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    classes = list(CLASS_NAMES)

    def __init__(
        self,
        size: int = 48,
        length: int = 10_000,
        val_length: int = 1_000,
        test_length: int = 2_000,
        unlabeled: bool = False,
        picture_seed: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_padding=crop_padding, flip=flip, **kwargs)
        self.size, self.picture_seed, self.unlabeled = size, picture_seed, unlabeled
        self.lengths = {"train": length, "val": val_length, "test": test_length}
        _check_size(size)

    def sources(self) -> tuple[ShapesDataset, ShapesDataset | None, ShapesDataset]:
        """Return the three splits; nothing is drawn yet."""
        train = self._split("unlabeled" if self.unlabeled else "train", self.lengths["train"])
        if self.unlabeled:
            train.targets = torch.full_like(train.targets, -1)
        val = self._split("val", self.lengths["val"]) if self.lengths["val"] else None
        return train, val, self._split("test", self.lengths["test"])

    def _split(self, split: str, length: int) -> ShapesDataset:
        return ShapesDataset(self.size, length, self.picture_seed, split)
