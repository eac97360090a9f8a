"""Writes what `predict` returns into a file of the run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import Subset


class PredictionWriter(BasePredictionWriter):
    """Write one row a sample to `predictions.csv`; entries with more than one number a sample go to `predictions.npz`.

    Where images have different sizes, what is written of them is padded to the largest at the bottom and on the right:
    classes of pixels (uint8) with 255, everything else with zeros.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Join the batches (and the processes) in the order of the data and write them."""
        own = {name: torch.cat(_alike([batch[name].cpu() for batch in predictions])) for name in predictions[0]}
        parts: list[Any] = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        if not trainer.is_global_zero:
            return
        joined = {name: _interleave(_alike([part[name] for part in parts])).numpy() for name in own}
        table = pd.DataFrame({name: values for name, values in joined.items() if values.ndim == 1})
        names = getattr(pl_module, "classes", None)  # the run's: the images may have other classes, or none
        if names and "prediction" in table:
            table["class"] = [names[index] for index in table["prediction"]]
        files = _files(getattr(trainer.predict_dataloaders, "dataset", None))
        if files is not None:
            table.insert(0, "path", files)
        self.folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(self.folder / "predictions.csv", index_label="index")
        large: dict[str, Any] = {name: values for name, values in joined.items() if values.ndim > 1}
        if large:
            np.savez_compressed(self.folder / "predictions.npz", **large)


def _files(dataset: Any) -> list[str] | None:
    """Files of a data set's images, through the wrappers of loaders and subsets; None where images have none."""
    if hasattr(dataset, "files"):
        return [os.fsdecode(file) for file in dataset.files]
    files = _files(dataset.dataset) if hasattr(dataset, "dataset") else None
    return files if files is None or not isinstance(dataset, Subset) else [files[index] for index in dataset.indices]


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """Pad parts of different sizes at the end of every dimension but the first."""
    sizes = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [size - length for size, length in zip(sizes, part.shape[1:], strict=True)]
        ends = [end for length in reversed(missing) for end in (0, length)]
        padded.append(F.pad(part, ends, value=255 if part.dtype == torch.uint8 else 0) if any(missing) else part)
    return padded


def _interleave(parts: list[Tensor]) -> Tensor:
    """Undo the sharding of evaluation loaders: rank r holds the samples r, r + W, r + 2W, …"""
    joined = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        joined[rank :: len(parts)] = part
    return joined
