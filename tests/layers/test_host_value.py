"""The host's copy of a few numbers."""

import copy
import pickle

import torch

from baton.layers.host_value import HostValue


def test_on_the_cpu_it_is_always_exact():
    tensor, value = torch.tensor([1.0, 2.0], requires_grad=True), HostValue([0.0, 0.0])
    assert value.follow(tensor) == [1, 2]
    with torch.no_grad():
        tensor += 1
    assert value.follow(tensor) == value.values == [2, 3]


def test_tensors_without_values_leave_it():
    value = HostValue([0.5])
    assert value.follow(torch.empty(1, device="meta")) == value.look(torch.empty(1, device="meta")) == [0.5]


def test_copies_and_pickles_keep_the_values_alone():
    value = HostValue([0.5])
    value._copy = object()
    for other in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other.values == [0.5]
        assert other._copy is None
        other.values[0] = 2.0
    assert value.values == [0.5]


def test_compiled_graphs_do_not_look(monkeypatch):
    value = HostValue([0.5])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert value.follow(torch.tensor([4.0])) == [0.5]
