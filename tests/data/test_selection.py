import pytest
import torch

from baton.data.selection import split_stratified, take_per_class


@pytest.mark.parametrize("counts", [[50, 50], [97, 31, 8, 1], [7] * 13, [1000, 3], [5], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_every_size_is_exact_and_every_class_keeps_its_share(counts, seed):
    targets = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(9))]
    total = len(targets)
    for size in {1, 2, total // 3, total // 2, total - 1} & set(range(1, total)):
        rest, taken = split_stratified(targets, size, seed=seed)
        assert len(taken) == size
        assert sorted(rest.tolist() + taken.tolist()) == list(range(total))
        assert taken.tolist() == sorted(taken.tolist())
        assert rest.tolist() == sorted(rest.tolist())
        shares = torch.tensor(counts) * size / total
        assert (targets[taken].bincount(minlength=len(counts)) - shares).abs().max() < 1


def test_a_fraction_is_a_share_of_all_samples():
    targets = torch.arange(200) % 10
    _, taken = split_stratified(targets, 0.1, seed=0)
    assert targets[taken].bincount().tolist() == [2] * 10


def test_unlabelled_samples_are_one_class():
    rest, taken = split_stratified(torch.full((10,), -1), 4, seed=0)
    assert (len(rest), len(taken)) == (6, 4)


def test_the_seed_decides_which_samples():
    targets = torch.arange(1000) % 10
    first, again, other = (split_stratified(targets, 100, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_every_sample_is_equally_likely_and_remainders_are_spread_over_classes():
    targets = torch.tensor([0] * 3 + [1] * 3 + [2] * 3)
    hits = torch.zeros(9)
    for seed in range(900):
        hits[split_stratified(targets, 4, seed=seed)[1]] += 1
    assert (hits - 400).abs().max() < 75  # standard deviation 15


@pytest.mark.parametrize("size", [0, 10, 11, -1, 0.01, 0.99])
def test_both_sides_need_a_sample(size):
    with pytest.raises(ValueError, match="between 1 and 9 of 10 samples"):
        split_stratified(torch.zeros(10, dtype=torch.long), size, seed=0)


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    split_stratified(torch.arange(100) % 3, 10, seed=0)
    take_per_class(torch.arange(100) % 3, 10, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_so_many_samples_of_each_class_without_the_unlabelled():
    targets = torch.tensor([0, 1, 2, -1, 5] * 20)
    kept = take_per_class(targets, 7, seed=0)
    assert targets[kept].bincount().tolist() == [7, 7, 7, 0, 0, 7]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept.tolist() == take_per_class(targets, 7, seed=0).tolist() != take_per_class(targets, 7, seed=1).tolist()


def test_few_labels_are_nested_in_more():
    targets = torch.arange(100) % 4
    assert set(take_per_class(targets, 5, seed=2).tolist()) < set(take_per_class(targets, 9, seed=2).tolist())


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(ValueError, match="asks for 3 samples, but class 1 has only 2"):
        take_per_class(torch.tensor([0, 0, 0, 1, 1]), 3, seed=0)
    with pytest.raises(ValueError, match="needs labelled samples"):
        take_per_class(torch.full((5,), -1), 3, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        take_per_class(torch.arange(5), 0, seed=0)
