"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey images of 28 x 28 pixels."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from baton.data.download import damaged, fetch, verify
from baton.data.images import ArraySet, ImageData


class MNIST(ImageData):
    """MNIST: handwritten digits, repeated to RGB. Testing uses the test split; no validation split of its own.

    Args:
        root: folder that holds `MNIST/raw` (or receives it).
        pad: black pixels added on each side; 2 makes the images 32 x 32.
        size: side to which images are resized after that (bilinear, antialiased), in pixels; None leaves them.
        kwargs: see `ImageData`.
    """

    source: type[datasets.MNIST] = datasets.MNIST
    classes = [str(digit) for digit in range(10)]

    def __init__(self, root: str = "data", pad: int = 0, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        if pad < 0:
            raise ValueError(f"pad must be at least 0, got {pad}.")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}.")
        self.pad, self.size = pad, size

    def prepare_data(self) -> None:
        """Download and unpack the four files where they are missing."""
        fetch(
            type(self).__name__,
            self.root,
            lambda folder: self.source(folder, download=True),
            {f"{self._folder}/{Path(name).stem}": None for name, _ in self.source.resources},
            {f"{self._folder}/{name}": md5 for name, md5 in self.source.resources},
        )

    def sources(self) -> tuple[ArraySet, None, ArraySet]:
        """Return the training and the test split."""
        return self._read("train"), None, self._read("t10k")

    @property
    def _folder(self) -> str:
        return f"{self.source.__name__}/raw"

    def _read(self, part: str) -> ArraySet:
        name = type(self).__name__
        names = [f"{self._folder}/{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        verify(name, self.root, dict.fromkeys(names))
        images, targets = (
            self._parse(self.root / file, read)
            for file, read in zip(names, (read_image_file, read_label_file), strict=True)
        )
        if len(images) != len(targets):
            raise ValueError(damaged(name, self.root / names[0]))
        images = F.pad(images, [self.pad] * 4)[:, None]
        return ArraySet(images if self.size is None else _resized(images, self.size), targets)

    def _parse(self, path: Path, read: Any) -> torch.Tensor:
        try:
            return read(path)
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # all that torchvision says
            raise ValueError(damaged(type(self).__name__, path)) from None


def _resized(images: UInt8[Tensor, "n 1 h w"], size: int) -> UInt8[Tensor, "n 1 size size"]:
    resized = images.new_empty(len(images), 1, size, size)
    for part, out in zip(
        images.split(4096), resized.split(4096), strict=True
    ):  # as floats they are four times as large
        enlarged = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        out.copy_(enlarged.round_().clamp_(0, 255))
    return resized


class FashionMNIST(MNIST):
    """Fashion-MNIST: ten kinds of clothing; otherwise as `MNIST`.

    Args:
        root: folder that holds `FashionMNIST/raw` (or receives it).
        pad: black pixels added on each side.
        size: side to which images are resized after that, in pixels.
        kwargs: see `ImageData`.
    """

    source = datasets.FashionMNIST
    classes = datasets.FashionMNIST.classes
