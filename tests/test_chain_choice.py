import math

import pytest

from baton.chain_choice import choose
from baton.chain_table_file import Select, Style, Table

ROWS = {"scratch": "scratch", "tuned": ("a", "b", "c")}


def table(mode="min", **changes):
    return Table(
        ("test/error",), ROWS, **{"style": Style(scale=100.0, digits=1), "select": Select("val/x", mode), **changes}
    )


def runs(a, b, c):
    """Runs with these validation values, the test error telling the opposite; None has not finished."""
    of = {"a": a, "b": b, "c": c, "scratch": (0.0, 0.0)}
    return {
        stage: [
            (seed, None if value is None else {"val/x": recorded(value), "test/error": -recorded(value or 0.0)})
            for seed, value in enumerate(values)
        ]
        for stage, values in of.items()
    }


def recorded(value):
    return 0.0 if math.isnan(value) else value


def with_nan(found, *stages):
    """JSON writes NaN as null; one seed of it makes the mean NaN."""
    for stage in stages:
        found[stage][-1][1]["val/x"] = None
    return found


@pytest.mark.parametrize(("mode", "best"), [("min", "b"), ("max", "a")])
def test_the_best_mean_over_the_seeds_is_chosen(mode, best):
    """Not the best single seed (c holds both extremes), and the test metric, here reversed, takes no part."""
    found = choose(table(mode), runs(a=(0.5, 0.7), b=(0.3, 0.5), c=(0.0, 1.0)))
    assert found.table.rows == {"scratch": "scratch", "tuned": best}
    assert found.notes == (f"tuned: {best}, chosen of 3 by val/x (60.0, 40.0, 50.0)",)
    assert not found.lacks_metric


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_ones_the_first_is_chosen(mode):
    assert choose(table(mode), runs(a=(0.5,), b=(0.5,), c=(0.5,))).table.rows["tuned"] == "a"


@pytest.mark.parametrize("scale", [-1.0, 1e-3])
def test_the_scale_is_for_showing_only(scale):
    assert choose(table(style=Style(scale=scale)), runs(a=(0.5,), b=(0.25,), c=(0.75,))).table.rows["tuned"] == "b"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_chosen_only_if_there_is_nothing_else(mode):
    values = {"a": (0.5, 0.5), "b": (0.5, 0.5), "c": (0.5, 0.5)}
    found = choose(table(mode), with_nan(runs(**values), "a", "b"))
    assert found.notes == ("tuned: c, chosen of 3 by val/x (nan, nan, 50.0)",)
    assert choose(table(mode), with_nan(runs(**values), "a", "b", "c")).table.rows["tuned"] == "a"


def test_nothing_is_chosen_before_every_run_has_finished():
    found = choose(table(), runs(a=(0.5, 0.5), b=(0.1, 0.1), c=(0.9, None)))
    assert found.table.rows == ROWS
    assert found.notes == ()
    assert not found.lacks_metric


def test_a_run_without_the_metric_is_named_as_soon_as_it_has_finished():
    found = runs(a=(0.5, None), b=(0.5, 0.5), c=(None, None))
    del found["b"][1][1]["val/x"]
    choice = choose(table(), found)
    assert choice.table.rows == ROWS
    assert choice.notes == (
        "tuned: nothing is chosen, for b with seed 1 has no metric 'val/x'; it has test/error: "
        "correct table.select and call again.",
    )
    assert choice.lacks_metric


def test_a_table_without_candidates_stays_as_it_is():
    plain = Table(("test/error",), {"scratch": "scratch"})
    choice = choose(plain, runs(a=(0.5,), b=(0.5,), c=(0.5,)))
    assert (choice.table, choice.notes, choice.lacks_metric) == (plain, (), False)
