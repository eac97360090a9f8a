"""Colour spaces: sRGB and CIE Lab (D65, 2 degrees), by kornia, in full precision whatever the autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from kornia.color import lab_to_rgb, rgb_to_lab
from torch import Tensor

Space = Literal["rgb", "lab"]

#: Where the channels lie, sRGB's gamut rounded outwards: the split-brain poster's code brings them to [0, 1] by these.
LOW = {"rgb": (0.0, 0.0, 0.0), "lab": (0.0, -87.0, -108.0)}
HIGH = {"rgb": (1.0, 1.0, 1.0), "lab": (100.0, 99.0, 95.0)}


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, where a device has it."""
    has_it = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_it else nullcontext()


def from_rgb(rgb: Float[Tensor, "b 3 h w"], space: Space) -> Float[Tensor, "b 3 h w"]:
    """Bring images in [0, 1] into a colour space; half precision becomes float32."""
    with full_precision(rgb.device):  # kornia's matrices would be rounded to half precision
        rgb = rgb if rgb.dtype == torch.float64 else rgb.float()
        return rgb_to_lab(rgb) if space == "lab" else rgb


def to_rgb(channels: Float[Tensor, "b 3 h w"], space: Space) -> Float[Tensor, "b 3 h w"]:
    """Bring channels back to images, clipped to [0, 1]."""
    with full_precision(channels.device):
        return lab_to_rgb(channels) if space == "lab" else channels.clamp(0, 1)


def to_unit(channels: Float[Tensor, "b 3 h w"], space: Space) -> Float[Tensor, "b 3 h w"]:
    """Bring every channel to [0, 1], as networks see them (of Lab: L / 100, (a + 87) / 186, (b + 108) / 203)."""
    low, high = (channels.new_tensor(values).view(3, 1, 1) for values in (LOW[space], HIGH[space]))
    return (channels - low) / (high - low)
