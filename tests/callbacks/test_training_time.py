"""The minutes of training are a metric, and a resumed run goes on counting."""

import pytest
import torch
from lightning.pytorch.callbacks import timer

from baton.callbacks import TrainingTime
from baton.supervised import Classification
from tiny import WRN, Arrays, fit, same, state


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test lets them."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    return clock


def train(callbacks, epochs=2, **kwargs):
    torch.manual_seed(0)
    task = Classification(**WRN)
    return task, fit(task, Arrays(12, batch_size=4), epochs, callbacks=callbacks, **kwargs)


class Slow(TrainingTime):
    """Every batch takes six seconds."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    @property
    def state_key(self):
        return "TrainingTime"

    def on_train_batch_end(self, *args, **kwargs):
        self.clock.now += 6


def test_minutes_are_recorded_every_epoch(clock):
    task, logged = train([Slow(clock)])
    assert logged.column("train/minutes") == pytest.approx([0.3, 0.6])
    assert task.latest["train/minutes"] == pytest.approx(0.6)


def test_a_resumed_run_goes_on_counting(clock):
    first = Slow(clock)
    train([first], 1)
    saved = first.state_dict()
    clock.now += 3600
    second = Slow(clock)
    second.load_state_dict(saved)
    _, logged = train([second], 1)
    assert logged.column("train/minutes") == pytest.approx([0.6])


def test_it_changes_nothing():
    assert same(state(train([TrainingTime()])[0]), state(train([])[0]))
