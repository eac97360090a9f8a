"""Pictures of attention: a row of images, a row for each network and pair, bright where attention is."""

import torch

from baton.distill.attention_pictures import draw_attention


def test_bright_is_where_attention_is():
    images = torch.zeros(3, 3, 16, 24)
    left, right = torch.zeros(3, 4, 6), torch.zeros(3, 2, 3)
    left[:, :, :3], right[:, :, 2] = 5.0, 0.001  # each map has a scale of its own
    picture = draw_attention(images, {"left": left, "right": right})
    assert picture.shape[0] == 3
    assert picture.min() >= 0
    assert picture.max() <= 1
    height, width = picture.shape[1:]
    rows = picture.mean(0)[height // 3 :].view(-1)[: 2 * (height // 3) * width].view(2, height // 3, width)
    # of the first image, without the text at its left
    cell = rows[:, height // 9 : height // 6, width // 12 : width // 3]
    one, two = cell.chunk(2, dim=2)
    assert one[0].mean() > two[0].mean() + 0.2
    assert two[1].mean() > one[1].mean() + 0.2


def test_empty_maps_are_dark_and_finite():
    picture = draw_attention(torch.zeros(1, 3, 8, 8), {"nothing": torch.zeros(1, 2, 2)})
    assert picture.isfinite().all()
