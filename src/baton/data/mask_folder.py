"""Your own images with masks: a folder of images and a folder of PNG files of the same names."""

from pathlib import Path
from typing import Any

from baton.data.folders import find_images, find_splits
from baton.data.mask_files import EVALUATIONS, MaskFileSet
from baton.data.masks import IGNORE, MaskData


class MaskFolder(MaskData):
    """A folder of images and masks: `images/x.jpg` (see `ImageFolder` for the formats) belongs to `masks/x.png`.

    The folder holds `train`, and possibly `val` and `test`, each with `images` and `masks`; without `train` it holds
    `images` and `masks` itself, from which `val_size` takes a validation split. A mask is a grey or palette PNG of its
    image's size, whose values are classes. Training images are scaled at random and cropped at random.

    Args:
        root: the folder.
        classes: names of the classes, in the order of their values in the masks.
        num_classes: how many classes there are, in place of their names.
        ignore_value: value in the masks of pixels that count neither for the loss nor for metrics.
        image_size: side of the square training images, in pixels, or height and width; where an image is smaller, the
            rest is ignored.
        scale: range of the factor by which a training image is enlarged before it is cropped.
        evaluation: `whole` images, in batches padded to the largest (padding is ignored), or `crop`: the centre.
        cache: decode every file once, into memory (4 bytes a pixel).
        num_workers: processes that decode; 0 is enough with `cache`.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    def __init__(
        self,
        root: str = "data",
        classes: list[str] | None = None,
        num_classes: int | None = None,
        ignore_value: int = IGNORE,
        image_size: int | tuple[int, int] = 256,
        scale: tuple[float, float] = (0.5, 2.0),
        evaluation: str = "whole",
        cache: bool = False,
        num_workers: int = 2,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, num_workers=num_workers, flip=flip, **kwargs)
        self.classes = self._names(classes, num_classes)
        if not 0 <= ignore_value <= IGNORE:
            raise ValueError(f"ignore_value must be a value of a mask, from 0 to {IGNORE}, got {ignore_value}.")
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if min(size) < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be a range of factors above 0, got {tuple(scale)}.")
        if evaluation not in EVALUATIONS:
            raise ValueError(f"evaluation must be one of {', '.join(EVALUATIONS)}, got {evaluation!r}.")
        self.ignore_value, self.size, self.scale = ignore_value, size, (float(scale[0]), float(scale[1]))
        self.evaluation, self.cache = evaluation, cache

    def sources(self) -> tuple[MaskFileSet, MaskFileSet | None, MaskFileSet | None]:
        """Return the splits that are there."""
        splits = {
            name: self._files(*_pairs(folder), random=name == "train")
            for name, folder in find_splits(self.root).items()
        }
        return splits["train"], splits.get("val"), splits.get("test")

    def augmentation(self) -> str:
        """Name the settings that vary the training images; see `ImageData`."""
        crop = f"the random crops of data.image_size and data.scale={list(self.scale)}"
        return " and ".join(filter(None, [crop, super().augmentation()]))

    def _names(self, classes: list[str] | None, num_classes: int | None) -> list[str]:
        count = len(classes) if classes else num_classes
        if count is None:
            raise ValueError(
                f"{type(self).__name__} needs data.classes, the names of the values in the masks, or data.num_classes."
            )
        if num_classes is not None and num_classes != count:
            raise ValueError(f"data.num_classes={num_classes}, but data.classes has {count} names: leave one out.")
        if not 1 <= count <= IGNORE:
            raise ValueError(f"Masks can hold 1 to {IGNORE} classes, got {count}.")
        return list(classes) if classes else [f"class {number}" for number in range(count)]

    def _files(self, images: list[str], masks: list[str], *, random: bool, **options: Any) -> MaskFileSet:
        evaluation = "whole" if self.evaluation == "whole" else "center"
        files = MaskFileSet(
            images,
            masks,
            self.num_classes,
            self.size,
            ignore_value=self.ignore_value,
            crop="random" if random else evaluation,
            evaluation=evaluation,
            scale=self.scale,
            seed=self.seed,
            **options,
        )
        return files.in_memory() if self.cache else files


def _pairs(folder: Path) -> tuple[list[str], list[str]]:
    """List the images of a split and the mask of each."""
    inner = [folder / name for name in ("images", "masks")]
    absent = [str(path) for path in inner if not path.is_dir()]
    if absent:
        raise ValueError(f"{folder} must hold the folders images and masks, but {' and '.join(absent)} is missing.")
    images = list(find_images(inner[0]))
    if not images:
        raise ValueError(f"{inner[0]} holds no images.")
    masks = [inner[1] / Path(image).relative_to(inner[0]).with_suffix(".png") for image in images]
    alone = [(image, mask) for image, mask in zip(images, masks, strict=True) if not mask.is_file()]
    if alone:
        raise ValueError(
            f"{len(alone)} of {len(images)} images in {inner[0]} have no mask: {alone[0][0]}, for one, needs "
            f"{alone[0][1]}."
        )
    return images, [str(mask) for mask in masks]
