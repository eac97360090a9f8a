"""The table at the end of a chain: mean ± standard deviation over seeds as Markdown, CSV and a plot."""

import contextlib
import csv
import io
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from baton.chain_table_file import Table


@dataclass(frozen=True)
class Cell:
    """One metric of one row.

    Attributes:
        values: seed -> the metric, already scaled.
        expected: how many seeds there will be.
        waiting: shown instead of n while nothing is chosen among candidates, such as ``5 of 9 runs``.
    """

    values: dict[int, float]
    expected: int
    waiting: str = ""

    @property
    def n(self) -> int:
        """Seeds that have finished."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN without any."""
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation (ddof = 1); NaN below two seeds."""
        values = list(self.values.values())
        if len(values) < 2 or not all(math.isfinite(value) for value in values):
            return math.nan
        return statistics.stdev(values)

    def text(self, digits: int) -> str:
        """``12.34 ± 0.56``; a dash without values, no deviation for a single seed."""
        if not self.values:
            return "–"
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.std) else f"{mean} ± {self.std:.{digits}f}"

    def seeds_text(self) -> str:
        """``3``, or ``2 of 3 seeds`` while some are missing."""
        if self.waiting:
            return self.waiting
        return str(self.n) if self.n == self.expected else f"{self.n} of {self.expected} seeds"


#: label -> metric -> cell
Results = dict[str, dict[str, Cell]]


def collect(table: Table, runs: Mapping[str, Sequence[tuple[int, Mapping[str, float] | None]]]) -> Results:
    """Arrange the metrics of all runs as the table wants them; a row that still has candidates stays empty.

    Args:
        table: what to show, with the candidates chosen (:func:`baton.chain_choice.choose`).
        runs: stage -> (seed, its metrics or None if it has not finished).
    """
    results: Results = {}
    for label, stage in table.rows.items():
        if not isinstance(stage, str):
            done = [metrics is not None for candidate in stage for _, metrics in runs[candidate]]
            empty = Cell({}, len(runs[stage[0]]), f"{sum(done)} of {len(done)} runs")
            results[label] = dict.fromkeys(table.metrics, empty)
            continue
        results[label] = {metric: cell_of(table, metric, runs[stage]) for metric in table.metrics}
    return results


def cell_of(table: Table, metric: str, runs: Sequence[tuple[int, Mapping[str, float | None] | None]]) -> Cell:
    """Put the seeds of a stage together for one metric, scaled; one that lacks it or has not finished is left out."""
    values = {
        seed: table.style_of(metric).scale * number(metrics[metric])
        for seed, metrics in runs
        if metrics is not None and metric in metrics
    }
    return Cell(values, len(runs))


def heading(table: Table, metric: str) -> str:
    """The metric with its unit: ``test/error (%)``."""
    unit = table.style_of(metric).unit
    return f"{metric} ({unit})" if unit else metric


def rows_of(table: Table, results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names and the text of every row."""
    header = ["", *(heading(table, metric) for metric in table.metrics), "n"]
    lines: list[list[str]] = []
    for label, cells in results.items():
        fewest = min(cells.values(), key=lambda cell: cell.n)
        texts = [cells[metric].text(table.style_of(metric).digits) for metric in table.metrics]
        lines.append([label, *texts, fewest.seeds_text()])
    return header, lines


def markdown(name: str, table: Table, results: Results, provenance: str, notes: Sequence[str] = ()) -> str:
    """The table as Markdown, under a line that says where the numbers come from and above the notes, a line each."""
    header, lines = rows_of(table, results)
    rule = ["---", *("---:" for _ in header[1:])]
    text = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in [header, rule, *lines])
    return "\n\n".join([f"# {name}", provenance, text, *notes]) + "\n"


def write_table(
    name: str,
    table: Table,
    results: Results,
    provenance: str,
    folder: Path,
    notes: Sequence[str] = (),
    plot: bool = True,
) -> None:
    """Write ``table.md``, ``table.csv``, ``results.csv`` (one line a seed) and ``table.png`` into the folder.

    Args:
        name: of the chain.
        table: what to show.
        results: from :func:`collect`.
        provenance: one line: seeds, commit, hardware, date.
        folder: the chain's.
        notes: lines under the table.
        plot: draw the picture as well.
    """
    _replace(folder / "table.md", markdown(name, table, results, provenance, notes).encode())
    summary: list[list[Any]] = [["row", "metric", "unit", "mean", "std", "n", "seeds"]]
    single: list[list[Any]] = [["row", "stage", "seed", "metric", "unit", "value"]]
    for label, cells in results.items():
        for metric, cell in cells.items():
            numbers = ["" if math.isnan(value) else value for value in (cell.mean, cell.std)]
            unit = table.style_of(metric).unit
            summary.append([label, metric, unit, *numbers, cell.n, cell.expected])
            single += [[label, table.rows[label], seed, metric, unit, v] for seed, v in cell.values.items()]
    write_csv(folder / "table.csv", summary)
    write_csv(folder / "results.csv", single)
    if plot:
        draw(name, table, results, folder / "table.png")


def draw(name: str, table: Table, results: Results, path: Path) -> None:
    """Draw one dot a seed and mean ± standard deviation for every row, one panel a metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(results)
    width = min(1.5 + 0.07 * max(len(label) for label in labels), 4.0) + 4.5 * len(table.metrics)
    figure = Figure(figsize=(width, 1.5 + 0.45 * len(labels)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(table.metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, table.metrics, strict=True):
        for row, label in enumerate(labels):
            _draw_cell(axis, row, results[label][metric], table.style_of(metric).digits)
        axis.set_xlabel(heading(table, metric))
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.margins(x=0.12)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.7)  # the first row on top
    figure.suptitle(f"{name}: one dot a seed, bar = mean ± standard deviation", fontsize=10)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG; a reader never sees half of it."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    _replace(path, content.getvalue())


def _draw_cell(axis: Any, row: int, cell: Cell, digits: int) -> None:
    values = [value for value in cell.values.values() if math.isfinite(value)]
    if not values:
        return
    centre, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    axis.plot(values, [row + 0.16] * len(values), "o", color="tab:blue", markersize=4, alpha=0.7, markeredgewidth=0)
    axis.errorbar(centre, row, xerr=spread or None, fmt="|", color="0.15", markersize=12, capsize=4)
    axis.annotate(cell.text(digits), (centre, row), (0, 8), textcoords="offset points", ha="center", fontsize=8)


def print_table(table: Table, results: Results, console: Any) -> None:
    """Print the table with rich."""
    from rich.table import Table as Printed

    header, lines = rows_of(table, results)
    printed = Printed(show_edge=False, pad_edge=False)
    for index, column in enumerate(header):
        printed.add_column(column, justify="right" if index else "left")
    for line in lines:
        printed.add_row(*line)
    console.print(printed, markup=False)


def provenance_line(seeds: Sequence[int], records: Sequence[Mapping[str, Any]]) -> str:
    """Say where the numbers come from: which value, seeds, commit, hardware, date."""
    kept = {record.get("options", {}).get("run.keep", "last") for record in records}
    which = (
        "of the best epoch by validation" if kept == {"best"} else "at the end of training (no best epoch is picked)"
    )
    which = which if len(kept) < 2 else "at the end of training or of the best epoch by validation, as each recipe says"
    parts = [f"Value {which}, mean ± sample standard deviation over seeds"]
    parts.append(f"seeds {', '.join(str(seed) for seed in seeds)}")
    for key, word in (("commit", "commit"), ("hardware", "on")):
        found = sorted({str(record[key]) for record in records if record.get(key)})
        if found:
            parts.append(f"{word} {' and '.join(found)}")
    parts.append(time.strftime("%Y-%m-%d"))
    return "; ".join(parts) + "."


def log_to_wandb(name: str, table: Table, results: Results, folder: Path) -> None:
    """Log table and pictures as one W&B run in the chain's group, if someone is logged in; never fails the chain."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if os.environ.get("WANDB_MODE", "online") != "online" or not (os.environ.get("WANDB_API_KEY") or netrc.exists()):
        return  # spares everyone without a login the import
    try:
        import wandb

        if not wandb.login(prompt=False):
            return
        header, lines = rows_of(table, results)
        project = os.environ.get("WANDB_PROJECT", "baton")
        with wandb.init(project=project, group=name, job_type="table", name=f"{name}: table", dir=folder) as run:
            run.log({"table": wandb.Table(columns=["row", *header[1:]], data=list(lines))})
            pictures = {"plot": "table.png"}
            if table.curves:
                pictures["curves"] = "curves.png"
            if table.lines is not None:
                pictures["lines"] = "lines.png"
            if table.pictures is not None:
                pictures["pictures"] = "pictures.png"
            for key, picture in pictures.items():
                if (folder / picture).exists():
                    run.log({key: wandb.Image(str(folder / picture))})
    except Exception as error:
        warnings.warn(f"The table was not logged to W&B: {error}", stacklevel=2)


def number(value: float | None) -> float:
    """A recorded metric; JSON has no NaN and holds null instead."""
    return math.nan if value is None else float(value)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def write_csv(path: Path, lines: list[list[Any]]) -> None:
    """Write lines of cells, the names of the columns first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    _replace(path, text.getvalue().encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader (or a kill) never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def machine() -> str:
    """This machine in a few words: ``NVIDIA H100 80GB HBM3 x 8``, or the processor and its cores."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
        names = [name.strip() for name in names if name.strip()]
        if names:
            return f"{names[0]} x {len(names)}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{model}, {cores} cores"


def commit() -> str:
    """Commit of Baton's own checkout (``abc1234``, ``abc1234+changes``), else its version."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
                                 capture_output=True, timeout=10)  # fmt: skip
        if tracked.returncode == 0:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"baton-vision {metadata.version('baton-vision')}"
    return "unknown"
