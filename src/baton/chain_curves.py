"""The curves of a chain: metrics over the training steps as a picture and as CSV, one line a row of the table.

The values come from the ``metrics.csv`` of the finished runs, so that the curves show the runs that the table shows.
A line is the mean over the seeds and its band the mean ± sample standard deviation, at the steps where *every* seed
that logged the metric has a value: seeds whose steps differ are neither interpolated nor averaged over fewer seeds.
Steps are those of the row's own stage, without the stages before it.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.chain_table import Cell, heading, save_figure, write_csv
from baton.chain_table_file import Table

#: seed -> step -> the metric, already scaled
Curves = dict[int, dict[int, float]]
#: metric -> label of the row -> curves of its seeds
Panels = dict[str, dict[str, Curves]]


def write_curves(name: str, table: Table, runs: Mapping[str, Sequence[tuple[int, Path]]], folder: Path) -> None:
    """Write ``curves.csv`` (one line a seed and step) and ``curves.png`` into the folder.

    Args:
        name: of the chain.
        table: what to show, with the candidates chosen (:func:`baton.chain_choice.choose`).
        runs: stage -> (seed, folder of the run) for the runs that have finished.
        folder: the chain's.
    """
    panels = collect_curves(table, runs)
    lines: list[list[Any]] = [["row", "stage", "seed", "metric", "step", "value"]]
    for metric, rows in panels.items():
        for label, curves in rows.items():
            for seed, curve in curves.items():
                lines += [[label, table.rows[label], seed, metric, step, value] for step, value in curve.items()]
    write_csv(folder / "curves.csv", lines)
    draw(name, table, panels, folder / "curves.png")


def collect_curves(table: Table, runs: Mapping[str, Sequence[tuple[int, Path]]]) -> Panels:
    """Read what the table's curves show; a seed that did not log a metric is left out, an unchosen row is empty.

    Args:
        table: what to show.
        runs: stage -> (seed, folder of the run).
    """
    panels: Panels = {metric: {label: {} for label in table.rows} for metric in table.curves}
    for label, stage in table.rows.items():
        for seed, run in runs[stage] if isinstance(stage, str) else ():
            for metric, curve in read_curves(run / "metrics.csv", table.curves).items():
                if curve:
                    scale = table.style_of(metric).scale
                    panels[metric][label][seed] = {step: scale * value for step, value in curve.items()}
    return panels


def read_curves(file: Path, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """Read metric -> step -> value from a ``metrics.csv``; nothing if there is no such file.

    Several rows may share a step, each with values of its own (losses, validation). Should two of them have a value of
    the same metric, the first counts: the one of the training; ``baton validate`` appends to the same file.
    """
    curves: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    if file.is_file():
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                for metric in metrics:
                    if row.get(metric):
                        curves[metric].setdefault(int(row["step"]), float(row[metric]))
    return {metric: dict(sorted(curve.items())) for metric, curve in curves.items()}


def average(curves: Curves) -> dict[int, Cell]:
    """Put the seeds together at every step where all of them have a value."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values()))) if curves else []
    return {step: Cell({seed: curve[step] for seed, curve in curves.items()}, len(curves)) for step in steps}


def draw(name: str, table: Table, panels: Panels, path: Path) -> None:
    """Draw one panel a metric and in it one line a row, with the band of its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legend = 0.25 * len(table.rows)
    figure = Figure(figsize=(6.0 * len(panels), 4.5 + legend), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.set_xlabel("training step")
        axis.set_ylabel(heading(table, metric))
        axis.spines[["top", "right"]].set_visible(False)
        if not any(rows.values()):
            axis.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axis.transAxes, color="0.4")
            axis.set_xticks([])
            axis.set_yticks([])
            continue
        axis.grid(color="0.9")
        for index, (label, curves) in enumerate(rows.items()):
            _draw_row(axis, index, label, curves, chosen=isinstance(table.rows[label], str))
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False, fontsize=9)
    figure.suptitle(f"{name}\nline = mean over seeds, band = ± standard deviation", fontsize=10)
    save_figure(figure, path)


def _draw_row(axis: Any, index: int, label: str, curves: Curves, chosen: bool) -> None:
    cells = average(curves)
    if not cells:
        why = "no step that all seeds share" if curves else "no data" if chosen else "not chosen yet"
        axis.plot([], [], " ", label=f"{label}: {why}")
        return
    steps, means = list(cells), [cell.mean for cell in cells.values()]
    label = f"{label} (n = {len(curves)})" if len(curves) > 1 else label
    color, style = f"C{index % 10}", ("-", "--", ":", "-.")[index // 10 % 4]
    marker = "o" if len(steps) <= 30 else ""  # else a single value would be invisible
    axis.plot(steps, means, style, color=color, marker=marker, markersize=3, label=label)
    if len(curves) > 1:
        low, high = zip(*((cell.mean - cell.std, cell.mean + cell.std) for cell in cells.values()), strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
