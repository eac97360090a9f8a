"""Callbacks that draw: where their files and pictures go."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger


class Drawing(Callback):
    """Base of callbacks that write files into the run's `pictures/`.

    Args:
        folder: where the files go; the command sets it to the run's `pictures/`. None writes none.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def show(self, trainer: Trainer, name: str, figure: Any) -> None:
        """Write a figure to `name`.png, and log it.

        Args:
            trainer: whose loggers are told.
            name: of the file.
            figure: of matplotlib's, as `new_figure` makes them.
        """
        if self.folder is not None:
            figure.savefig(self._path(f"{name}.png"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                figure.canvas.draw()
                picture = np.asarray(figure.canvas.buffer_rgba())
                logger.log_image(f"pictures/{name}", [picture], step=trainer.global_step)

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write `name`.csv.

        Args:
            name: of the file.
            header: names of the columns.
            rows: of values; None leaves a field empty.
        """
        if self.folder is not None:
            with self._path(f"{name}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows])

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        path = Path(self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure of matplotlib's, apart from its global state.

    Args:
        width: in inches, of 150 pixels.
        height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
