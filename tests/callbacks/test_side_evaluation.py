"""Side evaluations claim the naive answers, and to change nothing about the run they look at."""

import math

import pytest
import torch
import torch.nn.functional as F

from baton.callbacks import OnlineKNN, OnlineLinearProbe, Pictures
from baton.ssl_tasks import Denoising
from baton.supervised import Classification
from tiny import Arrays, fit, same, state

DROPOUT = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "drop_rate": 0.3}}


def naive_knn(bank, labels, queries, classes, k, temperature):
    predicted = []
    for query in queries.double():
        similar = [
            (float(query @ x / (query.norm() * x.norm())), int(y)) for x, y in zip(bank.double(), labels, strict=True)
        ]
        votes = [0.0] * classes
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        predicted.append(max(range(classes), key=votes.__getitem__))
    return torch.tensor(predicted)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5), (500, 1.0)])
def test_nearest_neighbours_vote_as_in_a_naive_loop(k, temperature):
    torch.manual_seed(k)
    bank, labels, queries = torch.randn(53, 9), torch.randint(4, (53,)), torch.randn(31, 9)
    ours = OnlineKNN(k, temperature).classify(bank, labels, queries, 4)
    assert torch.equal(ours, naive_knn(bank, labels, queries, 4, k, temperature))


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
def test_the_probe_is_the_optimum_of_logistic_regression(weight_decay, monkeypatch):
    torch.manual_seed(0)
    bank, labels = torch.randn(97, 6) * torch.tensor([1, 5, 0.1, 1, 2, 30.0]) + 3, torch.randint(3, (97,))
    solvers, original = [], torch.optim.LBFGS
    monkeypatch.setattr(torch.optim, "LBFGS", lambda *args, **kw: solvers.append(original(*args, **kw)) or solvers[0])
    ours = OnlineLinearProbe(weight_decay).classify(bank, labels, bank, 3)
    weight, bias = (parameter.detach().double() for parameter in solvers[0].param_groups[0]["params"])

    x = ((bank - bank.mean(0)) / bank.std(0)).double()
    truth = F.one_hot(labels, 3).double()
    error = (x @ weight + bias).softmax(1) - truth
    assert (x.T @ error / 97 + 2 * weight_decay * weight).abs().max() < 1e-3
    assert error.mean(0).abs().max() < 1e-3
    # Newton's iterations in float64 from zero, an independent way to the (only) optimum up to a shift of the biases.
    design = torch.cat([x, torch.ones(97, 1, dtype=torch.float64)], 1)
    theta = torch.zeros(7, 3, dtype=torch.float64)
    ridge = 2 * weight_decay * torch.ones(7, 1, dtype=torch.float64)
    ridge[-1] = 1e-9
    for _ in range(30):
        p = (design @ theta).softmax(1)
        gradient = design.T @ (p - truth) / 97 + ridge * theta
        curvature = torch.einsum("ni,nj,nc,cd->icjd", design, design, p, torch.eye(3, dtype=torch.float64))
        curvature -= torch.einsum("ni,nj,nc,nd->icjd", design, design, p, p)
        curvature = curvature.reshape(21, 21) / 97 + torch.diag(ridge.expand(7, 3).reshape(-1) + 1e-12)
        theta -= torch.linalg.solve(curvature, gradient.reshape(-1)).reshape(7, 3)
    assert torch.allclose(weight, theta[:6], atol=5e-3)
    assert torch.allclose(bias - bias.mean(), theta[6] - theta[6].mean(), atol=5e-3)
    assert (ours == (design @ theta).argmax(1)).double().mean() > 0.98


def test_the_probe_separates_separable_features():
    torch.manual_seed(0)
    centres = torch.randn(5, 20) * 3
    labels, targets = torch.arange(100) % 5, torch.arange(35) % 5
    bank, queries = centres[labels] + 0.1 * torch.randn(100, 20), centres[targets] + 0.1 * torch.randn(35, 20)
    constant = torch.ones(1, 1)  # a dead feature must not divide by zero
    bank, queries = torch.cat([bank, constant.expand(100, 1)], 1), torch.cat([queries, constant.expand(35, 1)], 1)
    assert torch.equal(OnlineLinearProbe().classify(bank, labels, queries, 5), targets)
    assert torch.equal(OnlineKNN().classify(bank, labels, queries, 5), targets)


@pytest.mark.parametrize("cls", [Denoising, Classification])
def test_a_run_is_bit_identical_with_and_without_being_looked_at(cls, tmp_path):
    def run(*callbacks):
        torch.manual_seed(0)
        task = cls(**DROPOUT)
        rows = fit(task, Arrays(24, val=11, crop_padding=2, flip=True), 3, callbacks=list(callbacks))
        kept = [(step, row) for step, row in rows.rows if not any("knn" in name or "probe" in name for name in row)]
        return state(task), kept, rows, torch.rand(1)

    plain = run()
    watched = run(OnlineKNN(), OnlineLinearProbe(), Pictures(folder=str(tmp_path)))
    assert same(plain[0], watched[0])
    assert plain[1] == watched[1]
    assert torch.equal(plain[3], watched[3])
    assert len(watched[2].column("val/knn_accuracy")) == len(watched[2].column("val/linear_probe_accuracy")) == 3


def features_of(task, dataset):
    task.eval()
    images, targets = dataset.__getitems__(range(len(dataset)))
    with torch.no_grad():
        return task.features(images.float() / 255), targets


def test_the_logged_accuracy_is_of_the_backbones_features():
    torch.manual_seed(0)
    task, data = Denoising(**DROPOUT), Arrays(24, val=11)
    rows = fit(task, data, 2, callbacks=[OnlineKNN(k=5, every_n_epochs=2)])
    bank, labels = features_of(task, data.train_set)
    queries, targets = features_of(task, data.val_set)
    expected = (naive_knn(bank, labels, queries, 3, 5, 0.07) == targets).double().mean().item()
    assert rows.column("val/knn_accuracy") == [pytest.approx(expected)]


class Sorted(Arrays):
    """Sorted by class, as a folder of class folders is; the first eight training images have no label."""

    def sources(self):
        train, val, test = super().sources()
        train.targets, order = train.targets.sort()
        train.images = train.images[order]
        train.targets[:8] = -1
        return train, val, test


@pytest.mark.parametrize("bank", [6, 9, 100])
def test_the_bank_is_spread_over_the_labelled_images(bank):
    seen = []

    class Watch(OnlineKNN):
        def classify(self, bank, labels, queries, classes):
            seen.append(labels)
            return super().classify(bank, labels, queries, classes)

    fit(Denoising(**DROPOUT), Sorted(45, val=9), callbacks=[Watch(bank=bank)])
    assert len(seen[0]) == min(bank, 37)
    counts = torch.bincount(seen[0], minlength=3).double() / len(seen[0])
    assert torch.allclose(counts, torch.tensor([7, 15, 15]).double() / 37, atol=1 / len(seen[0]))


def test_nothing_is_scored_without_labels_or_validation():
    for data in (Arrays(16), Arrays(16, val=8, num_classes=0)):
        rows = fit(Denoising(**DROPOUT), data, callbacks=[OnlineKNN(), OnlineLinearProbe()])
        assert not rows.column("val/knn_accuracy")
        assert rows.column("train/loss")
