"""The ``table`` of a chain file: which metrics its rows show, and what is drawn besides.

Its simplest form stands in :mod:`baton.chain_file`. A row may list candidates, say one recipe with several learning
rates, and the table may draw curves::

    table:
      metric: test/error
      select: val/error                 # or {metric: val/accuracy, mode: max}; the mode is min unless it is given
      rows: {from scratch: scratch, fine-tuned: [lr_0_01, lr_0_003]}
      curves: val/error                 # or a list

The row shows the candidate with the best mean of the ``select`` metric over its seeds (of equal ones the first), and a
line under the table says which one that is; the table's own metric takes no part (:mod:`baton.chain_choice`). As long
as a run of a candidate is missing, nothing is chosen. Candidates have the same seeds. ``curves`` draws each metric
over the training steps, one line a row, into ``curves.png`` (:mod:`baton.chain_curves`).

The table may also draw its metrics over a number that differs between stages::

    table:
      metric: [test/accuracy, test/accuracy_top5]
      rows: {fine-tuned: split_brain_64, from scratch: scratch_64}
      lines:
        x: labels a class               # the name of the axis
        log: true                       # a logarithmic axis; false unless it is given
        rows:
          fine-tuned: {1: split_brain_1, 8: split_brain_8, 64: split_brain_64}
          from scratch: {1: scratch_1, 8: scratch_8, 64: scratch_64}

``lines`` draws one line a row of its own through the stages at these numbers, whether the table's rows show them or
not, into ``lines.png`` (:mod:`baton.chain_lines`). A point is one stage, so it cannot list candidates.

Metrics that are no percentages beside one that is are written each in its own way::

    table:
      metric:
        test/error: {unit: "%", scale: 100}
        train/minutes: {digits: 1}

What a metric leaves out is the table's own ``unit``, ``scale`` or ``digits``, which curves have, too.

And the table may put the pictures that stages have drawn below each other::

    table:
      metric: test/loss
      pictures:
        name: reconstruction            # as the task calls it: runs write pictures/reconstruction_epoch_0001.png
        seed: 0                         # the first that all these stages have unless it is given
        rows: {SAE from pool1: sae_1, SWWAE from pool1: swwae_1}

``pictures`` puts the last such picture of each of these stages, with the label left of it, into ``pictures.png``
(:mod:`baton.chain_pictures`). What two or more pictures of equal size begin with, such as the images that all of them
look at, is drawn once, on top. These stages need not log the table's metrics.
"""

import difflib
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_STYLE = ("unit", "scale", "digits")


@dataclass(frozen=True)
class Select:
    """What decides among the candidates of a row.

    Attributes:
        metric: name as the tasks log it, such as ``val/error``.
        mode: whether the best is the "min" or the "max".
    """

    metric: str
    mode: str = "min"


@dataclass(frozen=True)
class Lines:
    """What is drawn over a number that differs between stages.

    Attributes:
        x: the name of the axis.
        rows: label -> number -> stage, the numbers ascending.
        log: whether the axis is logarithmic.
    """

    x: str
    rows: dict[str, dict[float, str]]
    log: bool = False

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every number that some row has a stage for, ascending."""
        return tuple(sorted({number for row in self.rows.values() for number in row}))


@dataclass(frozen=True)
class Sheet:
    """Which pictures are put below each other.

    Attributes:
        name: of the picture, as the task calls it.
        seed: of the runs that drew them.
        rows: label -> stage, from top to bottom.
    """

    name: str
    seed: int
    rows: dict[str, str]


@dataclass(frozen=True)
class Style:
    """How a metric is written.

    Attributes:
        unit: written behind the metric's name.
        scale: factor from the logged value to the shown one.
        digits: decimals shown.
    """

    unit: str = ""
    scale: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Table:
    """What the results table shows.

    Attributes:
        metrics: names as the tasks log them, such as ``test/error``.
        rows: label -> stage, or the candidates for it, in the order of the table.
        style: how metrics are written.
        own_styles: how single ones are instead, by name.
        select: what decides among candidates; None: there are none.
        curves: metrics drawn over the training steps.
        lines: what the metrics are drawn over besides; None: nothing.
        pictures: the pictures of stages that are put below each other; None: none.
    """

    metrics: tuple[str, ...]
    rows: dict[str, str | tuple[str, ...]]
    style: Style = Style()
    own_styles: Mapping[str, Style] = field(default_factory=dict)
    select: Select | None = None
    curves: tuple[str, ...] = ()
    lines: Lines | None = None
    pictures: Sheet | None = None

    def style_of(self, metric: str) -> Style:
        """How a metric is written."""
        return self.own_styles.get(metric, self.style)

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage whose metrics a row or a line shows or may show."""
        shown = [stage for row in self.rows.values() for stage in ((row,) if isinstance(row, str) else row)]
        drawn = self.lines.rows.values() if self.lines is not None else ()
        return (*shown, *(stage for row in drawn for stage in row.values()))


def read_table(entry: Any, where: str, seeds: Mapping[str, tuple[int, ...]]) -> Table:
    """Read and validate the ``table`` of a chain file.

    Args:
        entry: what the file says.
        where: the file and the key, for messages.
        seeds: of every stage of the chain.

    Raises:
        ValueError: something is wrong with it, in one sentence with the file and the key.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with at least 'metric: test/error', not {kind(entry)}.")
    check_keys(entry, ("metric", *_STYLE, "select", "rows", "curves", "lines", "pictures"), where)
    style = _style({key: entry[key] for key in _STYLE if key in entry}, Style(), where)
    metrics, own_styles = _styled_metrics(entry.get("metric"), style, f"{where}.metric")
    curves = _metrics(entry["curves"], f"{where}.curves", "val/error") if entry.get("curves") is not None else ()
    select = _select(entry["select"], f"{where}.select") if entry.get("select") is not None else None
    rows = _rows(entry.get("rows", {name: name for name in seeds}), f"{where}.rows", seeds)
    lines = _lines(entry["lines"], f"{where}.lines", seeds) if entry.get("lines") is not None else None
    pictures = _pictures(entry["pictures"], f"{where}.pictures", seeds) if entry.get("pictures") is not None else None
    lists = [label for label, row in rows.items() if isinstance(row, tuple)]
    if lists and select is None:
        raise ValueError(
            f"{where}.rows: {lists[0]!r} lists stages to choose from, but no select says how; add 'select: val/error'."
        )
    if select is not None and not lists:
        raise ValueError(
            f"{where}.select is given, but no row lists stages to choose from; leave it out, or list some "
            "('label: [stage, other_stage]')."
        )
    return Table(metrics, rows, style, own_styles, select, curves, lines, pictures)


def _style(entry: Any, default: Style, where: str) -> Style:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping such as '{{unit: \"%\", scale: 100}}', not {kind(entry)}.")
    check_keys(entry, _STYLE, where)
    scale, digits = entry.get("scale", default.scale), entry.get("digits", default.digits)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale == 0:
        raise ValueError(f"{where}.scale must be a number other than 0, not {scale!r}.")
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 10:
        raise ValueError(f"{where}.digits must be a whole number from 0 to 10, not {digits!r}.")
    return Style(str(entry.get("unit", default.unit)), float(scale), digits)


def _styled_metrics(entry: Any, style: Style, where: str) -> tuple[tuple[str, ...], dict[str, Style]]:
    if not isinstance(entry, dict):
        return _metrics(entry, where, "test/error"), {}
    own = {name: _style(written or {}, style, f"{where}.{name}") for name, written in entry.items()}
    return _metrics(list(own), where, "test/error"), own


def _metrics(entry: Any, where: str, example: str) -> tuple[str, ...]:
    metrics = [entry] if isinstance(entry, str) else entry
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"{where} must be a metric's name such as {example}, or a list, not {kind(entry)}.")
    return tuple(metrics)


def _select(entry: Any, where: str) -> Select:
    given = {"metric": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict):
        raise ValueError(
            f"{where} must be a metric's name such as val/error, or {{metric: val/accuracy, mode: max}}, "
            f"not {kind(entry)}."
        )
    check_keys(given, ("metric", "mode"), where)
    metric, mode = given.get("metric"), given.get("mode", "min")
    if not isinstance(metric, str):
        raise ValueError(f"{where}.metric must be a metric's name such as val/error, not {kind(metric)}.")
    if mode not in ("min", "max"):
        raise ValueError(f"{where}.mode must be min or max, not {kind(mode)}.")
    return Select(metric, mode)


def _rows(entry: Any, where: str, seeds: Mapping[str, tuple[int, ...]]) -> dict[str, str | tuple[str, ...]]:
    if not isinstance(entry, dict) or not entry:
        raise ValueError(f"{where} must map labels to stages ('from scratch: scratch'), not be {kind(entry)}.")
    rows: dict[str, str | tuple[str, ...]] = {}
    for label, row in entry.items():
        names = row if isinstance(row, list) else [row]
        if not names:
            raise ValueError(f"{where}: {label!r} lists no stage to choose from; name one or more.")
        for name in names:
            _existing(name, seeds, f"{where}: {label!r}")
            if names.count(name) > 1:
                raise ValueError(f"{where}: {label!r} names the stage {name!r} twice; list each candidate once.")
            first, own = seeds[names[0]], seeds[name]
            if sorted(own) != sorted(first):
                raise ValueError(
                    f"{where}: the candidates of {label!r} must have the same seeds, but {names[0]!r} has "
                    f"{words(first)} and {name!r} has {words(own)}; give them the same."
                )
        rows[str(label)] = tuple(names) if isinstance(row, list) else row
    return rows


def _lines(entry: Any, where: str, seeds: Mapping[str, tuple[int, ...]]) -> Lines:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with at least 'x: NAME' and 'rows: …', not {kind(entry)}.")
    check_keys(entry, ("x", "log", "rows"), where)
    x, log, rows = entry.get("x"), entry.get("log", False), entry.get("rows")
    if not isinstance(x, str):
        raise ValueError(f"{where}.x must name the axis, such as 'labels a class', not be {kind(x)}.")
    if not isinstance(log, bool):
        raise ValueError(f"{where}.log must be true or false, not {kind(log)}.")
    if not isinstance(rows, dict) or not rows:
        raise ValueError(
            f"{where}.rows must map labels to points ('from scratch: {{1: scratch}}'), not be {kind(rows)}."
        )
    points = {str(label): _points(row, f"{where}.rows: {label!r}", log, seeds) for label, row in rows.items()}
    return Lines(x, points, log)


def _points(row: Any, where: str, log: bool, seeds: Mapping[str, tuple[int, ...]]) -> dict[float, str]:
    if not isinstance(row, dict) or not row:
        raise ValueError(f"{where} must map numbers to stages ('1: scratch'), not be {kind(row)}.")
    for x, name in row.items():
        if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) <= sys.float_info.max:
            raise ValueError(f"{where} has a stage at {x!r}; the place on the axis must be a number such as 64 or 0.5.")
        if log and x <= 0:
            raise ValueError(
                f"{where} has a stage at {x!r}, where a logarithmic axis has no place; leave out 'log: true', or give "
                "numbers above 0."
            )
        _existing(name, seeds, where)
        if list(row.values()).count(name) > 1:
            raise ValueError(f"{where} names the stage {name!r} twice; give every stage of a line one number.")
    return dict(sorted(row.items()))


def _pictures(entry: Any, where: str, seeds: Mapping[str, tuple[int, ...]]) -> Sheet:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with at least 'name: NAME' and 'rows: …', not {kind(entry)}.")
    check_keys(entry, ("name", "seed", "rows"), where)
    name, rows = entry.get("name"), entry.get("rows")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name must name a picture of the task, such as reconstruction, not be {kind(name)}.")
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{where}.rows must map labels to stages ('from scratch: scratch'), not be {kind(rows)}.")
    for label, stage in rows.items():
        _existing(stage, seeds, f"{where}.rows: {label!r}")
    first, *others = rows.values()
    shared = [seed for seed in seeds[first] if all(seed in seeds[stage] for stage in others)]
    seed = entry.get("seed", shared[0] if shared else None)
    if seed is None and "seed" not in entry:
        own = ", ".join(f"{stage!r} has {words(seeds[stage])}" for stage in dict.fromkeys(rows.values()))
        raise ValueError(f"{where}.rows: the stages have no seed in common ({own}); give all of them the same one.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(
            f"{where}.seed must be a seed of these stages, such as {(shared or seeds[first])[0]}, not {kind(seed)}."
        )
    for stage in rows.values():
        if seed not in seeds[stage]:
            raise ValueError(
                f"{where}.seed is {seed}, which the stage {stage!r} does not have (it has {words(seeds[stage])}); "
                "give one that all of these stages have."
            )
    return Sheet(name, seed, {str(label): stage for label, stage in rows.items()})


def _existing(name: Any, stages: Collection[str], where: str) -> None:
    if not isinstance(name, str) or name not in stages:
        raise ValueError(f"{where} names the stage {name!r}, which does not exist{nearest(name, stages)}.")


def check_keys(entry: dict[Any, Any], known: Collection[str], where: str) -> None:
    """Refuse a key that is none of the known ones, with the nearest of these.

    Raises:
        ValueError: there is such a key.
    """
    for key in entry:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}; known are {words(known)}.")


def nearest(name: Any, known: Iterable[str]) -> str:
    """``(did you mean 'this'?)`` after a space, or nothing if no known name is near."""
    close = difflib.get_close_matches(str(name), [str(entry) for entry in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def words(names: Iterable[Any]) -> str:
    """All names with commas between them."""
    return ", ".join(str(name) for name in names)


def kind(value: Any) -> str:
    """What a value of a file is, for a message: itself if it is short, else its type."""
    if value is None or value == {}:
        return "empty"
    return f"{value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
