"""What is drawn shows what it says: frames lie where patches are, crosses where predictions are."""

import torch

from baton.ssl_tasks import autoresolution_pictures as pictures
from baton.ssl_tasks.autoresolution_tiling import Tiling

TILING = Tiling(super_patch=13, receptive_field=9, stride=1, factor=2)


def views(count=2):
    torch.manual_seed(0)
    images = torch.rand(count, 3, 22, 18) * 0.3  # dark, so that white, red and green stand out
    tops, lefts = torch.arange(count), torch.arange(count) + 2
    low = torch.nn.functional.avg_pool2d(images, 2)
    return pictures.Views(TILING, images, low, TILING.crop(images, tops, lefts), tops, lefts)


def count(picture, colour, tolerance=0.05):
    return int(((picture - torch.tensor(colour).view(3, 1, 1)).abs() < tolerance).all(0).sum())


GREEN, RED = (50 / 255, 205 / 255, 50 / 255), (1.0, 0.0, 0.0)


def test_heat_maps_frame_the_most_right_and_the_most_wrong_cell(monkeypatch):
    frames = []
    monkeypatch.setattr(
        pictures, "_frame", lambda axis, left, top, size, colour: frames.append((left, top, size, colour))
    )
    own, other = torch.full((2, 5, 5), 0.5), torch.full((2, 5, 5), 0.5)
    other[0, 1, 3], other[0, 4, 2] = 0.1, 0.9
    pictures.draw_heat_maps(views(), own, other)
    coloured = [frame for frame in frames if frame[3] != "white"][:4]
    # on the super patch in pixels, on the heat map in cells
    assert coloured == [(3, 1, 9, "limegreen"), (3, 1, 1, "limegreen"), (2, 4, 9, "red"), (2, 4, 1, "red")]
    assert next(frame for frame in frames if frame[3] == "white") == (1.0, 0.0, 6.5, "white")


def test_heat_maps_are_drawn_in_colour():
    picture = pictures.draw_heat_maps(views(), torch.ones(2, 5, 5), torch.zeros(2, 5, 5))
    assert picture.shape[0] == 3
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert count(picture, GREEN) > 50
    assert count(picture, RED) > 50
    assert count(picture, (0.706, 0.016, 0.150)) > 1000, "the own patch's map is not the map of certainty"


def test_positions_state_the_error_in_pixels(monkeypatch):
    labels = []
    from matplotlib.axes import Axes

    original = Axes.set_xlabel
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text, **k: (labels.append(text), original(self, text, **k))[1])
    seen = views()
    truth = TILING.centres(seen.tops, seen.lefts, 22, 18)
    shifted = truth + torch.tensor([3 / 9, 4 / 11]).view(1, 2, 1, 1)  # 3 pixels right, 4 down
    pictures.draw_positions(seen, shifted)
    assert [text for text in labels if "error" in text] == ["mean error 5.0 px"] * 2


def test_pairs_show_own_and_next_patch(monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "_show", lambda axis, image: shown.append(image))
    seen = views(3)
    pictures.draw_pairs(seen)
    assert len(shown) == 12
    for row in range(3):
        line = shown[4 * row : 4 * row + 4]
        expected = [seen.images[row], seen.low[row], seen.patches[row], seen.patches[(row + 1) % 3]]
        assert all(torch.equal(a, b) for a, b in zip(line, expected, strict=True))
