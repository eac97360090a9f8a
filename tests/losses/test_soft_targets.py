"""Knowledge distillation against loops in float64, with gradients and stored values."""

import math

import pytest
import torch
import torch.nn.functional as F

from baton.losses import knowledge_distillation


def logits(seed, batch=3, classes=5):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student, teacher, temperature, form):
    divergences = []
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = (x.exp() / sum(v.exp() for v in x) for x in (t, s))
        divergences.append(sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)))
    mean = sum(divergences) / len(divergences)
    return temperature**2 * (mean if form == "kl" else 2 * mean / student.shape[1])


@pytest.mark.parametrize("form", ["kl", "legacy"])
@pytest.mark.parametrize("temperature", [0.5, 1, 4])
def test_it_equals_loops_with_gradients(temperature, form):
    student, teacher = logits(1).requires_grad_(), logits(2)
    torch.testing.assert_close(
        knowledge_distillation(student, teacher, temperature, form), naive(student, teacher, temperature, form)
    )
    assert torch.autograd.gradcheck(lambda s: knowledge_distillation(s, teacher, temperature, form), student)
    assert knowledge_distillation(teacher, teacher + 3, temperature, form).item() == pytest.approx(0, abs=1e-12)


def test_values_of_fixed_logits_stay_what_they_were():
    student, teacher = torch.tensor([[1.0, 0, -1], [0, 2, 0]]), torch.tensor([[2.0, 0, 0], [1, 1, -1]])
    assert knowledge_distillation(student, teacher, 4).item() == pytest.approx(0.2770137, abs=1e-5)
    assert knowledge_distillation(student, teacher, 4, "legacy").item() == pytest.approx(0.1846758, abs=1e-5)


def test_it_is_the_cross_entropy_with_soft_targets_less_their_entropy():
    student, teacher = logits(3).requires_grad_(), logits(4)
    cross_entropy = 16 * F.cross_entropy(student / 4, (teacher / 4).softmax(1))
    ours = torch.autograd.grad(knowledge_distillation(student, teacher, 4), student)
    torch.testing.assert_close(ours, torch.autograd.grad(cross_entropy, student))


def test_a_high_temperature_matches_logits_around_their_means():
    """Hinton et al., equation 4: T^2 KL -> |(s - mean) - (t - mean)|^2 / 2 C."""
    student, teacher = logits(5), logits(6)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = difference.square().sum(1).mean() / (2 * student.shape[1])
    assert knowledge_distillation(student, teacher, 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


def test_certain_teachers_and_half_precision_stay_finite():
    student, teacher = torch.zeros(2, 3).requires_grad_(), torch.tensor([[1e4, 0, 0], [0, 0, 1e4]])
    loss = knowledge_distillation(student, teacher, 1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))
    assert student.grad.isfinite().all()
    half = knowledge_distillation(logits(7).half(), logits(8).half(), 4)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(knowledge_distillation(logits(7), logits(8), 4).item(), rel=1e-2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="temperature above 0 and the form 'kl' or 'legacy', but got 0"):
        knowledge_distillation(logits(1), logits(2), 0)
