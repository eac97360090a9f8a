"""What benchmarks share: two sides that take turns in one process, and a line that says how the ratio compares."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def race(ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns, the order reversed every round, divided by what a call returns (its units of work)."""
    times: dict[Callable[[], Any], list[float]] = {ours: [], other: []}
    for number in range(rounds + 1):
        for run in (ours, other) if number % 2 else (other, ours):
            _finish()
            begin = time.perf_counter()
            count = run()
            _finish()
            times[run].append((time.perf_counter() - begin) / count)
    return times[ours][1:], times[other][1:]  # the first round warms up


def report(what: str, ratios: list[float], target: float, *, at_least: bool = False) -> bool:
    """Print the median with its quartiles; return whether it meets the target."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    met = middle >= target if at_least else middle <= target
    print(f"{what}: {middle:.3g} ({low:.3g} - {high:.3g}), target {'>=' if at_least else '<='} {target:g}: "
          f"{'pass' if met else 'FAIL'}", flush=True)  # fmt: skip
    return met


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
