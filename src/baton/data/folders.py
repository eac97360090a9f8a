"""What a folder of images holds: class folders, loose images, splits."""

import os
from collections.abc import Iterator
from pathlib import Path

from baton.data.decoding import SUFFIXES

SPLITS = ("train", "val", "test")


def find_images(folder: Path) -> Iterator[str]:
    """Walk through all images below a folder in a fixed order; hidden files and folders do not count."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield str(Path(parent, name))


def find_splits(root: Path) -> dict[str, Path]:
    """Find `train`, `val` and `test` below a folder; without a `train` the folder itself is the training split.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if images lie beside the splits, where they would be overlooked.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"Expected a folder of images, but {root} does not exist.")
    if not (root / "train").is_dir():
        if any((root / split).is_dir() for split in SPLITS):
            raise ValueError(f"{root} has a val or test folder, but no train folder; add it, or rename the folder.")
        return {"train": root}
    beside = [path for path in sorted(root.iterdir()) if path.name not in SPLITS and not path.name.startswith(".")]
    names = [path.name for path in beside if path.is_dir() and any(find_images(path))]
    if names:
        raise ValueError(
            f"{root} has a train folder and images in {', '.join(names[:3])} beside it; expected only train, val, test."
        )
    return {split: root / split for split in SPLITS if (root / split).is_dir()}


def find_classes(folder: Path, labelled: bool | None = None) -> list[str]:
    """Names of the class folders, sorted; empty for unlabelled images.

    Args:
        folder: holds the class folders or the loose images.
        labelled: whether to expect class folders. None: if there are at least two and no loose images.

    Raises:
        ValueError: if there are no images, a class without images, or class folders and loose images mixed.
    """
    if labelled is False:
        _expect_images(folder)
        return []
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    loose = [path.name for path in entries if path.is_file() and path.name.lower().endswith(SUFFIXES)]
    folders = [path for path in entries if path.is_dir()]
    filled = [path.name for path in folders if any(find_images(path))]
    if loose and filled:
        raise ValueError(
            f"{folder} mixes class folders ({', '.join(filled[:3])}) and loose images ({', '.join(loose[:3])}); "
            "move the images into class folders, or set labelled=false to use everything without labels."
        )
    if not loose and not filled:
        _expect_images(folder)
    if labelled and not filled:
        raise ValueError(f"{folder} holds loose images, but labelled=true needs a folder for each class.")
    if len(filled) < 2 and not labelled:
        return []
    empty = [path.name for path in folders if path.name not in filled]
    if empty:
        raise ValueError(f"The class folder {folder / empty[0]} holds no images; add some or remove it.")
    return filled


def label_images(folder: Path, classes: list[str], labelled: bool | None = None) -> tuple[list[str], list[int]]:
    """List the images of a split with their targets: places in `classes`, or -1 for all where `classes` is empty.

    Raises:
        ValueError: if there are no images, or classes that are not in `classes`.
    """
    if not classes:
        _expect_images(folder)
        files = list(find_images(folder))
        return files, [-1] * len(files)
    names = find_classes(folder, labelled=True)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds classes that the training images lack: {', '.join(unknown[:3])}.")
    found = [(file, classes.index(name)) for name in names for file in find_images(folder / name)]
    return [file for file, _ in found], [target for _, target in found]


def _expect_images(folder: Path) -> None:
    if not any(find_images(folder)):
        raise ValueError(f"{folder} holds no images; expected files that end in {', '.join(SUFFIXES)}.")
