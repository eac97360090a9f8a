"""Pictures of attention: where a student and its teacher look in the same images (figures 6.4 and 6.6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

_FONT = 9  # points
_FITS = 15  # letters of this size beside a row


@dataclass(frozen=True)
class Before:
    """Where a student looked before it was trained.

    Attributes:
        images: those that it looked at, and that it will be shown again; uint8, on the host.
        maps: attention maps (n, h, w) of each pair.
    """

    images: UInt8[Tensor, "n 3 h w"]
    maps: list[Tensor]


def draw_attention(
    images: Float[Tensor, "n 3 h w"], rows: Mapping[str, Float[Tensor, "n _ _"]]
) -> Float[Tensor, "3 height width"]:
    """Draw images, and below them their attention maps, enlarged: dark where a map is 0, bright where it is largest.

    Args:
        images: in [0, 1].
        rows: maps of these images of at least 0, by what is written beside them, in one or two lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, size = len(images), images.shape[2:]
    figure = Figure(figsize=(1.3 * count + 0.3, 1.3 * (len(rows) + 1)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    longest = max((len(part) for name in rows for part in name.splitlines()), default=0)
    font = _FONT * min(1.0, _FITS / max(longest, 1))
    axes[0][0].set_ylabel("image", fontsize=font)
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(_array(image.clamp(0, 1).permute(1, 2, 0)), interpolation="nearest")
    for line, (name, maps) in zip(axes[1:], rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=font)
        large = F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
        for axis, heat in zip(line, large, strict=True):
            axis.imshow(_array(heat / heat.max().clamp_min(1e-12)), cmap="inferno", vmin=0, vmax=1)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)


def _array(values: Tensor) -> Any:
    return values.detach().float().cpu().numpy()
