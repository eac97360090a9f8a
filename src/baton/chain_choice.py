"""Which of its candidates a row of the table shows: the best by a validation metric, never by the table's own."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.chain_table import number
from baton.chain_table_file import Select, Table

#: stage -> (seed, its metrics or None if it has not finished)
Runs = Mapping[str, Sequence[tuple[int, Mapping[str, float | None] | None]]]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        table: the table with one stage a row; a row without a choice keeps its candidates.
        notes: a line for each row that was chosen, or cannot be.
        lacks_metric: a finished candidate has not recorded the metric, so that a row cannot be chosen.
    """

    table: Table
    notes: tuple[str, ...]
    lacks_metric: bool


def choose(table: Table, runs: Runs) -> Choice:
    """Choose among the candidates of every row, once all their runs have finished.

    The best has the smallest (or greatest) mean over its seeds; of equal ones the first is taken, and one whose mean
    is NaN only if all are. A run's metric is the one handed over with its weights, so of the epoch that is tested.

    Args:
        table: what to show.
        runs: the runs of every stage.
    """
    rows, notes, lacks_metric = dict(table.rows), [], False
    for label, row in table.rows.items():
        if isinstance(row, str):
            continue
        assert table.select is not None
        name = table.select.metric
        lacking = _first_without(name, row, runs)
        if lacking:
            notes.append(f"{label}: nothing is chosen, for {lacking}: correct table.select and call again.")
            lacks_metric = True
            continue
        finished = {stage: [metrics for _, metrics in runs[stage] if metrics is not None] for stage in row}
        if any(len(finished[stage]) < len(runs[stage]) for stage in row):
            continue
        means = [statistics.fmean(number(metrics[name]) for metrics in finished[stage]) for stage in row]
        rows[label] = best = row[_best(means, table.select)]
        style = table.style_of(name)
        shown = ", ".join(f"{style.scale * mean:.{style.digits}f}" for mean in means)
        notes.append(f"{label}: {best}, chosen of {len(row)} by {name} ({shown})")
    return Choice(dataclasses.replace(table, rows=rows), tuple(notes), lacks_metric)


def _best(means: Sequence[float], select: Select) -> int:
    sign = -1 if select.mode == "max" else 1
    return min(range(len(means)), key=lambda i: math.inf if math.isnan(means[i]) else sign * means[i])


def _first_without(name: str, candidates: Sequence[str], runs: Runs) -> str:
    """What the first finished run without the metric has instead, in words; empty if there is none."""
    for stage in candidates:
        for seed, metrics in runs[stage]:
            if metrics is not None and name not in metrics:
                has = ", ".join(metrics) or "none"
                return f"{stage} with seed {seed} has no metric {name!r}; it has {has}"
    return ""
