"""Stages as Slurm jobs, through submitit (``pip install 'baton-vision[slurm]'``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Options that submitit knows for every cluster; all others are Slurm's own.
_SHARED = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min", "stderr_to_stdout")


@dataclass(frozen=True)
class Job:
    """One stage for Slurm.

    Attributes:
        name: shown by the queue.
        work: runs the stage; returns its exit code.
        parents: names of the jobs it waits for.
    """

    name: str
    work: Callable[[], int]
    parents: tuple[str, ...]


def submit(jobs: Sequence[Job], folder: Path, options: dict[str, Any], cluster: str | None = None) -> dict[str, Any]:
    """Submit stages to Slurm through submitit; each waits for its parents with ``afterok``.

    Args:
        jobs: parents before children.
        folder: for submitit's scripts and logs.
        options: Slurm's, such as ``{"partition": "gpu", "gpus_per_node": 4, "tasks_per_node": 4, "timeout_min": 600}``.
        cluster: "slurm" by default; submitit's "local" and "debug" run the jobs here.

    Returns:
        submitit's job for each name.

    Raises:
        ValueError: submitit is not installed, there is no Slurm, or it does not know an option.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--launcher slurm needs submitit: pip install 'baton-vision[slurm]'.") from None
    cluster = cluster or "slurm"
    submitted: dict[str, Any] = {}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        shared = {
            "nodes",
            "gpus_per_node",
            "tasks_per_node",
            "cpus_per_task",
            "mem_gb",
            "timeout_min",
            "stderr_to_stdout",
        }
        executor.update_parameters(
            **{key if key in shared else f"slurm_{key}": value for key, value in options.items()}
        )
        for job in jobs:
            waits = [submitted[name] for name in job.parents if name in submitted]
            parameters: dict[str, Any] = {"name": job.name}
            if cluster == "slurm":
                after = f"afterok:{':'.join(parent.job_id for parent in waits)}" if waits else None
                parameters["slurm_additional_parameters"] = {
                    **options.get("additional_parameters", {}), **({"dependency": after} if after else {})
                }  # fmt: skip
            else:
                for parent in waits:
                    parent.result()
            executor.update_parameters(**parameters)
            submitted[job.name] = executor.submit(job.work)
    except (NameError, RuntimeError, AssertionError) as error:
        raise ValueError(f"submitit refuses: {' '.join(str(error).split())}") from error
    return submitted


def parse_slurm(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ``["partition=gpu", "gpus_per_node=4"]`` into options; values are read as YAML.

    Raises:
        ValueError: an entry is not ``key=value``.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--slurm expects key=value (such as partition=gpu), not {pair!r}.")
        options[key] = yaml.safe_load(value)
    return options
