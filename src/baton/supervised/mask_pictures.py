"""Masks in colours: a hue for every class, black for the background, grey for what is ignored."""

import colorsys

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from baton.data.masks import IGNORE

GREY = (0.5, 0.5, 0.5)
_GOLDEN = 0.618033988749895


def palette(classes: int, background: bool) -> Float[Tensor, "values 3"]:
    """Return a colour in [0, 1] for each of the 256 values of a mask; those that are no class are grey.

    Hues of consecutive classes are a golden section of the circle apart, so that however many there are, none is close
    to its predecessors. Colours are saturated: none of them is grey.

    Args:
        classes: how many.
        background: whether the first is the background, and black.
    """
    colours = torch.tensor(GREY).repeat(IGNORE + 1, 1)
    for number in range(classes):
        hue, turn = (number * _GOLDEN) % 1.0, number % 3
        rgb = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[turn], (0.95, 1.0, 0.75)[turn])
        colours[number] = torch.tensor((0.0, 0.0, 0.0) if background and number == 0 else rgb)
    return colours


def paint(masks: Integer[Tensor, "b h w"], colours: Float[Tensor, "values 3"]) -> Float[Tensor, "b 3 h w"]:
    """Return masks in colours.

    Args:
        masks: values from 0 to 255.
        colours: of every value, as `palette` gives them.
    """
    return colours.to(masks.device)[masks.long()].permute(0, 3, 1, 2)
