import csv
import math

import pytest

from baton.chain_lines import collect_lines, draw, write_lines
from baton.chain_table_file import Lines, Style, Table

LINES = Lines(
    "labels a class",
    {"fine-tuned": {1: "tuned_1", 2.5: "tuned_2", 64: "tuned_64"}, "from scratch": {1: "scratch_1", 16: "scratch_16"}},
    log=True,
)
TABLE = Table(("test/accuracy", "test/loss"), {"fine-tuned": "tuned_64"}, Style("%", 100.0), lines=LINES)


def seeds(*values):
    """A stage's runs with these accuracies; None has not finished."""
    return [(seed, None if value is None else {"test/accuracy": value}) for seed, value in enumerate(values)]


RUNS = {
    "tuned_1": seeds(0.25, 0.5, 0.75),
    "tuned_2": seeds(0.5, None, 0.75),
    "tuned_64": seeds(None, None, None),
    "scratch_1": seeds(0.125),
    "scratch_16": seeds(None, 0.375),
}


def test_csv_has_a_line_a_finished_seed_with_the_scaled_value(tmp_path):
    write_lines("demo", TABLE, RUNS, tmp_path)
    with (tmp_path / "lines.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["row", "x", "stage", "seed", "metric", "unit", "value"],
            ["fine-tuned", "1", "tuned_1", "0", "test/accuracy", "%", "25.0"],
            ["fine-tuned", "1", "tuned_1", "1", "test/accuracy", "%", "50.0"],
            ["fine-tuned", "1", "tuned_1", "2", "test/accuracy", "%", "75.0"],
            ["fine-tuned", "2.5", "tuned_2", "0", "test/accuracy", "%", "50.0"],
            ["fine-tuned", "2.5", "tuned_2", "2", "test/accuracy", "%", "75.0"],
            ["from scratch", "1", "scratch_1", "0", "test/accuracy", "%", "12.5"],
            ["from scratch", "16", "scratch_16", "1", "test/accuracy", "%", "37.5"],
        ]


def test_a_point_is_the_finished_seeds_of_its_stage():
    panels = collect_lines(TABLE, LINES, RUNS)
    assert panels["test/loss"] == {"fine-tuned": {}, "from scratch": {}}
    tuned, scratch = panels["test/accuracy"].values()
    assert {x: (cell.mean, cell.n, cell.expected) for x, cell in tuned.items()} == {1: (50.0, 3, 3), 2.5: (62.5, 2, 3)}
    assert (tuned[1].std, tuned[2.5].std) == (25.0, pytest.approx(25 / math.sqrt(2)))
    assert {x: (cell.mean, cell.n) for x, cell in scratch.items()} == {1: (12.5, 1), 16: (37.5, 1)}
    assert math.isnan(scratch[1].std)


@pytest.fixture
def axes(monkeypatch, tmp_path):
    """Draws instead of writing and gives the panels."""
    figures = []
    monkeypatch.setattr("baton.chain_lines.save_figure", lambda figure, path: figures.append(figure))

    def of(runs, lines=LINES):
        draw("demo", TABLE, lines, collect_lines(TABLE, lines, runs), tmp_path / "lines.png")
        return figures[-1].axes

    return of


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def points(axis, label):
    (line,) = (line for line in axis.lines if line.get_label().startswith(label))
    return line.get_xydata().tolist()


def test_the_picture_draws_means_with_bars_and_says_what_is_missing(axes):
    drawn, empty = axes({**RUNS, "scratch_1": seeds(None), "scratch_16": seeds(None)})
    assert legend(drawn) == ["fine-tuned (n = 2–3)", "from scratch: no data yet"]
    assert points(drawn, "fine-tuned") == [[1, 50], [2.5, 62.5]]
    (bars,) = drawn.collections
    first, second = (segment[:, 1].tolist() for segment in bars.get_segments())
    assert first == [25, 75]
    assert second == pytest.approx([62.5 - 25 / math.sqrt(2), 62.5 + 25 / math.sqrt(2)])
    assert (drawn.get_xlabel(), drawn.get_ylabel()) == ("labels a class", "test/accuracy (%)")
    assert [text.get_text() for text in empty.texts] == ["no data yet"]
    assert (list(empty.lines), empty.get_legend()) == ([], None)


def test_a_single_seed_is_a_point_without_a_bar(axes):
    drawn, _ = axes(RUNS)
    assert legend(drawn) == ["fine-tuned (n = 2–3)", "from scratch (n = 1)"]
    assert points(drawn, "from scratch") == [[1, 12.5], [16, 37.5]]
    assert [segment.size for segment in drawn.collections[1].get_segments()] == [0, 0]


@pytest.mark.parametrize("log", [False, True])
def test_the_ticks_are_the_given_numbers_and_all_of_them_are_in_sight(axes, log):
    drawn, _ = axes(RUNS, Lines("labels a class", LINES.rows, log))
    assert drawn.get_xscale() == ("log" if log else "linear")
    assert drawn.get_xticks().tolist() == [1, 2.5, 16, 64]
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["1", "2.5", "16", "64"]
    assert drawn.get_xticks(minor=True).tolist() == []
    left, right = drawn.get_xlim()
    assert left < 1
    assert right > 64  # nothing is drawn there yet
    if log:
        assert drawn.xaxis.get_transform().base == 2


def test_more_rows_than_colours_stay_apart(axes):
    rows = {f"row {number}": {1: "tuned_1"} for number in range(25)}
    drawn, _ = axes(RUNS, Lines("labels", rows))
    seen = {(line.get_color(), line.get_linestyle()) for line in drawn.lines if line.get_label().startswith("row")}
    assert len(seen) == 25


@pytest.mark.parametrize("values", [(0.25, 0.5, None), (None,), (math.nan, 0.5)])
@pytest.mark.filterwarnings("error")
def test_the_file_is_a_picture_with_ink(values, tmp_path):
    write_lines("demo", TABLE, {stage: seeds(*values) for stage in RUNS}, tmp_path)
    from PIL import Image

    picture = Image.open(tmp_path / "lines.png")
    assert picture.format == "PNG"
    assert picture.width > 600
    assert picture.convert("L").getextrema() == (0, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.csv", "lines.png"]
