"""Pascal VOC 2012 for segmentation (Everingham et al., 2010), with the masks of SBD (Hariharan et al., 2011)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from baton.data.download import fetch, verify
from baton.data.mask_files import MaskFileSet, UnusableMaskError, read_mask
from baton.data.mask_folder import MaskFolder

_CLASSES = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
_SBD = "SBD"


def read_voc_mask(path: str | Path) -> UInt8[Tensor, "height width"]:
    """Read a mask of VOC (PNG, 255 at the borders of objects) or of SBD (MATLAB, without borders).

    Raises:
        UnusableMaskError: the file is broken, or holds something else.
    """
    if Path(path).suffix != ".mat":
        return read_mask(path)
    from scipy.io import loadmat

    try:
        values = loadmat(path, variable_names=["GTcls"])["GTcls"][0]["Segmentation"][0]
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))
    except Exception as error:  # loadmat raises anything on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnusableMaskError(f"Cannot read the mask {path}: {reason[:200].rstrip('.')}.") from None


class VOCSegmentation(MaskFolder):
    """Pascal VOC 2012: background and 20 classes, 10,582 training images ("trainaug") and 1,449 for validation.

    Training takes VOC's 1,464 training images and all those of SBD that are not in VOC's validation split, with VOC's
    own mask where there is one. Validation uses VOC's validation split, and so does testing, since the masks of the
    test split are not public. The defaults are those of DeepLabv2.

    Args:
        root: folder that holds `VOCdevkit/VOC2012` and `SBD/{cls,train.txt,val.txt}` (or receives them: 2 and 1.4 GB).
        sbd: False: train on VOC's 1,464 images alone.
        image_size: side of the square training images, in pixels, or height and width.
        scale: range of the factor by which a training image is enlarged before it is cropped.
        num_workers: processes that decode.
        kwargs: see `MaskFolder`.
    """

    def __init__(
        self,
        root: str = "data",
        sbd: bool = True,
        image_size: int | tuple[int, int] = 321,
        scale: tuple[float, float] = (0.5, 1.5),
        num_workers: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root,
            classes=_CLASSES.split(),
            num_classes=None,
            ignore_value=255,
            image_size=image_size,
            scale=scale,
            num_workers=num_workers,
            **kwargs,
        )
        self.sbd = sbd

    def prepare_data(self) -> None:
        """Download and unpack the archives where their lists of images are missing."""
        voc = DATASET_YEAR_DICT["2012"]
        fetch(
            "VOCSegmentation",
            self.root,
            lambda folder: datasets.VOCSegmentation(folder, "2012", "train", download=True),
            {self._list(split): None for split in ("train", "val")},
            {voc["filename"]: voc["md5"]},
        )
        if self.sbd:
            sbd = datasets.SBDataset
            fetch(
                "VOCSegmentation",
                self.root / _SBD,
                lambda folder: sbd(folder, "train", "segmentation", download=True),
                {f"{split}.txt": None for split in ("train", "val")},
                {sbd.filename: sbd.md5},
            )

    def sources(self) -> tuple[MaskFileSet, MaskFileSet, MaskFileSet]:
        """Return the training split, and the validation split as validation and test."""
        train, val = (self._names_in(self._list(split)) for split in ("train", "val"))
        masks = {name: f"{self._voc}/SegmentationClass/{name}.png" for name in train}
        if self.sbd:
            held_out = set(val)
            for split in ("train", "val"):
                for name in self._names_in(f"{_SBD}/{split}.txt"):
                    if name not in held_out:
                        masks.setdefault(name, f"{_SBD}/cls/{name}.mat")
        evaluated = self._split({name: f"{self._voc}/SegmentationClass/{name}.png" for name in val}, random=False)
        return self._split(masks, random=True), evaluated, evaluated

    @property
    def _voc(self) -> str:
        return str(DATASET_YEAR_DICT["2012"]["base_dir"])

    def _list(self, split: str) -> str:
        return f"{self._voc}/ImageSets/Segmentation/{split}.txt"

    def _names_in(self, file: str) -> list[str]:
        verify("VOCSegmentation", self.root, {file: None})
        return (self.root / file).read_text().split()

    def _split(self, masks: dict[str, str], *, random: bool) -> MaskFileSet:
        """Build a split from the files of its masks, by the names of its images."""
        images = [f"{self._voc}/JPEGImages/{name}.jpg" for name in masks]
        verify("VOCSegmentation", self.root, dict.fromkeys([*images, *masks.values()]))
        files = ([str(self.root / file) for file in part] for part in (images, masks.values()))
        return self._files(*files, random=random, read=read_voc_mask)
