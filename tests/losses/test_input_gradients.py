"""Terms on gradients: loops in float64, second derivatives, and a step that equals finite differences."""

import pytest
import torch
import torch.nn.functional as F

from baton.losses import gradient_attention_transfer, gradient_penalty, gradient_symmetry, input_gradient


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(gradient, other):
    sums = []
    for one, two in zip(gradient, other, strict=True):
        sums.append(sum((a - b) ** 2 for a, b in zip(one.flatten(), two.flatten(), strict=True)))
    return sum(sums) / len(sums)


def naive_flip(images):
    flipped = images.clone()
    for column in range(images.shape[3]):
        flipped[..., column] = images[..., images.shape[3] - 1 - column]
    return flipped


TERMS = {
    "transfer": (gradient_attention_transfer, naive),
    "symmetry": (gradient_symmetry, lambda one, other: naive(one, naive_flip(other))),
    "penalty": (lambda one, other: gradient_penalty(one), lambda one, other: naive(one, torch.zeros_like(one))),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms_equal_loops_with_gradients(name):
    term, reference = TERMS[name]
    one, other = draw(3, 2, 3, 5, seed=1).requires_grad_(), draw(3, 2, 3, 5, seed=2)
    torch.testing.assert_close(term(one, other), reference(one, other))
    assert torch.autograd.gradcheck(lambda x: term(x, other), one)
    assert torch.autograd.gradgradcheck(lambda x: term(x, other), one)


def sample_losses(images, weight, head, targets):
    """A smooth network of a convolution and a linear classifier."""
    pooled = torch.tanh(F.conv2d(images, weight, padding=1)).flatten(2).square().mean(2)
    return F.cross_entropy(pooled @ head, targets, reduction="none")


def test_the_gradient_is_each_samples_own():
    images, weight, head, targets = draw(3, 2, 5, 3), draw(4, 2, 3, 3, seed=1), draw(4, 3, seed=2), torch.arange(3)
    together = images.clone().requires_grad_()
    ours = input_gradient(sample_losses(together, weight, head, targets), together)
    assert ours.requires_grad
    for index in range(3):
        alone = images[index : index + 1].clone().requires_grad_()
        loss = sample_losses(alone, weight, head, targets[index : index + 1])
        single = input_gradient(loss, alone, differentiable=False)
        assert not single.requires_grad
        torch.testing.assert_close(single[0], ours[index])


@pytest.mark.parametrize("name", TERMS)
def test_the_second_backward_pass_is_right(name):
    """The derivative of a term with respect to the weights, through the gradient, against finite differences."""
    term, _ = TERMS[name]
    images, head, targets = draw(2, 2, 5, 3), draw(4, 3, seed=2), torch.tensor([0, 2])
    other = draw(2, 2, 5, 3, seed=3)

    def of_weights(weight, head):
        seen = images.clone().requires_grad_()
        gradient = input_gradient(sample_losses(seen, weight, head, targets), seen)
        if name != "symmetry":
            return term(gradient, other)
        flipped = images.flip(-1).requires_grad_()
        return term(gradient, input_gradient(sample_losses(flipped, weight, head, targets), flipped))

    weights = (draw(4, 2, 3, 3, seed=1).requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(of_weights, weights)
    assert torch.autograd.gradgradcheck(of_weights, weights, fast_mode=True)  # in a random direction


def test_a_network_that_ignores_left_and_right_is_symmetric():
    weight, head, targets = draw(4, 2, 3, 3, seed=1), draw(4, 3, seed=2), torch.tensor([0, 2])
    weight = (weight + weight.flip(-1)) / 2
    images = draw(2, 2, 5, 7).requires_grad_()
    flipped = images.detach().flip(-1).requires_grad_()
    pair = [input_gradient(sample_losses(x, weight, head, targets), x) for x in (images, flipped)]
    assert gradient_symmetry(*pair).item() == pytest.approx(0, abs=1e-24)
    assert gradient_penalty(pair[0]) > 1e-4


def test_values_of_fixed_gradients_stay_what_they_were():
    values = torch.arange(2 * 3 * 3 * 5, dtype=torch.float64)
    one, other = torch.sin(0.7 * values).view(2, 3, 3, 5), torch.cos(0.3 * values).view(2, 3, 3, 5)
    assert gradient_attention_transfer(one, other).item() == pytest.approx(42.868667, abs=1e-5)
    assert gradient_symmetry(one, other).item() == pytest.approx(42.973708, abs=1e-5)
    assert gradient_penalty(one).item() == pytest.approx(22.444026, abs=1e-5)
