"""Weights of terms: when they begin, where they end, and what is refused."""

import math

import pytest

from baton.distill.weights import Weights


def test_terms_begin_and_fade_as_scheduled():
    weights = Weights({"ce": 0.1, "kd": 4, "at": 1000, "hint": 0}, {"at": 3}, {"kd": 0.25, "at": 0})
    assert "at" in weights
    assert "hint" not in weights
    assert weights.now() == {"ce": 0.1, "kd": 4}
    assert weights.now(0, 10) == {"ce": 0.1, "kd": 4}
    assert weights.now(1.99, 10) == {"ce": 0.1, "kd": pytest.approx(4 * (1 - 0.75 * 0.199))}
    assert weights.now(2, 10) == {"ce": 0.1, "kd": pytest.approx(3.4), "at": 1000}
    assert weights.now(6, 10) == {"ce": 0.1, "kd": pytest.approx(2.2), "at": pytest.approx(500)}
    assert weights.now(10, 10) == {"ce": 0.1, "kd": pytest.approx(1), "at": 0}
    assert weights.now(12, 10) == weights.now(10, 10)  # a run that was lengthened and shortened again


def test_without_a_schedule_nothing_changes():
    weights = Weights({"ce": 1, "at": 5})
    assert weights.now() == weights.now(7.5, 8) == weights.now(3, math.inf) == {"ce": 1, "at": 5}
    weights.check_length(math.inf)


@pytest.mark.parametrize(
    ("given", "start", "final", "message"),
    [
        ({"ce": -1.0}, None, None, "ce_weight must be 0 .* but got -1"),
        ({"ce": math.nan}, None, None, "ce_weight must be 0 .* but got nan"),
        ({"ce": math.inf}, None, None, "ce_weight must be 0 .* but got inf"),
        ({"ce": 1}, None, {"ce": math.inf}, "0 or more, but got inf for 'ce'"),
        ({"ce": 0, "kd": 0}, None, None, r"All weights are 0: give one of model\.ce_weight, model\.kd_weight"),
        ({"ce": 1}, {"ce": 2}, None, "leaves nothing to learn in the first epoch"),
        ({"ce": 1, "hint": 1}, {"hnt": 2}, None, r"model\.start_epoch: there is no term 'hnt'; did you mean hint\?"),
        ({"ce": 1, "at": 1}, None, {"at_weight": 0}, r"model\.final: there is no term 'at_weight'; did you mean at\?"),
        ({"ce": 1, "at": 1}, None, {"zz": 0}, r"no term 'zz'; there are at, ce\."),
        ({"ce": 1, "at": 0}, None, {"at": 0}, r"schedules 'at', whose weight is 0: give model\.at_weight"),
        ({"ce": 1, "at": 1}, {"at": 0}, None, "counts epochs from 1, but got 0 for 'at'"),
        ({"ce": 1}, None, {"ce": -0.5}, "0 or more, but got -0.5 for 'ce'"),
    ],
)
def test_what_makes_no_sense_is_refused(given, start, final, message):
    with pytest.raises(ValueError, match=message):
        Weights(given, start, final)


def test_training_must_contain_its_schedule():
    with pytest.raises(ValueError, match="lets 'at' begin in epoch 60, but training ends after 40"):
        Weights({"ce": 1, "at": 1}, {"at": 60}).check_length(40)
    Weights({"ce": 1, "at": 1}, {"at": 60}).check_length(60)
    with pytest.raises(ValueError, match=r"needs to know when training ends: set trainer\.max_epochs"):
        Weights({"ce": 1}, None, {"ce": 0}).check_length(math.inf)
