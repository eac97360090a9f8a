"""Attention maps with height and width are those of the losses, no larger than what they are compared with."""

import pytest
import torch
import torch.nn.functional as F

from baton.distill.attention import Attention
from baton.losses import attention_map, attention_transfer


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("power", "reduce"), [(2.0, "sum"), (3.5, "sum"), (2.0, "max")])
def test_maps_have_the_shape_of_their_features(power, reduce):
    one, other = features(2, 3, 6, 9), features(2, 5, 4, 4, seed=1)
    maps = Attention(power, reduce).maps([one, other])
    assert [each.shape for each in maps] == [(2, 6, 9), (2, 4, 4)]
    for ours, tensor in zip(maps, (one, other), strict=True):
        assert torch.equal(ours.flatten(1), attention_map(tensor, power, reduce))


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 9), (2, 3)), ((2, 3), (6, 9)), ((6, 3), (2, 9)), ((5, 7), (5, 7))]
)
def test_the_larger_side_is_averaged_down(student, teacher, form):
    ours, theirs = features(2, 3, *student), features(2, 4, *teacher, seed=1)
    size = [min(one, other) for one, other in zip(student, teacher, strict=True)]
    naive = [F.normalize(F.adaptive_avg_pool2d(each.square().sum(1), size).flatten(1)) for each in (ours, theirs)]
    attention = Attention(form=form)
    kept = attention.maps([theirs], [ours])
    assert kept[0].shape == (2, *size)
    expected = attention_transfer([naive[0]], [naive[1]], form)
    torch.testing.assert_close(attention.transfer([ours], kept), expected)
    two = attention.transfer([ours, 2 * ours], [*kept, *kept])
    torch.testing.assert_close(two, 2 * expected)


def test_every_map_needs_a_partner():
    one = features(2, 3, 4, 4)
    with pytest.raises(ValueError, match="shorter"):
        Attention().maps([one, one], [one])
