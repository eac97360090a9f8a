import csv
import math
import statistics
import struct
import sys
import types

import pytest
from rich.console import Console

from baton.chain_table import (
    Cell,
    collect,
    commit,
    draw,
    log_to_wandb,
    machine,
    markdown,
    print_table,
    provenance_line,
    write_table,
)
from baton.chain_table_file import Lines, Sheet, Style, Table

TABLE = Table(("test/error", "test/loss"), {"from scratch": "scratch", "fine-tuned": "tuned"}, Style("%", 100.0, 2))
ERRORS = {0: 0.5, 1: 0.4375, 2: 0.53125}


def runs(last=0.25):
    scratch = [(seed, {"test/error": value, "test/loss": value * 2}) for seed, value in ERRORS.items()]
    return {"scratch": scratch, "tuned": [(0, {"test/error": 0.125, "test/loss": last}), (1, None), (2, None)]}


def test_mean_and_sample_deviation_are_those_of_statistics():
    cell = collect(TABLE, runs())["from scratch"]["test/error"]
    values = [100 * value for value in ERRORS.values()]
    assert cell.mean == pytest.approx(statistics.mean(values), rel=1e-15)
    assert cell.std == pytest.approx(statistics.stdev(values), rel=1e-15)
    assert cell.std == pytest.approx(math.sqrt(sum((v - cell.mean) ** 2 for v in values) / 2))
    assert cell.text(2) == "48.96 ± 4.77"
    assert (cell.n, cell.seeds_text()) == (3, "3")


def test_cells_without_enough_seeds_claim_no_deviation():
    one = collect(TABLE, runs())["fine-tuned"]["test/error"]
    assert (one.text(1), one.seeds_text()) == ("12.5", "1 of 3 seeds")
    assert math.isnan(one.std)
    none = Cell({}, 2)
    assert (none.text(2), none.seeds_text()) == ("–", "0 of 2 seeds")


def test_a_metric_that_was_nan_stays_nan():
    cell = collect(TABLE, runs(last=None))["fine-tuned"]["test/loss"]  # JSON writes NaN as null
    assert math.isnan(cell.mean)
    assert cell.n == 1
    assert Cell({0: 1.0, 1: math.nan}, 2).text(2) == "nan"


def test_markdown():
    text = markdown("demo", TABLE, collect(TABLE, runs()), "Provenance.")
    assert text.splitlines() == [
        "# demo",
        "",
        "Provenance.",
        "",
        "|  | test/error (%) | test/loss (%) | n |",
        "| --- | ---: | ---: | ---: |",
        "| from scratch | 48.96 ± 4.77 | 97.92 ± 9.55 | 3 |",
        "| fine-tuned | 12.50 | 25.00 | 1 of 3 seeds |",
    ]
    piped = Table(("m",), {"a|b": "scratch"})
    assert "| a\\|b | – | 0 of 3 seeds |" in markdown("x", piped, collect(piped, runs()), "")


def test_a_row_without_a_choice_says_how_many_runs_are_done(tmp_path):
    table = Table(("test/error",), {"best": ("scratch", "tuned"), "scratch": "scratch"}, Style("%", 100.0))
    results = collect(table, runs())
    text = markdown("demo", table, results, "P.", ["A note.", "Another."])
    assert text.splitlines()[-6:] == [
        "| best | – | 4 of 6 runs |",
        "| scratch | 48.96 ± 4.77 | 3 |",
        "",
        "A note.",
        "",
        "Another.",
    ]
    write_table("demo", table, results, "P.", tmp_path, ["A note."])
    assert (tmp_path / "table.md").read_text().endswith("| 3 |\n\nA note.\n")
    assert "best" not in (tmp_path / "results.csv").read_text()
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "best,test/error,%,,,0,3"


def test_written_files_hold_the_numbers(tmp_path):
    results = collect(TABLE, runs())
    write_table("demo", TABLE, results, "P.", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "table.csv", "table.md", "table.png"]
    with (tmp_path / "results.csv").open() as file:
        single = [(row["row"], row["stage"], int(row["seed"]), float(row["value"]))
                  for row in csv.DictReader(file) if row["metric"] == "test/error"]  # fmt: skip
    expected = [("from scratch", "scratch", seed, 100 * value) for seed, value in ERRORS.items()]
    assert single == [*expected, ("fine-tuned", "tuned", 0, 12.5)]
    with (tmp_path / "table.csv").open() as file:
        first, _, third, _ = csv.DictReader(file)
    assert float(first["std"]) == statistics.stdev(100 * value for value in ERRORS.values())
    assert (third["row"], third["mean"], third["std"], third["n"], third["seeds"]) == (
        "fine-tuned",
        "12.5",
        "",
        "1",
        "3",
    )


def test_each_metric_is_written_in_its_own_style(tmp_path):
    styles = {"test/loss": Style("nat", 1.0, 1)}
    table = Table(TABLE.metrics, {"from scratch": "scratch"}, TABLE.style, styles)
    results = collect(table, runs())
    text = markdown("demo", table, results, "P.")
    assert "|  | test/error (%) | test/loss (nat) | n |" in text
    assert "| from scratch | 48.96 ± 4.77 | 1.0 ± 0.1 | 3 |" in text
    write_table("demo", table, results, "P.", tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert {(row["metric"], row["unit"]) for row in csv.DictReader(file)} == {
            ("test/error", "%"),
            ("test/loss", "nat"),
        }


def test_plot_is_a_picture_of_sensible_size_with_ink(tmp_path):
    draw("demo", TABLE, collect(TABLE, runs(last=None)), tmp_path / "table.png")  # a NaN does not stop it
    data = (tmp_path / "table.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 600 <= width <= 4000
    assert 250 <= height <= 2000
    from PIL import Image

    shades = Image.open(tmp_path / "table.png").convert("L").getextrema()
    assert shades == (0, 255)


@pytest.mark.parametrize("curves", [(), ("val/error",)])
@pytest.mark.parametrize("lines", [None, Lines("labels", {"scratch": {1: "scratch"}})])
@pytest.mark.parametrize("pictures", [None, Sheet("colors", 0, {"scratch": "scratch"})])
def test_the_pictures_go_to_wandb(tmp_path, monkeypatch, curves, lines, pictures):
    """Curves, lines and pictures only where the table asks for them: a picture of an earlier table may lie there."""
    logged = {}

    class FakeRun:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        log = staticmethod(logged.update)

    fake = types.ModuleType("wandb")
    fake.__dict__.update(login=lambda prompt: True, init=lambda **_: FakeRun(), Table=dict, Image=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "none")
    for picture in ("table.png", "curves.png", "lines.png", "pictures.png"):
        (tmp_path / picture).touch()
    table = Table(("test/error",), {"scratch": "scratch"}, curves=curves, lines=lines, pictures=pictures)
    log_to_wandb("demo", table, collect(table, runs()), tmp_path)
    assert logged.pop("table")["data"] == [["scratch", "0.49 ± 0.05", "3"]]
    expected = {"plot": "table.png"} | ({"curves": "curves.png"} if curves else {})
    expected |= {"lines": "lines.png"} if lines else {}
    expected |= {"pictures": "pictures.png"} if pictures else {}
    assert logged == {key: str(tmp_path / picture) for key, picture in expected.items()}


def test_printed_table_holds_every_row():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    print_table(TABLE, collect(TABLE, runs()), console)
    text = console.export_text()
    assert "48.96 ± 4.77" in text
    assert "1 of 3 seeds" in text


def test_provenance_says_which_value_is_shown():
    same = {"commit": "abc", "hardware": "H100 x 8"}
    line = provenance_line([0, 2], [same, same, {}])
    assert "no best epoch is picked" in line
    assert "; seeds 0, 2; commit abc; on H100 x 8; 2" in line
    assert "of the best epoch by validation, mean" in provenance_line([0], [{"options": {"run.keep": "best"}}])


def test_machine_and_commit_are_single_lines():
    assert "\n" not in machine()
    assert machine()
    assert commit() != "unknown"
