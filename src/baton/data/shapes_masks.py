"""`ShapesMasks`: the embedded images of `Shapes` with the class of every pixel."""

from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from baton.data.masks import DrawnMaskSet, MaskData
from baton.data.shapes import ShapesDataset
from baton.data.shapes_rendering import CLASS_NAMES


class ShapesMaskSet(DrawnMaskSet):
    """A split of `Shapes` with masks: 0 is background, 1 … 10 are the objects, where they are visible.

    Args:
        size: image side in pixels, at least 16.
        length: number of samples.
        seed: of the pictures.
        split: `train`, `val`, `test` or `unlabeled`.
    """

    def __init__(self, size: int, length: int, seed: int = 0, split: str = "train") -> None:
        self._shapes = ShapesDataset(size, length, seed, split, cache=False)
        super().__init__(length, size)

    def draw(self, indices: Int64[Tensor, " b"]) -> tuple[UInt8[Tensor, "b 3 h w"], UInt8[Tensor, "b h w"]]:
        """Draw images and masks."""
        images, labels, _, visible = self._shapes.render(indices)
        return images, visible * (labels + 1).to(torch.uint8)[:, None, None]


class ShapesMasks(MaskData):
    """The images of `Shapes` with masks: background and ten classes of objects, one object an image.

    Args:
        size: image side in pixels.
        length: training images (of which `subset` may keep a part; only those are drawn).
        val_length: validation images, 0 for none.
        test_length: test images.
        picture_seed: seed of the pictures; `seed` draws the splits and the order, as everywhere.
        crop_padding: random crop after padding by this many pixels.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    classes = ["background", *CLASS_NAMES]

    def __init__(
        self,
        size: int = 48,
        length: int = 10_000,
        val_length: int = 1_000,
        test_length: int = 2_000,
        picture_seed: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_padding=crop_padding, flip=flip, **kwargs)
        self.size, self.picture_seed = size, picture_seed
        self.lengths = {"train": length, "val": val_length, "test": test_length}

    def sources(self) -> tuple[ShapesMaskSet, ShapesMaskSet | None, ShapesMaskSet]:
        """Return the three splits; nothing is drawn yet."""
        return self._split("train"), self._split("val") if self.lengths["val"] else None, self._split("test")

    def _split(self, split: str) -> ShapesMaskSet:
        return ShapesMaskSet(self.size, self.lengths[split], self.picture_seed, split)
