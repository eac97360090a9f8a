"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels."""

import pickle
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from baton.data.download import fetch, verify
from baton.data.images import ArraySet, ImageData

_CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""


class CIFAR10(ImageData):
    """CIFAR-10: ten classes. Testing uses the test split; there is no validation split unless `val_size` asks for one.

    Args:
        root: folder that holds `cifar-10-batches-py` (or receives it).
        crop_padding: random crop after padding by this many pixels; 4 is the usual recipe.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    source: type[datasets.CIFAR10] = datasets.CIFAR10
    classes = _CIFAR10

    def __init__(self, root: str = "data", crop_padding: int = 4, flip: bool = True, **kwargs: Any) -> None:
        super().__init__(root=root, crop_padding=crop_padding, flip=flip, **kwargs)

    def prepare_data(self) -> None:
        """Download and unpack the archive where the files are missing."""
        fetch(
            type(self).__name__,
            self.root,
            lambda folder: self.source(folder, download=True),
            self._files(self.source.train_list + self.source.test_list),
            {self.source.filename: self.source.tgz_md5},
        )

    def sources(self) -> tuple[ArraySet, None, ArraySet]:
        """Return the training and the test split."""
        return self._read(self.source.train_list), None, self._read(self.source.test_list)

    def _files(self, table: list[list[str]]) -> dict[str, str | None]:
        """Files relative to the root with their md5, from torchvision's table."""
        return {f"{self.source.base_folder}/{name}": md5 for name, md5 in table}

    def _read(self, table: list[list[str]]) -> ArraySet:
        files = self._files(table)
        verify(type(self).__name__, self.root, files)  # before anything is unpickled: md5 makes that safe
        entries = [pickle.loads((self.root / file).read_bytes(), encoding="latin1") for file in files]
        images = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        targets = [label for entry in entries for label in entry["labels" if "labels" in entry else "fine_labels"]]
        return ArraySet(torch.from_numpy(images), torch.tensor(targets))


class CIFAR100(CIFAR10):
    """CIFAR-100: a hundred classes (the fine labels); otherwise as `CIFAR10`.

    Args:
        root: folder that holds `cifar-100-python` (or receives it).
        crop_padding: random crop after padding by this many pixels.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    source = datasets.CIFAR100
    classes = _CIFAR100.split()
