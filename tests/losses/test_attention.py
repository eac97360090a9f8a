"""Attention maps and their transfer against loops in float64, with gradients, stored values, and the traps."""

import pytest
import torch
import torch.nn.functional as F

from baton.losses import attention_map, attention_transfer


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def fixed(*shape, shift=0.0):
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + shift).view(shape)


def naive_map(tensor, power, reduce):
    rows = []
    for sample in tensor:
        row = []
        for i in range(tensor.shape[2]):
            for j in range(tensor.shape[3]):
                values = [abs(channel[i, j]) ** power for channel in sample]
                row.append(sum(values) if reduce == "sum" else max(values))
        norm = sum(value**2 for value in row) ** 0.5
        rows.append(torch.stack([value / norm for value in row]))
    return torch.stack(rows)


def naive_transfer(students, teachers, form):
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        squares = [
            sum((s - t) ** 2 for s, t in zip(one, other, strict=True))
            for one, other in zip(student, teacher, strict=True)
        ]
        cells = student.shape[1]
        parts = [square / cells if form == "code" else square**0.5 for square in squares]
        total = total + sum(parts) / len(parts)
    return total


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("power", [1, 2, 3.5, 4])
def test_a_map_equals_loops(power, reduce):
    tensor = features(2, 3, 5, 7)
    ours = attention_map(tensor, power, reduce)
    torch.testing.assert_close(ours, naive_map(tensor, power, reduce))
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(attention_map(-9 * tensor, power, reduce), ours)  # neither sign nor scale matter
    tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_map(x, power, reduce), tensor)


def test_a_map_is_averaged_down_before_it_is_normalised():
    tensor = features(2, 3, 6, 9)
    blocks = tensor.square().sum(1).view(2, 2, 3, 3, 3).mean((2, 4)).flatten(1)
    torch.testing.assert_close(attention_map(tensor, size=(2, 3)), blocks / blocks.norm(dim=1, keepdim=True))
    torch.testing.assert_close(attention_map(tensor, size=(6, 9)), attention_map(tensor))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_transfer_equals_loops_with_gradients(form):
    students = [features(3, 4, 5, 7, seed=1), features(3, 2, 3, 3, seed=2)]
    teachers = [attention_map(features(3, 6, 5, 7, seed=3)), attention_map(features(3, 9, 3, 3, seed=4))]
    maps = [attention_map(student) for student in students]
    torch.testing.assert_close(attention_transfer(maps, teachers, form), naive_transfer(maps, teachers, form))
    assert attention_transfer(maps, maps, form) == 0
    for student in students:
        student.requires_grad_()

    def loss(*given):
        return attention_transfer([attention_map(one) for one in given], teachers, form)

    assert torch.autograd.gradcheck(loss, students)


def test_values_of_fixed_features_stay_what_they_were():
    student, teacher = attention_map(fixed(2, 3, 3, 5)), attention_map(fixed(2, 4, 3, 5, shift=0.4))
    assert student[0, :3].tolist() == pytest.approx([0.2542350, 0.2511900, 0.2606860], abs=1e-6)
    assert attention_transfer([student], [teacher]).item() == pytest.approx(0.0024334, abs=1e-6)
    assert attention_transfer([student], [teacher], "paper").item() == pytest.approx(0.1909910, abs=1e-6)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_larger_of_two_square_maps_is_averaged_down(form):
    large, small = features(2, 3, 6, 6, seed=5), features(2, 4, 3, 3, seed=6)
    expected = attention_transfer([attention_map(large, size=(3, 3))], [attention_map(small)], form)
    torch.testing.assert_close(attention_transfer([attention_map(large)], [attention_map(small)], form), expected)
    torch.testing.assert_close(attention_transfer([attention_map(small)], [attention_map(large)], form), expected)
    # exactly what averaging the unnormalised map gives, and odd sides that do not divide each other work too
    blocks = F.adaptive_avg_pool2d(features(2, 3, 7, 7, seed=7).square().mean(1), 5).flatten(1)
    ours = attention_transfer([attention_map(features(2, 3, 7, 7, seed=7))], [attention_map(fixed(2, 1, 5, 5))], form)
    theirs = naive_transfer([blocks / blocks.norm(dim=1, keepdim=True)], [attention_map(fixed(2, 1, 5, 5))], form)
    torch.testing.assert_close(ours, theirs)


def test_equal_maps_and_empty_ones_have_finite_gradients():
    tensor = features(2, 3, 4, 4)
    tensor[0] = 0
    for form in ("code", "paper"):
        student = tensor.clone().requires_grad_()
        attention_transfer([attention_map(student)], [attention_map(tensor)], form).backward()
        assert student.grad.isfinite().all()
    assert attention_map(tensor)[0].abs().sum() == 0


def test_half_precision_does_not_overflow():
    tensor = 1000 * features(2, 3, 4, 5).half()
    assert attention_map(tensor).dtype == torch.float32
    torch.testing.assert_close(attention_map(tensor), attention_map(tensor.double()).float())


def test_what_does_not_fit_is_refused():
    one, other = attention_map(features(2, 3, 5, 7)), attention_map(features(2, 3, 4, 4))
    with pytest.raises(ValueError, match="squares, but got 35 and 16 cells: give both the same `size`"):
        attention_transfer([one], [other])
    with pytest.raises(ValueError, match="at least one, but got 1 and 2"):
        attention_transfer([one], [one, other])
    with pytest.raises(ValueError, match="at least one, but got 0 and 0"):
        attention_transfer([], [])
    with pytest.raises(ValueError, match="'code' or 'paper', but got 'l1'"):
        attention_transfer.__wrapped__([one], [one], "l1")
    with pytest.raises(ValueError, match=r"power of at least 1 and reduce 'sum' or 'max', but got 0\.5 and 'sum'"):
        attention_map(features(2, 3, 4, 4), 0.5)
