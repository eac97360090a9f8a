"""STL-10 (Coates et al., 2011): 5,000 training, 8,000 test and 100,000 unlabelled images of 96 x 96 pixels."""

from typing import Any

import numpy as np
import torch
from torchvision import datasets

from baton.data.download import damaged, fetch, verify
from baton.data.images import ArraySet, ImageData

_IMAGE = 3 * 96 * 96


class STL10(ImageData):
    """STL-10: few labels, many unlabelled images. Testing uses the test split.

    Args:
        root: folder that holds `stl10_binary` (or receives it).
        unlabeled: train on the unlabelled split (2.8 GB, read from the disk as needed; targets -1, `num_classes` 0)
            and validate on the labelled training images unless `val_size` is given. False: train on the labelled
            images, with no validation split of its own.
        crop_padding: random crop after padding by this many pixels.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    def __init__(
        self, root: str = "data", unlabeled: bool = False, crop_padding: int = 12, flip: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(root=root, crop_padding=crop_padding, flip=flip, **kwargs)
        self.unlabeled = unlabeled
        names = "airplane bird car cat deer dog horse monkey ship truck"
        self.classes = [] if unlabeled else names.split()

    def prepare_data(self) -> None:
        """Download and unpack the archive (2.6 GB) where the files are missing."""
        source = datasets.STL10
        fetch(
            "STL10",
            self.root,
            lambda folder: source(folder, split="test", download=True),
            {f"{source.base_folder}/{name}": None for name, _ in source.train_list + source.test_list},
            {source.filename: source.tgz_md5},
        )

    def sources(self) -> tuple[ArraySet, ArraySet | None, ArraySet]:
        """Return the training (labelled or not), validation and test splits."""
        labelled, test = self._read("train"), self._read("test")
        if self.unlabeled:
            return self._read("unlabeled"), labelled, test
        return labelled, None, test

    def _read(self, split: str) -> ArraySet:
        folder = datasets.STL10.base_folder
        names = [f"{folder}/{split}_X.bin"] + ([f"{folder}/{split}_y.bin"] if split != "unlabeled" else [])
        verify("STL10", self.root, dict.fromkeys(names))  # by size below: md5 of gigabytes takes too long
        path = self.root / names[0]
        count, rest = divmod(path.stat().st_size, _IMAGE)
        targets = np.fromfile(self.root / names[1], np.uint8).astype(np.int64) - 1 if names[1:] else np.full(count, -1)
        if rest or len(targets) != count:
            raise ValueError(damaged("STL10", path))
        # Mapped, not read: processes share the pages, and only what is used is loaded. Stored column by column.
        images = torch.from_file(str(path), shared=False, size=count * _IMAGE, dtype=torch.uint8)
        return ArraySet(images.view(count, 3, 96, 96).transpose(2, 3), torch.from_numpy(targets))
