"""The lines of a chain: the table's metrics over a number that differs between stages, as a picture and as CSV.

A point is the mean over the seeds of one stage that have finished, and its bar ± the sample standard deviation; a stage
without any is left out. The values are those that the table would show for these stages.
"""

from pathlib import Path
from typing import Any

from baton.chain_choice import Runs
from baton.chain_table import Cell, cell_of, heading, save_figure, write_csv
from baton.chain_table_file import Lines, Table

#: number on the axis -> its stage's cell
Line = dict[float, Cell]
#: metric -> label of the row -> its line
Panels = dict[str, dict[str, Line]]


def write_lines(name: str, table: Table, runs: Runs, folder: Path) -> None:
    """Write ``lines.csv`` (one line a seed) and ``lines.png`` into the folder.

    Args:
        name: of the chain.
        table: what to show, with lines.
        runs: stage -> (seed, its metrics or None if it has not finished).
        folder: the chain's.
    """
    assert table.lines is not None
    panels = collect_lines(table, table.lines, runs)
    single: list[list[Any]] = [["row", "x", "stage", "seed", "metric", "unit", "value"]]
    for metric, rows in panels.items():
        for label, line in rows.items():
            for x, cell in line.items():
                stage, unit = table.lines.rows[label][x], table.style_of(metric).unit
                single += [[label, x, stage, seed, metric, unit, value] for seed, value in cell.values.items()]
    write_csv(folder / "lines.csv", single)
    draw(name, table, table.lines, panels, folder / "lines.png")


def collect_lines(table: Table, lines: Lines, runs: Runs) -> Panels:
    """Arrange the metrics of the stages as the lines want them; a point without values is left out.

    Args:
        table: what to show.
        lines: where on the axis each stage stands.
        runs: see :func:`write_lines`.
    """
    panels: Panels = {metric: {} for metric in table.metrics}
    for metric, rows in panels.items():
        for label, row in lines.rows.items():
            cells = {x: cell_of(table, metric, runs[stage]) for x, stage in row.items()}
            rows[label] = {x: cell for x, cell in cells.items() if cell.values}
    return panels


def draw(name: str, table: Table, lines: Lines, panels: Panels, path: Path) -> None:
    """Draw one panel a metric and in it one line a row, with a bar at every point of several seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * len(panels), 4.5 + 0.25 * len(lines.rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axis.set_xlabel(lines.x)
        axis.set_ylabel(heading(table, metric))
        axis.spines[["top", "right"]].set_visible(False)
        if not any(rows.values()):
            axis.text(0.5, 0.5, "no data yet", ha="center", va="center", transform=axis.transAxes, color="0.4")
            axis.set_xticks([])
            axis.set_yticks([])
            continue
        _place_numbers(axis, lines)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        for index, (label, line) in enumerate(rows.items()):
            _draw_row(axis, index, label, line)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False, fontsize=9)
    figure.suptitle(f"{name}\npoint = mean over seeds, bar = ± sample standard deviation", fontsize=10)
    save_figure(figure, path)


def _place_numbers(axis: Any, lines: Lines) -> None:
    """Give every number a tick and its place, also those without a value yet."""
    if lines.log:
        axis.set_xscale("log", base=2)
    axis.update_datalim([(x, 0.0) for x in lines.numbers], updatey=False)
    texts = [f"{x:g}" if isinstance(x, float) else str(x) for x in lines.numbers]
    axis.set_xticks(lines.numbers, texts, fontsize=8)
    axis.minorticks_off()


def _draw_row(axis: Any, index: int, label: str, line: Line) -> None:
    if not line:
        axis.plot([], [], " ", label=f"{label}: no data yet")
        return
    counts = sorted({cell.n for cell in line.values()})
    label = f"{label} (n = {'–'.join(str(n) for n in dict.fromkeys([counts[0], counts[-1]]))})"
    color, style, marker = f"C{index % 10}", ("-", "--", ":", "-.")[index // 10 % 4], "osD^v"[index % 5]
    means, spreads = [cell.mean for cell in line.values()], [cell.std for cell in line.values()]
    axis.plot(list(line), means, style, color=color, marker=marker, markersize=4, label=label)
    axis.errorbar(list(line), means, yerr=spreads, fmt="none", ecolor=color, capsize=3, alpha=0.7)
