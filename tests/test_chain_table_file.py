import re

import pytest
import yaml

from baton.chain_table_file import Lines, Select, Sheet, Style, read_table

SEEDS = {"teacher": (7,), "pretrain": (0, 1), "finetune": (0, 1), "probe": (1, 0)}


def read(text: str, seeds=SEEDS):
    """Read a table written as YAML; ``metric`` may be left out."""
    return read_table({"metric": "test/error", **yaml.safe_load(text)}, "chain.yaml: table", seeds)


def test_every_stage_is_a_row_unless_there_are_rows():
    table = read("{}")
    assert table.rows == {name: name for name in SEEDS}
    assert (table.metrics, table.style, table.own_styles) == (("test/error",), Style(), {})
    assert (table.select, table.curves, table.lines, table.pictures) == (None, (), None, None)
    table = read("{metric: [a, b], unit: '%', scale: 100, digits: 1, rows: {2: finetune}}")
    assert (table.metrics, table.style, table.own_styles) == (("a", "b"), Style("%", 100.0, 1), {})
    assert table.rows == {"2": "finetune"}


def test_metrics_of_their_own_style():
    table = read(
        "{metric: {test/error: {unit: '%', scale: 100}, train/minutes: {digits: 1}, loss: }, unit: x, digits: 3}"
    )
    assert table.metrics == ("test/error", "train/minutes", "loss")
    styles = [table.style_of(name) for name in (*table.metrics, "another")]
    assert styles == [Style("%", 100.0, 3), Style("x", 1.0, 1), Style("x", 1.0, 3), Style("x", 1.0, 3)]


def test_candidates_and_curves():
    rows = "rows: {one: teacher, 2: [finetune, pretrain, probe], of one: [pretrain]}"
    table = read(f"{{{rows}, select: val/error}}")
    assert table.rows == {"one": "teacher", "2": ("finetune", "pretrain", "probe"), "of one": ("pretrain",)}
    assert table.stages == ("teacher", "finetune", "pretrain", "probe", "pretrain")
    assert (table.select, table.curves) == (Select("val/error", "min"), ())
    table = read(f"{{{rows}, select: {{metric: val/accuracy, mode: max}}, curves: [a, b]}}")
    assert (table.select, table.curves) == (Select("val/accuracy", "max"), ("a", "b"))
    assert read("curves: val/error").curves == ("val/error",)


def test_lines():
    text = """
      rows: {tuned: finetune}
      lines:
        x: labels a class
        rows:
          tuned: {64: finetune, 0.5: pretrain}
          3: {0: teacher, -2: finetune}
    """
    table = read(text)
    expected = {"tuned": {0.5: "pretrain", 64: "finetune"}, "3": {-2: "finetune", 0: "teacher"}}
    assert table.lines == Lines("labels a class", expected, log=False)
    assert [list(row) for row in table.lines.rows.values()] == [[0.5, 64], [-2, 0]]
    assert table.lines.numbers == (-2, 0, 0.5, 64)
    assert table.stages == ("finetune", "pretrain", "finetune", "finetune", "teacher")
    table = read("lines: {x: a, log: true, rows: {tuned: {1: finetune}}}")
    assert table.lines == Lines("a", {"tuned": {1: "finetune"}}, log=True)
    assert table.rows == {name: name for name in SEEDS}


def test_pictures():
    text = "{rows: {tuned: finetune}, pictures: {name: colors, seed: 7, rows: {2: probe, b: teacher, a: teacher}}}"
    table = read(text, {**SEEDS, "probe": (1, 7)})
    assert table.pictures == Sheet("colors", 7, {"2": "probe", "b": "teacher", "a": "teacher"})
    assert list(table.pictures.rows) == ["2", "b", "a"]  # as in the file
    assert table.stages == ("finetune",)  # the stages of pictures need not log the table's metrics


def test_the_pictures_are_of_the_first_seed_that_all_stages_have_unless_one_is_given():
    def seed(rows, own="", seeds=SEEDS):
        return read(f"pictures: {{name: colors, rows: {rows}{own}}}", seeds).pictures.seed

    assert seed("{a: pretrain, b: finetune}") == 0
    assert seed("{a: pretrain, b: finetune}", ", seed: 1") == 1
    assert seed("{a: probe, b: finetune}") == 1
    assert seed("{a: x, b: y, c: z}", seeds={"x": (3, 0, 2, 1), "y": (1, 2), "z": (0, 1, 2)}) == 2


def lines(rows: str, log: str = "false") -> str:
    return f"lines: {{x: labels, log: {log}, rows: {rows}}}"


def pictures(rows: str, seed: str = "0") -> str:
    return f"pictures: {{name: colors, seed: {seed}, rows: {rows}}}"


BAD = {
    "unknown key": ("metrics: x", "table: unknown key 'metrics' (did you mean 'metric'?); known are metric, unit,"),
    "no metric": ("metric:", "table.metric must be a metric's name such as test/error, or a list, not empty"),
    "scale": ("scale: 100 %", "table.scale must be a number other than 0, not '100 %'"),
    "digits": ("digits: 1.5", "table.digits must be a whole number from 0 to 10, not 1.5"),
    "style": ("metric: {a: 3}", "table.metric.a must be a mapping such as '{unit: \"%\", scale: 100}', not 3"),
    "style's key": (
        "metric: {a: {digit: 1}}",
        "table.metric.a: unknown key 'digit' (did you mean 'digits'?); known are",
    ),
    "style's scale": ("metric: {a: {scale: 0}}", "table.metric.a.scale must be a number other than 0, not 0"),
    "no metrics": ("metric: {}", "table.metric must be a metric's name such as test/error, or a list, not a list"),
    "curves": ("curves: []", "table.curves must be a metric's name such as val/error, or a list, not a list"),
    "no rows": ("rows: {}", "table.rows must map labels to stages ('from scratch: scratch'), not be empty"),
    "row": (
        "rows: {x: finetuen}",
        "table.rows: 'x' names the stage 'finetuen', which does not exist (did you mean 'fin",
    ),
    "row is a mapping": ("rows: {x: {finetune: 1}}", "names the stage {'finetune': 1}, which does not exist"),
    "candidate": (
        "{rows: {x: [pretrain, finetuen]}, select: m}",
        "names the stage 'finetuen', which does not exist (did you mean",
    ),
    "candidate twice": (
        "{rows: {x: [pretrain, pretrain]}, select: m}",
        "'x' names the stage 'pretrain' twice; list each candidate once",
    ),
    "no candidates": ("{rows: {x: []}, select: m}", "table.rows: 'x' lists no stage to choose from"),
    "candidates' seeds": (
        "{rows: {x: [pretrain, teacher]}, select: m}",
        "the candidates of 'x' must have the same seeds, but 'pretrain' has 0, 1 and 'teacher' has 7",
    ),
    "no select": ("rows: {x: [pretrain]}", "table.rows: 'x' lists stages to choose from, but no select says how"),
    "nothing to select": ("select: val/error", "table.select is given, but no row lists stages"),
    "select": (
        "{rows: {x: [pretrain]}, select: [val/error]}",
        "table.select must be a metric's name such as val/error, or",
    ),
    "select key": (
        "{rows: {x: [pretrain]}, select: {metrc: m}}",
        "table.select: unknown key 'metrc' (did you mean 'metric'?)",
    ),
    "select metric": ("{rows: {x: [pretrain]}, select: {mode: min}}", "table.select.metric must be a metric's name"),
    "select mode": (
        "{rows: {x: [pretrain]}, select: {metric: m, mode: top}}",
        "table.select.mode must be min or max, not 'top'",
    ),
    "lines": (
        "lines: [labels]",
        "table.lines must be a mapping with at least 'x: NAME' and 'rows: …', not a list",
    ),
    "lines' key": ("lines: {x: a, logs: true}", "table.lines: unknown key 'logs' (did you mean 'log'?); known are x,"),
    "no x": (
        "lines: {rows: {a: {1: probe}}}",
        "table.lines.x must name the axis, such as 'labels a class', not be emp",
    ),
    "x": (
        "lines: {x: 3, rows: {a: {1: probe}}}",
        "table.lines.x must name the axis, such as 'labels a class', not be 3",
    ),
    "log": (lines("{a: {1: probe}}", log="2"), "table.lines.log must be true or false, not 2"),
    "log is empty": (lines("{a: {1: probe}}", log=""), "table.lines.log must be true or false, not empty"),
    "lines without rows": (
        "lines: {x: a}",
        "table.lines.rows must map labels to points ('from scratch: {1: scratch}'), not be empty",
    ),
    "lines' rows are empty": (lines("{}"), "table.lines.rows must map labels to points"),
    "lines' rows are a list": (lines("[a]"), "{1: scratch}'), not be a list"),
    "line is a stage": (
        lines("{a: probe}"),
        "table.lines.rows: 'a' must map numbers to stages ('1: scratch'), not be 'probe'",
    ),
    "line is empty": (
        lines("{a: {}}"),
        "table.lines.rows: 'a' must map numbers to stages ('1: scratch'), not be empty",
    ),
    "place is text": (
        lines("{a: {1: probe, many: finetune}}"),
        "table.lines.rows: 'a' has a stage at 'many'; the place on the axis must be a number such as 64 or 0.5",
    ),
    "place is a bool": (lines("{a: {true: probe}}"), "'a' has a stage at True; the place on the axis must be a number"),
    "place is nan": (lines("{a: {.nan: probe}}"), "'a' has a stage at nan; the place on the axis must be a number"),
    "place is infinite": (lines("{a: {-.inf: probe}}"), "'a' has a stage at -inf; the place on the axis must be a"),
    "place is beyond all floats": (lines(f"{{a: {{{10**309}: probe}}}}"), "; the place on the axis must be a number"),
    "log of 0": (
        lines("{a: {1: probe, 0: finetune}}", log="true"),
        "'a' has a stage at 0, where a logarithmic axis has no place; leave out 'log: true', or give numbers above 0",
    ),
    "log of less": (
        lines("{a: {-0.5: probe}}", log="true"),
        "'a' has a stage at -0.5, where a logarithmic axis has no",
    ),
    "line's stage": (
        lines("{a: {1: prob}}"),
        "table.lines.rows: 'a' names the stage 'prob', which does not exist (did you mean 'probe'?)",
    ),
    "line's candidates": (lines("{a: {1: [probe]}}"), "names the stage ['probe'], which does not exist"),
    "line's stage twice": (
        lines("{a: {1: probe, 2: finetune, 4: probe}}"),
        "'a' names the stage 'probe' twice; give every stage of a line one number",
    ),
    "pictures": (
        "pictures: colors",
        "table.pictures must be a mapping with at least 'name: NAME' and 'rows: …', not 'colors'",
    ),
    "pictures' key": (
        "pictures: {name: colors, row: {a: probe}}",
        "table.pictures: unknown key 'row' (did you mean 'rows'?); known are name, seed, rows",
    ),
    "pictures without a name": (
        "pictures: {rows: {a: probe}}",
        "table.pictures.name must name a picture of the task, such as reconstruction, not be empty",
    ),
    "pictures' name is a list": ("pictures: {name: [a], rows: {a: probe}}", "such as reconstruction, not be a list"),
    "pictures' name has no letters": ("pictures: {name: '', rows: {a: probe}}", "such as reconstruction, not be ''"),
    "pictures without rows": (
        "pictures: {name: colors}",
        "table.pictures.rows must map labels to stages ('from scratch: scratch'), not be empty",
    ),
    "pictures' rows are empty": (pictures("{}"), "table.pictures.rows must map labels to stages"),
    "pictures' rows are a list": (pictures("[probe]"), "('from scratch: scratch'), not be a list"),
    "pictures' stage": (
        pictures("{a: probe, b: prob}"),
        "table.pictures.rows: 'b' names the stage 'prob', which does not exist (did you mean 'probe'?)",
    ),
    "pictures' candidates": (pictures("{a: [probe]}"), "names the stage ['probe'], which does not exist"),
    "pictures' seed is text": (
        pictures("{a: probe}", seed="one"),
        "table.pictures.seed must be a seed of these stages, such as 1, not 'one'",
    ),
    "pictures' seed is a bool": (pictures("{a: probe}", seed="true"), "seed of these stages, such as 1, not True"),
    "pictures' seed is empty": (pictures("{a: probe}", seed=""), "seed of these stages, such as 1, not empty"),
    "pictures' seed is another's": (
        pictures("{a: probe, b: teacher}", seed="1"),
        "table.pictures.seed is 1, which the stage 'teacher' does not have (it has 7); give one that all of these st",
    ),
    "pictures have no seed in common": (
        "pictures: {name: colors, rows: {a: probe, b: teacher, c: probe}}",
        "table.pictures.rows: the stages have no seed in common ('probe' has 1, 0, 'teacher' has 7); give all of them",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_with_file_and_key(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(text)
    sentence = str(error.value)
    assert sentence.startswith("chain.yaml: table.") or case == "unknown key"
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_table_is_a_mapping():
    with pytest.raises(
        ValueError, match=r"^chain.yaml: table must be a mapping with at least 'metric: test/error', not"
    ):
        read_table(["test/error"], "chain.yaml: table", SEEDS)
