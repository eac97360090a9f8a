"""SVHN (Netzer et al., 2011): house numbers, 73,257 training, 26,032 test and 531,131 easier extra images, 32 x 32."""

from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import download_url

from baton.data.download import damaged, fetch, verify
from baton.data.images import ArraySet, ImageData


class SVHN(ImageData):
    """SVHN, cropped digits. Testing uses the test split; there is no validation split of its own.

    Args:
        root: folder that holds `train_32x32.mat` and `test_32x32.mat` (or receives them).
        extra: train on the extra split too (1.9 GB in memory).
        kwargs: see `ImageData`.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, root: str = "data", extra: bool = False, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self.extra = extra

    def prepare_data(self) -> None:
        """Download the files that are missing."""
        for split in ("train", "test", *(["extra"] if self.extra else [])):
            url, file, md5 = datasets.SVHN.split_list[split]
            fetch(
                "SVHN",
                self.root,
                lambda folder, url=url, file=file, md5=md5: download_url(url, folder, file, md5),  # type: ignore[misc]
                files={file: md5},
                archives={},
            )

    def sources(self) -> tuple[ArraySet, None, ArraySet]:
        """Return the training split, with the extra images behind it if asked for, and the test split."""
        train = self._read("train")
        if self.extra:
            extra = self._read("extra")
            train = ArraySet(torch.cat([train.images, extra.images]), torch.cat([train.targets, extra.targets]))
        return train, None, self._read("test")

    def _read(self, split: str) -> ArraySet:
        try:
            from scipy.io import loadmat
        except ImportError:
            raise ValueError("SVHN comes as MATLAB files, which need scipy: pip install scipy.") from None
        _, file, md5 = datasets.SVHN.split_list[split]
        verify("SVHN", self.root, {file: md5})
        content = loadmat(self.root / file)
        if not {"X", "y"} <= content.keys():
            raise ValueError(damaged("SVHN", self.root / file))
        images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        targets = content["y"].astype(np.int64).reshape(-1) % 10  # the file calls the digit 0 "10"
        return ArraySet(torch.from_numpy(images), torch.from_numpy(targets))
