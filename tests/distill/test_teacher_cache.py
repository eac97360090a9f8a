"""A teacher is asked about every image once, and what it said comes back as it was."""

import copy
from types import SimpleNamespace

import pytest
import torch

from baton.distill.teacher_cache import TeacherCache


class Data:
    """A data module that knows the indices of its batch, and nothing else."""

    def __init__(self, count=6, augmentation=""):
        self.train_set, self.varies, self.batch_indices, self.tells_indices = range(count), augmentation, None, False

    def augmentation(self):
        return self.varies


def asker(log, indices):
    """A teacher whose answers about an image are its number."""

    def ask(which):
        numbers = torch.tensor(indices)[which]
        log.append(numbers.tolist())
        maps = numbers[:, None, None].expand(-1, 2, 3).to(torch.bfloat16)
        return {"kd": [numbers[:, None].float() + 0.1], "at": [maps, 10 * maps.double()]}

    return ask


def test_every_image_is_asked_about_once():
    data, log = Data(), []
    cache = TeacherCache(data)
    assert data.tells_indices
    for indices in ([4, 1], [1, 0, 4], [5, 5], [0, 5, 1, 4]):
        data.batch_indices = torch.tensor(indices)
        answers = cache.recall(asker(log, indices), "cpu")
        expected = asker([], indices)(torch.arange(len(indices)))
        assert answers.keys() == expected.keys()
        for name, tensors in expected.items():
            for ours, theirs in zip(answers[name], tensors, strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
    assert log == [[4, 1], [0], [5, 5]]


def test_answers_keep_no_graph():
    data = Data()
    cache, data.batch_indices = TeacherCache(data), torch.tensor([2, 3])
    scores = torch.ones(2, 3, requires_grad=True) * 2
    assert not cache.recall(lambda which: {"kd": [scores]}, "cpu")["kd"][0].requires_grad


def test_it_says_what_it_takes_and_copies_share_it(capsys):
    data = Data(1000)
    cache, data.batch_indices = TeacherCache(data), torch.tensor([7])
    cache.recall(asker([], [7]), "cpu")
    # one float, six halves, six doubles
    assert "teacher: its answers are kept, 64 bytes an image, 0.00 GB for 1,000 images" in capsys.readouterr().out
    assert copy.deepcopy(SimpleNamespace(cache=cache)).cache is cache


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="needs to know which images it sees: train with a data module"):
        TeacherCache(None)
    with pytest.raises(ValueError, match="needs the same images in every epoch, but the wind would vary them"):
        TeacherCache(Data(augmentation="the wind"))
    data = Data(10**6)
    cache, data.batch_indices = TeacherCache(data), torch.tensor([0])
    large = torch.zeros(1, 1).expand(1, 10**10)
    with pytest.raises(ValueError, match=r"keeps 40,000,000,000 bytes an image, .* do not fit into memory: leave it"):
        cache.recall(lambda which: {"hint": [large]}, "cpu")
