"""Pictures of autoresolution: what the network sees, what it thinks belongs (figure 2), and predicted positions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baton.ssl_tasks.autoresolution_tiling import Tiling


@dataclass(frozen=True)
class Views:
    """A few images as the task cuts them up.

    Args:
        tiling: super patch and grid.
        images: (N, 3, H, W) in [0, 1].
        low: their low-resolution versions.
        patches: their super patches.
        tops: first row of every super patch.
        lefts: first column of every super patch.
    """

    tiling: Tiling
    images: Float[Tensor, "n 3 h w"]
    low: Float[Tensor, "n 3 lh lw"]
    patches: Float[Tensor, "n 3 s s"]
    tops: Int[Tensor, " n"]
    lefts: Int[Tensor, " n"]


def draw_pairs(views: Views) -> Float[Tensor, "3 h w"]:
    """Draw for every image: itself with its super patch framed, the low-resolution image, its own patch, the next's."""
    rows, size = len(views.images), views.tiling.super_patch
    titles = ("super patch framed", "low resolution: seen", "own super patch: yes", "next image's: no")
    figure, axes = _figure(rows, len(titles), titles)
    for row in range(rows):
        _show(axes[row][0], views.images[row])
        _frame(axes[row][0], views.lefts[row], views.tops[row], size, "white")
        _show(axes[row][1], views.low[row])
        _show(axes[row][2], views.patches[row])
        _show(axes[row][3], views.patches[(row + 1) % rows])
    return _as_tensor(figure)


def draw_heat_maps(
    views: Views, own: Float[Tensor, "n gh gw"], other: Float[Tensor, "n gh gw"]
) -> Float[Tensor, "3 h w"]:
    """Draw figure 2: the probability, for every cell, that its patch belongs to the low-resolution image.

    For the other image's super patch the most right cell (green) and the most wrong one (red) are framed, and what
    they see is shown.

    Args:
        views: the images.
        own: probability of every cell of an image's own super patch.
        other: the same of the next image's super patch.
    """
    rows, field = len(views.images), views.tiling.receptive_field
    titles = (
        "low resolution", "own super patch", "belongs? (yes = right)", "next image's patch",
        "belongs? (no = right)", "most right cell sees", "most wrong cell sees",
    )  # fmt: skip
    figure, axes = _figure(rows, len(titles), titles)
    for row in range(rows):
        line = axes[row]
        _show(line[0], views.low[row])
        _frame(line[0], *_scaled(views, row), "white")
        _show(line[1], views.patches[row])
        _heat(line[2], own[row])
        strange = views.patches[(row + 1) % rows]
        _show(line[3], strange)
        drawn = _heat(line[4], other[row])
        for axis, index, colour in ((5, other[row].argmin(), "limegreen"), (6, other[row].argmax(), "red")):
            i, j = divmod(int(index), other.shape[2])
            top, left = i * views.tiling.stride, j * views.tiling.stride
            _frame(line[3], left, top, field, colour)
            _frame(line[4], j, i, 1, colour)
            _show(line[axis], strange[:, top : top + field, left : left + field])
            line[axis].set_xlabel(f"p(belongs) = {other[row].flatten()[index]:.2f}", fontsize=7, color=colour)
    figure.colorbar(drawn, ax=axes.ravel().tolist(), shrink=0.6, label="p(belongs)")
    return _as_tensor(figure)


def draw_positions(views: Views, predicted: Float[Tensor, "n 2 gh gw"]) -> Float[Tensor, "3 h w"]:
    """Draw the true centre of some patches of every image (dots), each with a line to the predicted one (cross).

    Args:
        views: the images.
        predicted: coordinates (x, y) in [-1, 1] of every cell's centre.
    """
    height, width = views.images.shape[2:]
    truth = views.tiling.centres(views.tops, views.lefts, height, width)
    step = max(views.tiling.cells // 5, 1)
    half = torch.tensor([width / 2, height / 2], device=truth.device).view(1, 2, 1, 1)
    points = [((x[..., ::step, ::step] + 1) * half - 0.5).flatten(2).cpu().numpy() for x in (truth, predicted)]
    error = ((truth - predicted) * half).norm(dim=1).mean((1, 2)).tolist()
    rows = len(views.images)
    figure, axes = _figure(2, rows, ["true (dot) → predicted (cross)"] + [""] * (rows - 1), scale=2.2)
    for column in range(rows):
        _show(axes[0][column], views.images[column])
        _frame(axes[0][column], views.lefts[column], views.tops[column], views.tiling.super_patch, "white")
        for (x, y), (px, py) in zip(points[0][column].T, points[1][column].T, strict=True):
            colour = (x / width, y / height, 1 - x / width)
            axes[0][column].plot([x, px], [y, py], color=colour, linewidth=0.7)
            axes[0][column].plot(x, y, "o", color=colour, markersize=2.5)
            axes[0][column].plot(px, py, "x", color=colour, markersize=4)
        axes[0][column].set_xlabel(f"mean error {error[column]:.1f} px", fontsize=7)
        _show(axes[1][column], views.low[column])
        axes[1][column].set_xlabel("low resolution: seen", fontsize=7)
    return _as_tensor(figure)


def _figure(rows: int, columns: int, titles: Any, scale: float = 1.3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(scale * columns, scale * rows + 0.3), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    return figure, axes


def _show(axis: Any, image: Float[Tensor, "3 h w"]) -> None:
    axis.imshow(image.detach().clamp(0, 1).permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")


def _heat(axis: Any, probability: Float[Tensor, "gh gw"]) -> Any:
    return axis.imshow(probability.detach().cpu().numpy(), cmap="coolwarm", vmin=0, vmax=1, interpolation="nearest")


def _frame(axis: Any, left: Any, top: Any, size: Any, colour: str) -> None:
    """Frame a square given by its first pixel and its side; matplotlib's pixel 0 reaches from -0.5 to 0.5."""
    from matplotlib.patches import Rectangle

    corner = (float(left) - 0.5, float(top) - 0.5)
    axis.add_patch(Rectangle(corner, float(size), float(size), fill=False, edgecolor=colour, linewidth=1))


def _scaled(views: Views, row: int) -> tuple[float, float, float]:
    """Left, top and side of a super patch in pixels of the low-resolution image."""
    factor = views.tiling.factor
    left, top = (float(value[row]) / factor for value in (views.lefts, views.tops))
    return left, top, views.tiling.super_patch / factor


def _as_tensor(figure: Any) -> Float[Tensor, "3 h w"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
