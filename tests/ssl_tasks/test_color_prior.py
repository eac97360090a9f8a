"""What is known without the image: counted one cell at a time, in loops."""

import pytest
import torch

from baton.ssl_tasks import ColorQuantizer
from baton.ssl_tasks.color_prior import ColorPrior

SPACES = ["rgb", "lab", "lab_rescaled", "lab_gamut"]


def images(count=5, height=19, width=13):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
def test_mean_and_frequencies_equal_loops_over_cells(space):
    quantizer = ColorQuantizer(space, (7, 3), 5)
    prior = ColorPrior(quantizer).double()
    prior.learn(quantizer, images().split([2, 3]))
    edges = {"rgb": [(0.0, 1.01)] * 3}.get(space, [(0.0, 101.0), (-87.0, 99.0), (-108.0, 95.0)])
    small = quantizer.channels(images())
    first, rest = quantizer(images())
    soft, near = quantizer.soft(small) if space == "lab_gamut" else (None, None)
    counts = [torch.ones(n, dtype=torch.float64) for n in quantizer.num_classes]
    mean = torch.zeros(3, dtype=torch.float64)
    for b in range(5):
        ends = list(edges)
        if space == "lab_rescaled":
            ends[1:] = [(c.min().item(), c.max().item() + 1) for c in small[b, 1:]]
        for y in range(5):
            for x in range(5):
                for c, (low, high) in enumerate(ends):
                    mean[c] += (small[b, c, y, x] - low) / (high - low) / 125
                counts[0][first[b, y, x]] += 1
                if soft is None:
                    counts[1][rest[b, y, x]] += 1
                else:
                    for weight, place in zip(soft[b, :, y, x], near[b, :, y, x], strict=True):
                        counts[1][place] += weight
    torch.testing.assert_close(prior.mean, mean, atol=1e-6, rtol=1e-6)
    for got, count in zip((prior.first, prior.rest), counts, strict=True):
        torch.testing.assert_close(got, count / count.sum(), atol=1e-9, rtol=1e-6)


def test_without_images_the_middle_of_the_bins_and_equal_frequencies():
    quantizer = ColorQuantizer("rgb", (4, 2), 3)
    prior = ColorPrior(quantizer)
    prior.learn(quantizer, [])
    small = quantizer.channels(images(2).float())
    mean, (first, rest) = prior.answer(quantizer, small)
    assert mean.shape == (2, 3, 3, 3)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.505))
    assert first.shape == rest.shape == (2, 4, 3, 3)
    torch.testing.assert_close(first.softmax(1), torch.full_like(first, 0.25))


@pytest.mark.parametrize("uniform", [0.1, 0.5, 1.0])
def test_rebalancing_has_mean_one_over_what_was_seen(uniform):
    quantizer = ColorQuantizer("lab_gamut", (4, 2), 3)
    prior = ColorPrior(quantizer).double()
    prior.learn(quantizer, [images()])
    weights = prior.rebalancing(uniform)
    assert (weights * prior.rest).sum().item() == pytest.approx(1)
    order = prior.rest.argsort()
    assert (weights[order].diff() <= 1e-12).all()  # rarer is never lighter
    ratio = weights[order[0]] / weights[order[-1]]
    mixed = (1 - uniform) * prior.rest + uniform / len(prior.rest)
    assert ratio.item() == pytest.approx((mixed.max() / mixed.min()).item())
