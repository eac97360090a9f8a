"""Colours of masks: grey is never a class, neighbours differ, and every pixel has its own."""

from itertools import pairwise

import pytest
import torch

from baton.data.masks import IGNORE
from baton.supervised.mask_pictures import GREY, paint, palette


@pytest.mark.parametrize("classes", [2, 3, 11, 21, 150])
@pytest.mark.parametrize("background", [False, True])
def test_colours_of_classes(classes, background):
    colours = palette(classes, background)
    assert colours.shape == (256, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert len(colours[:classes].unique(dim=0)) == classes
    assert (colours[classes:] == torch.tensor(GREY)).all()
    assert colours[0].any() != background
    hues = colours[background:classes]
    assert (hues.amax(1) - hues.amin(1)).min() > 0.3, "a class is nearly grey"
    assert all((one - other).abs().max() > 0.3 for one, other in pairwise(hues))


def test_every_pixel_is_painted_in_the_colour_of_its_class():
    colours = palette(4, background=True)
    masks = torch.randint(0, 5, (2, 5, 7))
    masks[masks == 4] = IGNORE
    painted = paint(masks, colours)
    assert painted.shape == (2, 3, 5, 7)
    for number in range(2):
        for y in range(5):
            for x in range(7):
                value = int(masks[number, y, x])
                assert painted[number, :, y, x].tolist() == colours[value].tolist()
                assert (painted[number, :, y, x] == torch.tensor(GREY)).all() == (value == IGNORE)
    assert torch.equal(paint(masks.to(torch.uint8), colours), painted)
