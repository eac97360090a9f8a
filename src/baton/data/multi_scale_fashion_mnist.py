"""Multi-scale Fashion-MNIST (Pintea et al., 2021): an image of four objects, each enlarged by its own scale.

Source: Pintea, Tömen, Goes, Loog, van Gemert, "Resolution learning in deep convolutional networks using scale-space
theory" (IEEE Transactions on Image Processing, 2021), section IV-B, experiment 1.1(B). The paper leaves out the size of
the images and how many there are: see the options `quadrant`, `length` and `val_length`.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from baton.data.masks import IGNORE, DrawnMaskSet, MaskData
from baton.data.mnist import FashionMNIST
from baton.data.shapes_rendering import hashed_uniforms

MIXED = (1, 2, 3, 4)
"""Scales of `scale: mixed`, equally likely."""

_SIDE = 28
_SPLIT_STRIDE = 10**9  # samples a split can have


class ComposedSet(DrawnMaskSet):
    """Images of 2 x 2 quadrants with an object in each, composed when they are asked for.

    Sample i is a function of the objects and of (seed, split, i) alone. Objects come in a random order, and each once
    before any comes again.

    Args:
        objects: grey images, uint8 (N, 1, 28, 28).
        labels: the objects' classes, counted from 0, int64 (N,); masks count them from 1.
        length: number of samples, at most 10^9.
        scales: factors by which objects are enlarged, equally likely.
        quadrant: side of a quadrant, in pixels; at least 28 times the largest scale.
        threshold: grey value in (0, 1] from which on a pixel belongs to its object; darker ones but black are ignored.
        seed: of the draws.
        split: number of the split: splits of one seed have different draws.
        cache: keep composed images in memory, 8 `quadrant`^2 bytes each.
    """

    def __init__(
        self,
        objects: UInt8[Tensor, "n 1 28 28"],
        labels: Int64[Tensor, " n"],
        length: int,
        *,
        scales: tuple[int, ...],
        quadrant: int,
        threshold: float = 0.2,
        seed: int = 0,
        split: int = 0,
        cache: bool = False,
    ) -> None:
        super().__init__(length, 2 * quadrant, channels=1, cache=cache)
        self.objects, self.labels = objects, labels
        self.scales, self.quadrant, self.seed, self.split = torch.tensor(scales), quadrant, seed, split
        self._darkest = math.ceil(round(threshold * 255, 6))  # 51 for 0.2, whatever floats make of the product

    def layout(self, indices: Int64[Tensor, " b"]) -> tuple[Int64[Tensor, "b 4"], ...]:
        """Draw what samples consist of; quadrants are upper left, upper right, lower left, lower right.

        Returns:
            Numbers of the objects, their scales, and row and column of their upper left pixels in their quadrants.
        """
        count = len(self.objects)
        places = (indices[:, None] * 4 + torch.arange(4)).flatten().tolist()
        numbers = [_order(self.seed, self.split, place // count, count)[place % count] for place in places]
        keys = indices.numpy() + self.split * _SPLIT_STRIDE
        draws = torch.from_numpy(hashed_uniforms(self.seed, keys, 12)).view(-1, 4, 3)
        scales = self.scales[(draws[..., 0] * len(self.scales)).long()]
        # The object's whole frame stays in the quadrant, so its centre is uniform over all places where it fits.
        rows, columns = ((draws[..., k] * (self.quadrant - _SIDE * scales + 1)).long() for k in (1, 2))
        return torch.tensor(numbers).view(-1, 4), scales, rows, columns

    def draw(self, indices: Int64[Tensor, " b"]) -> tuple[UInt8[Tensor, "b 1 h w"], UInt8[Tensor, "b h w"]]:
        """Compose grey images and their masks."""
        numbers, scales, rows, columns = self.layout(indices)
        corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]) * self.quadrant
        tops, lefts = rows + corners[:, 0], columns + corners[:, 1]  # (B, 4)
        images = torch.zeros(len(indices), 2 * self.quadrant, 2 * self.quadrant, dtype=torch.uint8)
        for scale in scales.unique().tolist():
            chosen = (scales == scale).nonzero()  # (n, 2): sample and quadrant
            objects = self.objects[numbers[chosen[:, 0], chosen[:, 1]]].float()
            objects = F.interpolate(objects, scale_factor=scale, mode="bilinear").round().to(torch.uint8)
            for (sample, place), enlarged in zip(chosen.tolist(), objects[:, 0], strict=True):
                top, left, side = int(tops[sample, place]), int(lefts[sample, place]), _SIDE * scale
                images[sample, top : top + side, left : left + side] = enlarged
        return images[:, None], self._masks_of(images, self.labels[numbers])

    def _masks_of(self, images: UInt8[Tensor, "b h w"], labels: Int64[Tensor, "b 4"]) -> UInt8[Tensor, "b h w"]:
        classes = (labels + 1).to(torch.uint8).view(-1, 2, 1, 2, 1)
        quadrants = images.view(-1, 2, self.quadrant, 2, self.quadrant)
        dark = torch.where(quadrants > 0, IGNORE, 0).to(torch.uint8)
        return torch.where(quadrants >= self._darkest, classes, dark).view(images.shape)


class MultiScaleFashionMNIST(MaskData):
    """Multi-scale Fashion-MNIST: background and ten kinds of clothing, of which every image shows four.

    Each object is enlarged by its own scale (bilinear) and placed anywhere within its quadrant. Pixels whose grey value
    is at least `threshold` have the object's class, black ones are background, and those between are ignored. Training
    uses objects from the training split of Fashion-MNIST. Validation uses those of its test split, and so does testing,
    with the same images as far as both lengths go; `val_size` takes validation images from the training split instead.

    Args:
        root: folder that holds `FashionMNIST/raw` (or receives it).
        scale: factor by which all objects are enlarged (the paper: 1, 2 or 4), or `mixed`: 1, 2, 3 and 4, equally
            likely.
        quadrant: side of a quadrant, half the image's, in pixels. None: 32 times the largest scale, so that images have
            64, 128 or 256 pixels for scales of 1, 2 and 4 or `mixed`, and objects an eighth of a quadrant to move in.
        length: training images; by default every object is shown once.
        val_length: validation images, 0 for none.
        test_length: test images.
        threshold: see above.
        picture_seed: seed of the compositions; `seed` draws the splits and the order, as everywhere.
        cache: keep composed images in memory (8 `quadrant`^2 bytes each: 2 GB for 15,000 images of 256 pixels);
            composing takes about two milliseconds an image of that size.
        kwargs: see `ImageData`.
    """

    classes = ["background", *FashionMNIST.classes]

    def __init__(
        self,
        root: str = "data",
        scale: int | str = "mixed",
        quadrant: int | None = None,
        length: int = 15_000,
        val_length: int = 2_500,
        test_length: int = 2_500,
        threshold: float = 0.2,
        picture_seed: int = 0,
        cache: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if scale != "mixed" and (isinstance(scale, str) or scale < 1):
            raise ValueError(f"scale must be a whole number of at least 1, or 'mixed', got {scale!r}.")
        self.scales = MIXED if scale == "mixed" else (int(scale),)
        needed = _SIDE * max(self.scales)
        self.quadrant = 32 * max(self.scales) if quadrant is None else quadrant
        if self.quadrant < needed:
            raise ValueError(f"quadrant={quadrant} is too small: the largest object has {needed} x {needed} pixels.")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be a grey value above 0 and at most 1, got {threshold}.")
        lengths = {"length": length, "val_length": val_length, "test_length": test_length}
        for name, value in lengths.items():
            if not (name != "val_length") <= value <= _SPLIT_STRIDE:
                raise ValueError(f"{name} must be a number of images from 1 to {_SPLIT_STRIDE}, got {value}.")
        self.lengths = lengths
        self.threshold, self.picture_seed, self.cache = threshold, picture_seed, cache

    def prepare_data(self) -> None:
        """Download and unpack Fashion-MNIST where its files are missing."""
        FashionMNIST(str(self.root)).prepare_data()

    def sources(self) -> tuple[ComposedSet, ComposedSet | None, ComposedSet]:
        """Return the three splits; nothing is composed yet."""
        train, _, test = FashionMNIST(str(self.root)).sources()
        return (
            self._compose(train, self.lengths["length"], 0),
            self._compose(test, self.lengths["val_length"], 1) if self.lengths["val_length"] else None,
            self._compose(test, self.lengths["test_length"], 1),
        )

    def _compose(self, objects: Any, length: int, split: int) -> ComposedSet:
        return ComposedSet(
            objects.images,
            objects.targets,
            length,
            scales=self.scales,
            quadrant=self.quadrant,
            threshold=self.threshold,
            seed=self.picture_seed,
            split=split,
            cache=self.cache,
        )


@lru_cache(maxsize=8)
def _order(seed: int, split: int, number: int, count: int) -> np.ndarray:
    """The n-th random order of all objects."""
    return np.random.default_rng((seed % 2**64, split, number)).permutation(count)
