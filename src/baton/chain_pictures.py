"""The contact sheet of a chain: the last picture of several stages below each other.

Tasks draw what they want to show into ``pictures/<name>_epoch_0001.png`` of the run
(:class:`baton.callbacks.Pictures`), often as a grid whose first row is the images and whose further rows are what
became of them. Runs of one seed look at the same images, so the rows that several pictures begin with are drawn once,
on top.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.chain_table import save_figure
from baton.chain_table_file import Sheet

#: An array of (height, width, 3) bytes. NumPy is imported where it is used: ``baton chain --help`` does without it.
Pixels = Any
#: A label and what stands beside it; None: no data yet.
Strip = tuple[str, Pixels | None]

_DPI = 150
_EDGE, _GAP = 24, 16  # pixels around everything, and between two things
_WIDTH = 900  # about as wide small pictures become; larger ones keep their own size
_MAX_ENLARGEMENT = 8
_EMPTY = (300, 60)  # width and height of what says that there is no picture


def write_pictures(name: str, sheet: Sheet, runs: Mapping[str, Path], folder: Path) -> None:
    """Write ``pictures.png`` into the folder.

    Args:
        name: of the chain.
        sheet: what to show.
        runs: stage -> folder of its run with the sheet's seed, for the runs that have finished.
        folder: the chain's.

    Raises:
        ValueError: a picture is damaged.
    """
    strips = [(label, last_picture(runs[s], sheet.name) if s in runs else None) for label, s in sheet.rows.items()]
    draw(name, sheet, draw_common_rows_once(strips), folder / "pictures.png")


def missing_picture(sheet: Sheet, runs: Mapping[str, Path]) -> str:
    """Name the first finished run that has not drawn the picture and what it has drawn; empty if there is none."""
    for stage in sheet.rows.values():
        if stage in runs and sheet.name not in (found := pictures_of(runs[stage])):
            has = ", ".join(found) or "none"
            return f"{stage} with seed {sheet.seed} has no picture {sheet.name!r}; it has {has}"
    return ""


def last_picture(run: Path, name: str) -> Pixels | None:
    """Read the picture of this name from the last epoch that has one; None if no epoch has.

    Raises:
        ValueError: the file is damaged.
    """
    import numpy as np
    from PIL import Image

    last = pictures_of(run).get(name)
    if last is None:
        return None
    try:
        with Image.open(last) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError) as error:  # the latter is what PIL finds wrong inside a PNG
        raise ValueError(f"{last} is damaged: delete it, and the sheet shows the picture before it.") from error


def pictures_of(run: Path) -> dict[str, Path]:
    """Name of each picture that a run has drawn -> its last file."""
    found: dict[str, tuple[int, Path]] = {}
    for file in sorted((run / "pictures").glob("*.png")):
        match = re.fullmatch(r"(.+)_epoch_(\d+)\.png", file.name)
        if match:  # compared as a number: epoch 10000 has a digit more than those before it
            name, epoch = match[1], int(match[2])
            found[name] = max(found.get(name, (epoch, file)), (epoch, file))
    return {name: file for name, (_, file) in found.items()}


def draw_common_rows_once(strips: Sequence[Strip]) -> list[Strip]:
    """Take the rows that pictures begin with alike out of them, and put them on top with the label ``images``.

    If there are several groups of pictures that begin alike, this is done for the largest (of equal ones the first):
    below the images of one group, another group's pictures need their own.
    """
    import numpy as np

    drawn = {index: pixels for index, (_, pixels) in enumerate(strips) if pixels is not None}
    groups = [
        [index for index, other in drawn.items() if np.array_equal(other, pixels) or common_rows([other, pixels])]
        for pixels in drawn.values()
    ]
    group = max(groups, key=len, default=[])
    rows = common_rows([drawn[index] for index in group])
    if not rows:
        return list(strips)
    images = drawn[group[0]][:rows]
    drawn.update({index: drawn[index][rows:] for index in group})
    return [("images", images), *((label, drawn.get(index)) for index, (label, _) in enumerate(strips))]


def common_rows(pictures: Sequence[Pixels]) -> int:
    """Count the rows of pixels at the top that are the same in all pictures and worth being drawn once.

    Rows are counted up to the last border among them (a row of one colour), because what follows is the beginning of
    something else: the black margins of two different digits are alike, too. There is nothing to draw once if the
    pictures differ in size, if they are the same from top to bottom, or if they share less than a tenth, which is
    a border or a heading, not an image.
    """
    import numpy as np

    if len(pictures) < 2 or len({picture.shape for picture in pictures}) > 1:
        return 0
    first, height = pictures[0], len(pictures[0])
    alike = np.all([picture == first for picture in pictures], axis=(0, 2, 3))
    if alike.all():
        return 0
    end = int(alike.argmin())
    border = (first[:end] == first[:end, :1]).all(axis=(1, 2))
    if border.any():
        end = int(border.nonzero()[0][-1]) + 1
    return end if end >= height / 10 and not border[:end].all() else 0


def draw(name: str, sheet: Sheet, strips: Sequence[Strip], path: Path) -> None:
    """Draw the label left of every picture; small pictures are enlarged by whole numbers, so that pixels stay sharp."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def write(text: str, **options: Any) -> tuple[Any, int, int]:
        """A text that is still to be placed, its width and its height."""
        written = figure.text(0, 0, text, parse_math=False, **options)
        extent = written.get_window_extent(renderer)
        return written, math.ceil(extent.width), math.ceil(extent.height)

    title, *title_size = write(
        f"{name}\nlast picture {sheet.name!r} of every stage, seed {sheet.seed}", fontsize=10, va="top"
    )
    labels = [write(textwrap.fill(label, 28), fontsize=9, ha="right", va="center") for label, _ in strips]
    pictures = [None if pixels is None else _enlarged(pixels) for _, pixels in strips]
    sizes = [_EMPTY if pixels is None else (pixels.shape[1], pixels.shape[0]) for pixels in pictures]
    left = _EDGE + max(wide for _, wide, _ in labels) + _GAP
    heights = [max(label[2], size[1]) for label, size in zip(labels, sizes, strict=True)]
    width = max(_EDGE + title_size[0], left + max(wide for wide, _ in sizes)) + _EDGE
    height = 2 * _EDGE + title_size[1] + sum(_GAP + row for row in heights)
    figure.set_size_inches(width / _DPI, height / _DPI)
    title.set_position((_EDGE / width, 1 - _EDGE / height))
    bottom = height - _EDGE - title_size[1]
    for (label, *_), pixels, (wide, high), row in zip(labels, pictures, sizes, heights, strict=True):
        bottom -= _GAP + row
        label.set_position(((left - _GAP) / width, (bottom + row / 2) / height))
        low = bottom + (row - high) // 2  # whole pixels: a picture between them would be resampled
        axis = figure.add_axes((left / width, low / height, wide / width, high / height))
        axis.set_axis_off()
        if pixels is None:
            axis.text(0, 0.5, "no data yet", fontsize=9, va="center", transform=axis.transAxes, color="0.4")
        else:
            axis.imshow(pixels, interpolation="nearest", aspect="auto")
    save_figure(figure, path)


def _enlarged(pixels: Pixels) -> Pixels:
    factor = min(max(round(_WIDTH / pixels.shape[1]), 1), _MAX_ENLARGEMENT)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
