"""Images and masks that stay in their files: decoded, scaled, cropped and padded together when a batch is fetched."""

import copy
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

from baton.data.decoding import UnreadableImageError, decode
from baton.data.images import Batch
from baton.data.masks import IGNORE

PADDING = (124, 116, 104)
"""Colour outside of an image: the mean of ImageNet, about zero when normalised, as in DeepLab; the mask is `IGNORE`."""

EVALUATIONS = ("whole", "crop")

Pair = tuple[UInt8[Tensor, "3 height width"], UInt8[Tensor, "height width"]]


class UnusableMaskError(UnreadableImageError):
    """A mask that does not say which class each pixel of its image has; the sentence names the file."""


def read_mask(path: str | Path) -> UInt8[Tensor, "height width"]:
    """Read a mask whose values are classes: a grey image, or one with a palette, whose colours do not count.

    Args:
        path: a PNG (or BMP, TIFF, …) file of 1 to 16 bits a pixel; its content decides, not its suffix.

    Raises:
        UnusableMaskError: (a `ValueError`) the file is broken, holds colours, or a value above 255.
    """
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            mode, values = image.mode, np.array(image)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableMaskError(f"Cannot read the mask {path}: {reason[:200].rstrip('.')}.") from None
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise UnusableMaskError(
            f"The mask {path} holds colours (mode {mode}), but a grey or palette PNG was expected, whose values are "
            "classes: replace each colour by the number of its class."
        )
    if values.size and int(values.max()) > IGNORE:
        raise UnusableMaskError(f"The mask {path} has the value {values.max()}, but classes are at most {IGNORE - 1}.")
    if mode == "L" and content.startswith(b"\x89PNG") and content[24] < 8:
        # Decoders stretch grey values of 2 or 4 bits to 0 … 255; the 25th byte of a PNG is its number of bits.
        values = values // (255 // (2 ** content[24] - 1))
    return torch.from_numpy(values.astype(np.uint8))


class MaskFileSet(Dataset):
    """A `MaskSet` of files; a batch is decoded, scaled and cropped when it is fetched.

    Random scales and crops are a function of (seed, epoch, sample): equal for any number of workers and processes, and
    after resuming in the middle of an epoch.

    Args:
        images: paths of the images.
        masks: path of each image's mask.
        num_classes: how many classes there are; masks hold 0 … `num_classes` - 1 and `ignore_value`.
        size: height and width of the crops, in pixels; smaller images are padded at the bottom and on the right.
        ignore_value: value in the files of pixels that do not count; it becomes `IGNORE`.
        crop: `random`; `center`; or `whole`, which pads the images to the largest of their batch.
        evaluation: `crop` of the samples without augmentation: `whole` or `center`.
        scale: range of the factor by which images are enlarged before a random crop, drawn uniformly.
        seed: of the random scales and crops.
        read: reads a mask's file.
    """

    def __init__(
        self,
        images: Sequence[str],
        masks: Sequence[str],
        num_classes: int,
        size: tuple[int, int],
        *,
        ignore_value: int = IGNORE,
        crop: str = "random",
        evaluation: str = "whole",
        scale: tuple[float, float] = (1.0, 1.0),
        seed: int = 0,
        read: Callable[[str], Tensor] = read_mask,
    ) -> None:
        # Arrays of bytes: lists of many paths would be copied into every worker, reference by reference.
        self.images, self.masks = (np.array([os.fsencode(file) for file in files]) for files in (images, masks))
        self.targets = torch.full((len(images),), -1)
        self.num_classes, self.ignore_value, self.read = num_classes, ignore_value, read
        self.size, self.crop, self.plain_crop, self.scale, self.seed = size, crop, evaluation, scale, seed
        self._pairs: list[Pair] = []
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # reaches workers that live on

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Load a batch: uint8 (B, 3, H, W) and uint8 (B, H, W)."""
        pairs = [self._load(int(index)) for index in indices]
        height, width = (max(mask.shape[side] for _, mask in pairs) for side in (0, 1))
        images, masks = zip(*(_pad(*pair, height, width) for pair in pairs), strict=True)
        return torch.stack(images), torch.stack(masks)

    @property
    def files(self) -> np.ndarray:
        """Paths of the images, as bytes, by which predictions name them."""
        return self.images

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch from which random scales and crops are drawn."""
        self._epoch.fill_(epoch)

    def evaluation(self) -> "MaskFileSet":
        """The same samples without augmentation."""
        plain = copy.copy(self)
        plain.crop = self.plain_crop
        return plain

    def in_memory(self) -> "MaskFileSet":
        """The same samples, decoded once, in threads, and kept; they are still scaled and cropped when fetched."""
        kept = copy.copy(self)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kept._pairs = list(pool.map(self._decode, range(len(self))))
        return kept

    def _load(self, index: int) -> Pair:
        image, mask = self._pairs[index] if self._pairs else self._decode(index)
        if self.crop == "whole":
            return image, mask
        generator = np.random.default_rng((self.seed, int(self._epoch), index)) if self.crop == "random" else None
        if generator is not None and self.scale != (1.0, 1.0):
            factor = generator.uniform(*self.scale)
            shape = [max(1, round(length * factor)) for length in mask.shape]
            image = functional.resize(image, shape, antialias=True)
            mask = functional.resize(mask[None], shape, InterpolationMode.NEAREST_EXACT)[0]
        image, mask = _pad(image, mask, *self.size)
        room = [length - kept for length, kept in zip(mask.shape, self.size, strict=True)]
        top, left = (int(generator.integers(n + 1)) if generator is not None else n // 2 for n in room)
        window = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return image[:, *window], mask[window]

    def _decode(self, index: int) -> Pair:
        image_file, file = os.fsdecode(self.images[index]), os.fsdecode(self.masks[index])
        image, mask = decode(image_file), self.read(file)
        if mask.shape != image.shape[1:]:
            (height, width), (rows, columns) = mask.shape, image.shape[1:]
            raise UnusableMaskError(
                f"The mask {file} has {height} rows of {width} pixels, but its image {image_file} has {rows} of "
                f"{columns}: both must have the same size."
            )
        ignored = mask == self.ignore_value
        beyond = mask[(mask >= self.num_classes) & ~ignored]
        if len(beyond):
            raise UnusableMaskError(
                f"The mask {file} has the value {int(beyond[0])}, but the classes are 0 to {self.num_classes - 1} and "
                f"{self.ignore_value} is ignored: correct the mask, or the data's classes or ignore_value."
            )
        return image, mask.masked_fill(ignored, IGNORE)


def _pad(image: Tensor, mask: Tensor, height: int, width: int) -> Pair:
    """Pad at the bottom and on the right to at least this size."""
    rows, columns = mask.shape
    if rows >= height and columns >= width:
        return image, mask
    padded = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(1, max(rows, height), max(columns, width))
    padded[:, :rows, :columns] = image
    outside = mask.new_full(padded.shape[1:], IGNORE)
    outside[:rows, :columns] = mask
    return padded, outside
