"""Hints against loops in float64, with gradients and stored values."""

import pytest
import torch
import torch.nn.functional as F

from baton.losses import hint_loss


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(students, teachers, normalize):
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        squares = []
        for one, other in zip(student, teacher, strict=True):
            scales = [sum(v**2 for v in x.flatten()) ** 0.5 if normalize else 1.0 for x in (one, other)]
            pairs = zip(one.flatten(), other.flatten(), strict=True)
            squares += [(s / scales[0] - t / scales[1]) ** 2 for s, t in pairs]
        total = total + sum(squares) / len(squares)
    return total


@pytest.mark.parametrize("normalize", [False, True])
def test_hints_equal_loops_with_gradients(normalize):
    students = [features(3, 4, 5, 3, seed=1).requires_grad_(), features(3, 2, 3, 3, seed=2).requires_grad_()]
    teachers = [features(3, 4, 5, 3, seed=3), features(3, 2, 3, 3, seed=4)]
    torch.testing.assert_close(hint_loss(students, teachers, normalize), naive(students, teachers, normalize))
    assert torch.autograd.gradcheck(lambda *given: hint_loss(given, teachers, normalize), students)
    assert hint_loss(teachers, teachers, normalize) == 0
    same = hint_loss([5 * student for student in students], teachers, True)
    torch.testing.assert_close(same, hint_loss(students, teachers, True))  # normalised: scale does not matter


def test_values_of_fixed_features_stay_what_they_were():
    values = torch.arange(2 * 3 * 3 * 5, dtype=torch.float64)
    one, other = torch.sin(0.7 * values).view(2, 3, 3, 5), torch.cos(0.3 * values).view(2, 3, 3, 5)
    assert hint_loss([one], [other]).item() == pytest.approx(0.9526370, abs=1e-6)
    assert hint_loss([one], [other], True).item() == pytest.approx(0.0423670, abs=1e-6)


def test_the_larger_map_is_averaged_down():
    large, small = features(2, 3, 7, 6, seed=5), features(2, 3, 3, 5, seed=6)
    expected = naive([F.adaptive_avg_pool2d(large, (3, 5))], [small], False)
    torch.testing.assert_close(hint_loss([large], [small]), expected)
    torch.testing.assert_close(hint_loss([small], [large]), expected)


def test_half_precision_does_not_overflow():
    one = 1000 * features(2, 3, 4, 5).half()
    torch.testing.assert_close(hint_loss([one], [-one]), hint_loss([one.double()], [-one.double()]).float())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least one, but got 0 and 1"):
        hint_loss([], [features(2, 3, 4, 4)])
    with pytest.raises(ValueError, match="same channels, but got 3 of the student and 5 of the teacher"):
        hint_loss([features(2, 3, 4, 4)], [features(2, 5, 4, 4)])
