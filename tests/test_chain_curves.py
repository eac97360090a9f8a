import csv
import math
import statistics

import pytest

from baton.chain_curves import average, collect_curves, draw, read_curves, write_curves
from baton.chain_table_file import Select, Style, Table
from baton.run import MetricsCSV

TABLE = Table(
    ("test/error",),
    {"from scratch": "scratch", "fine-tuned": "tuned", "probe": "probe"},
    Style("%", 100.0),
    curves=("val/error", "val/loss"),
)


def log(folder, rows):
    """A run's metrics.csv as a run writes it."""
    metrics = MetricsCSV(folder, None)
    for step, values in rows:
        metrics.log_metrics({**values, "epoch": 1}, step=step)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds of `scratch`, one of `tuned`, and a probe that logged nothing of what is drawn."""
    scratch = [
        (seed, log(tmp_path / f"scratch{seed}", [(10 * n, {"val/error": (1 + seed) / n}) for n in (1, 2, 3)]))
        for seed in (0, 1, 2)
    ]
    tuned = [(0, log(tmp_path / "tuned0", [(5, {"val/error": 0.5})]))]
    probe = [(0, log(tmp_path / "probe0", [(5, {"train/loss": 0.5})])), (1, tmp_path / "gone")]
    return {"scratch": scratch, "tuned": tuned, "probe": probe}


def test_rows_that_share_a_step_each_give_what_they_hold(tmp_path):
    rows = [
        (50, {"train/loss": 2.0}),
        (50, {"val/error": 0.9}),
        (100, {"train/loss": 1.0}),
        (100, {"val/error": math.nan}),
        (100, {"test/error": 0.3}),
    ]
    file = log(tmp_path, rows) / "metrics.csv"
    curves = read_curves(file, ["val/error", "train/loss", "val/loss"])
    assert curves["train/loss"] == {50: 2.0, 100: 1.0}
    assert (curves["val/error"][50], math.isnan(curves["val/error"][100]), len(curves["val/error"])) == (0.9, True, 2)
    assert curves["val/loss"] == {}


def test_what_baton_validate_appends_later_changes_no_curve(tmp_path):
    log(tmp_path, [(50, {"val/error": 0.9}), (100, {"val/error": 0.5})])
    MetricsCSV(tmp_path, 2**62, {"step": 50, "epoch": 1}).log_metrics({"val/error": 0.1}, step=0)
    assert (tmp_path / "metrics.csv").read_text().count("\n50,") == 2
    assert read_curves(tmp_path / "metrics.csv", ["val/error"]) == {"val/error": {50: 0.9, 100: 0.5}}


def test_mean_and_band_are_those_of_the_seeds_at_the_steps_all_of_them_have():
    cells = average({0: {10: 1.0, 20: 2.0, 30: 3.0}, 1: {20: 4.0, 30: 6.0, 40: 8.0}, 2: {20: 9.0, 25: 0.0, 30: 0.0}})
    assert list(cells) == [20, 30]
    assert cells[20].mean == statistics.mean([2.0, 4.0, 9.0])
    assert cells[30].std == statistics.stdev([3.0, 6.0, 0.0])
    assert average({}) == {}
    assert average({0: {1: 1.0}, 1: {2: 1.0}}) == {}


def test_curves_are_scaled_and_seeds_without_the_metric_left_out(runs):
    panels = collect_curves(TABLE, runs)
    assert panels["val/error"]["from scratch"][1] == {10: 200.0, 20: 100.0, 30: pytest.approx(200 / 3)}
    assert panels["val/error"]["probe"] == panels["val/loss"]["from scratch"] == {}
    assert list(panels) == list(TABLE.curves)


def test_csv_has_a_line_a_seed_and_step(runs, tmp_path):
    write_curves("demo", TABLE, runs, tmp_path)
    with (tmp_path / "curves.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["row", "stage", "seed", "metric", "step", "value"]
    assert lines[0] == ["from scratch", "scratch", "0", "val/error", "10", "100.0"]
    assert lines[-1] == ["fine-tuned", "tuned", "0", "val/error", "5", "50.0"]
    assert len(lines) == 3 * 3 + 1


class Recorded:
    """Keeps the figure instead of writing it."""

    def __call__(self, figure, path):
        self.axes = figure.axes

    def legend(self, panel=0):
        return [text.get_text() for text in self.axes[panel].get_legend().get_texts()]


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorded()
    monkeypatch.setattr("baton.chain_curves.save_figure", recorder)
    return recorder


def test_the_picture_draws_means_and_names_what_it_cannot_draw(runs, recorded, tmp_path):
    draw("demo", TABLE, collect_curves(TABLE, runs), tmp_path / "curves.png")
    drawn, empty = recorded.axes
    assert recorded.legend() == ["from scratch (n = 3)", "fine-tuned", "probe: no data"]
    scratch, tuned, nothing = drawn.lines
    assert scratch.get_xydata().tolist() == [[10, 200], [20, 100], [30, pytest.approx(200 / 3)]]
    assert tuned.get_xydata().tolist() == [[5, 50]]
    assert tuned.get_marker() == "o"  # a line of one point would be invisible
    assert len(nothing.get_xdata()) == 0
    (band,) = drawn.collections  # one seed has none
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == (pytest.approx(200 / 3 - 100 / 3), pytest.approx(200 + 100))
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("training step", "val/error (%)")
    assert [text.get_text() for text in empty.texts] == ["not logged"]
    assert list(empty.lines) == []


def test_rows_without_a_choice_or_a_common_step_say_so(tmp_path, recorded):
    apart = [(seed, log(tmp_path / str(seed), [(10 + seed, {"val/error": 0.5})])) for seed in (0, 1)]
    rows = {"apart": "apart", "open": ("a", "b"), "fine": "fine"}
    table = Table(("test/error",), rows, select=Select("val/error"), curves=("val/error",))
    panels = collect_curves(table, {"apart": apart, "a": apart, "b": apart, "fine": apart[:1]})
    draw("demo", table, panels, tmp_path / "curves.png")
    assert recorded.legend() == ["apart: no step that all seeds share", "open: not chosen yet", "fine"]


def test_more_rows_than_colours_stay_apart(runs, recorded, tmp_path):
    table = Table(("test/error",), {f"row {number}": "scratch" for number in range(25)}, curves=("val/error",))
    draw("demo", table, collect_curves(table, runs), tmp_path / "curves.png")
    assert len({(line.get_color(), line.get_linestyle()) for line in recorded.axes[0].lines}) == 25


def test_the_file_is_a_picture_with_ink(runs, tmp_path):
    write_curves("demo", TABLE, runs, tmp_path)
    from PIL import Image

    picture = Image.open(tmp_path / "curves.png")
    assert picture.format == "PNG"
    assert picture.convert("L").getextrema() == (0, 255)
    assert not list(tmp_path.glob(".curves*"))
