"""Lab equals scikit-image's, comes back, and does not lose precision under autocast."""

import pytest
import torch
from skimage.color import rgb2lab

from baton.layers.color_space import HIGH, LOW, from_rgb, to_rgb, to_unit


def images(dtype=torch.float64):
    return torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-3)])
def test_lab_equals_scikit_image(dtype, tolerance):
    rgb = images(dtype)
    theirs = torch.from_numpy(rgb2lab(rgb.double().permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
    assert (from_rgb(rgb, "lab").double() - theirs).abs().max() < tolerance


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_colours_come_back(space):
    rgb = images()
    torch.testing.assert_close(to_rgb(from_rgb(rgb, space), space), rgb, atol=1e-3, rtol=0)


def test_autocast_and_half_precision_images_are_converted_in_full_precision():
    rgb = images(torch.float32)
    expected = from_rgb(rgb, "lab")
    back = to_rgb(expected, "lab")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(from_rgb(rgb, "lab"), expected)
        assert torch.equal(to_rgb(expected, "lab"), back)
    half = rgb.bfloat16()
    assert from_rgb(half, "lab").dtype == torch.float32
    assert torch.equal(from_rgb(half, "lab"), from_rgb(half.float(), "lab"))


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_every_colour_lies_in_the_unit_cube(space):
    levels = torch.linspace(0, 1, 17)
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).flatten(2).unsqueeze(0)
    unit = to_unit(from_rgb(cube, space), space)
    assert unit.min() >= -1e-6
    assert unit.max() <= 1 + 1e-6
    middle = torch.tensor([LOW[space], HIGH[space]]).mean(0).view(1, 3, 1, 1)
    torch.testing.assert_close(to_unit(middle, space), torch.full((1, 3, 1, 1), 0.5))
