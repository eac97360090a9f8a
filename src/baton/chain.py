"""A chain: stages run in order, each from the weights of an earlier one, repeated over seeds, ending with a table.

``baton chain FILE.yaml`` (the file's format: :mod:`baton.chain_file`). A finished stage is not run again; a broken
or killed chain continues where it stopped. A stage has finished when its run has a ``model/`` folder. Beside the
run's folder lies a record of what it was started with; a run that no longer matches its chain is refused, never mixed
with others in one table.
"""

import argparse
import contextlib
import functools
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from baton import chain_choice, chain_curves, chain_launch, chain_lines, chain_pictures, chain_slurm, chain_table
from baton.chain_file import Chain, read_chain
from baton.chain_plan import Run, plan, select


def run_chain(
    path: str | Path,
    *,
    root: str | Path = "runs",
    dry_run: bool = False,
    launcher: str = "local",
    slurm: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    verbose: bool = False,
    entry: str = chain_launch.ENTRY,
    preload: Sequence[str] = chain_launch.PRELOAD,
    cluster: str | None = None,
) -> int:
    """Run a chain file, or print what would be run.

    Args:
        path: of the chain file.
        root: folder of all runs.
        dry_run: check everything and print the plan only.
        launcher: "local", or "slurm" to submit the stages as jobs.
        slurm: options of the jobs, ``key=value``.
        seeds: run these seeds only (default: those of the file).
        only: run these stages (and those they start from) only: names, or patterns such as ``*_small``.
        verbose: show what the stages print, too.
        entry: "module:function" that runs one stage.
        preload: modules that the stages' warm process imports.
        cluster: submitit's executor for ``launcher="slurm"``: "slurm", or "local" / "debug" for a trial.

    Returns:
        Exit code: 0, the failed stage's, or 130 after Ctrl-C.

    Raises:
        FileNotFoundError: the chain file or a recipe does not exist.
        ValueError: the file, a stage's options or an earlier run do not fit; in one sentence.
    """
    if launcher not in ("local", "slurm"):
        raise ValueError(f"--launcher must be local or slurm, not {launcher!r}.")
    chain = read_chain(path, seeds or ())
    everything = plan(chain, root)
    runs = select(everything, chain, seeds, only)
    for run in runs:
        run.check_record()
    console = Console(highlight=False, soft_wrap=True)
    if dry_run:
        _print_plan(chain, runs, _check(chain, runs, chain_launch.WarmProcesses(entry, preload)), console)
        return 0
    with _lock(chain, Path(root)):
        todo = [run for run in runs if not run.finished]
        code = 0
        if todo:
            warm = chain_launch.WarmProcesses(entry, preload)
            try:
                checked = _check(chain, todo, warm)
                if launcher == "slurm":
                    return _submit(chain, runs, Path(root), entry, chain_slurm.parse_slurm(slurm), cluster, console)
                code = _run_all(chain, everything, runs, warm, checked, verbose, console)
            except KeyboardInterrupt:
                console.print("Interrupted: the same command continues where it stopped.")
                return chain_launch.INTERRUPTED
        else:
            console.print(f"{chain.name}: all {len(runs)} runs are finished.")
        if code == 0 and chain.table is not None:
            missing = finish_table(chain, everything, console)
            code = 2 if missing else 0
        return code


def main(argv: Sequence[str]) -> int:
    """Run ``baton chain`` with its command line and return the exit code.

    Raises:
        FileNotFoundError: see :func:`run_chain`.
        ValueError: see :func:`run_chain`; also for a wrong option.
    """
    parser = _Parser(prog="baton chain", description="Run all stages of a chain over its seeds; end with a table.")
    parser.add_argument("file", help="the chain, a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan")
    parser.add_argument("--root", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--seeds", help="run these seeds only, such as 0,1")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STAGES",
        help="run these stages and those they start from only, such as pretrain,finetune_*",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the stages print")
    parser.add_argument("--launcher", default="local", choices=("local", "slurm"), help="where stages run")
    parser.add_argument(
        "--slurm", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="options of the jobs"
    )
    given = parser.parse_args(argv)
    return run_chain(
        given.file,
        root=given.root,
        dry_run=given.dry_run,
        launcher=given.launcher,
        slurm=given.slurm,
        seeds=_seeds(given.seeds),
        only=[part.strip() for text in given.only for part in text.split(",")],
        verbose=given.verbose,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"baton chain: {message} (`baton chain --help` lists the options).")


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--seeds must be whole numbers with commas between them, such as 0,1,2, not {text!r}.")
    return [int(part) for part in parts]


def finish_table(chain: Chain, runs: Sequence[Run], console: Console | None = None) -> bool:
    """Write the table and what else it draws of the finished runs, and print and log them if there is a console.

    Returns:
        Whether a finished run lacks a metric the table asks for.
    """
    assert chain.table is not None
    by_stage = {name: [(r.seed, r.metrics()) for r in runs if r.stage.name == name] for name in chain.stages}
    choice = chain_choice.choose(chain.table, by_stage)
    table, notes = choice.table, choice.notes
    results = chain_table.collect(table, by_stage)
    done = [run for run in runs if run.finished and run.stage.name in chain.table.stages]
    provenance = chain_table.provenance_line(sorted({run.seed for run in done}), [run.recorded() or {} for run in done])
    folder = runs[0].root / chain.name
    chain_table.write_table(chain.name, table, results, provenance, folder, choice.notes)
    if table.curves:
        folders = {name: [(run.seed, run.folder) for run in done if run.stage.name == name] for name in table.stages}
        chain_curves.write_curves(chain.name, table, folders, folder)
    if table.lines is not None:
        chain_lines.write_lines(chain.name, table, by_stage, folder)
    if table.pictures is not None:
        shown = {run.stage.name: run.folder for run in runs if run.finished and run.seed == table.pictures.seed}
        chain_pictures.write_pictures(chain.name, table.pictures, shown, folder)
        without = chain_pictures.missing_picture(table.pictures, shown)
        notes += (f"pictures.png: {without}: correct table.pictures and call again.",) if without else ()
    if console is None:
        return False
    console.print()
    chain_table.print_table(table, results, console)
    files = ["table.md", "table.csv", "table.png", *(["curves.csv", "curves.png"] if table.curves else [])]
    files += ["lines.csv", "lines.png"] if table.lines is not None else []
    files += ["pictures.png"] if table.pictures is not None else []
    written = f"Written to {folder}/{', '.join(files)} and results.csv."
    console.print("\n" + "\n".join([*notes, provenance, written]), markup=False)
    chain_table.log_to_wandb(chain.name, table, results, folder)
    missing = [(run, name) for run in done for name in table.metrics if name not in (run.metrics() or {})]
    for run, name in missing[:1]:
        has = ", ".join(run.metrics() or {}) or "none"
        console.print(
            f"{run.name} has no metric {name!r}; it has {has}: correct table.metric and call again.", markup=False
        )
    return bool(missing) or choice.lacks_metric


def _run_all(
    chain: Chain,
    everything: Sequence[Run],
    runs: Sequence[Run],
    warm: chain_launch.WarmProcesses,
    checked: dict[str, chain_launch.Checked],
    verbose: bool,
    console: Console,
) -> int:
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.stage.name}, seed {run.seed}:"
        if run.finished:
            run.check_record()  # its parent may have been run again a moment ago
            console.print(f"{label} finished, skipped{_key_metric(chain, run)}", markup=False)
            continue
        run.begin()
        found = checked[run.stage.name]
        several = chain_launch.device_count(found.config, found.gpus) > 1
        verb = "continues" if run.checkpoint.exists() else "starts"
        console.print(f"{label} {verb} (log: {run.log})", markup=False)
        begin = time.monotonic()
        with _waiting(console, label, verbose):
            code = warm.run(run.argv, run.log, own_process=several, verbose=verbose)
        if code == 0 and not run.finished:
            console.print(
                f"{label} ended without handing a network over ({run.folder}/model is missing).", markup=False
            )
            code = 1
        if code:
            _print_failure(chain, run, code, console)
            return code
        console.print(
            f"{label} finished in {_duration(time.monotonic() - begin)}{_key_metric(chain, run)}", markup=False
        )
        last_of_seed = number == len(runs) or runs[number].seed != run.seed
        if chain.table is not None and last_of_seed and number < len(runs):
            finish_table(chain, everything)
    return 0


def _check(chain: Chain, runs: Sequence[Run], warm: chain_launch.WarmProcesses) -> dict[str, chain_launch.Checked]:
    """Check every stage's command once, and for every run where it would continue."""
    checkpoints = [run.checkpoint if run.checkpoint.exists() and not run.finished else None for run in runs]
    first = {run.stage.name: index for index, run in reversed(list(enumerate(runs)))}
    commands = [run.argv if first[run.stage.name] == index else [] for index, run in enumerate(runs)]
    found = warm.check(commands, checkpoints)
    for run, result in zip(runs, found, strict=True):
        if result.error:
            raise ValueError(f"{chain.path}: stage {run.stage.name}: {result.error}")
    stages = {name: found[index] for name, index in first.items()}
    return {**stages, **{run.name: result for run, result in zip(runs, found, strict=True)}}


def _print_plan(chain: Chain, runs: Sequence[Run], checked: dict[str, chain_launch.Checked], console: Console) -> None:
    console.print(f"{chain.name}: {len(runs)} runs, nothing is started.", markup=False)
    for number, run in enumerate(runs, start=1):
        state = "new"
        if run.finished:
            state = "finished"
        elif run.checkpoint.exists():
            step = checked[run.name].step
            state = "continues" if step is None else f"continues from step {step}"
        origin = " and ".join(f"{link} {parent.folder}" for link, parent in run.parents.items()) or "random weights"
        head = f"[{number}/{len(runs)}] {run.stage.name}, seed {run.seed}, {run.stage.recipe}, {origin}: {state}"
        console.print(f"{head}\n    {shlex.join(['baton', *run.argv])}", markup=False)


def _print_failure(chain: Chain, run: Run, code: int, console: Console) -> None:
    with contextlib.suppress(OSError):
        for line in run.log.read_text(errors="replace").splitlines()[-15:]:
            console.print(f"  | {line}", markup=False)
    console.print(
        f"The stage {run.stage.name} with seed {run.seed} ended with exit code {code}: see {run.log}; "
        f"'baton chain {shlex.quote(str(chain.path))}' continues from there once the cause is mended.",
        markup=False,
    )


@contextlib.contextmanager
def _waiting(console: Console, label: str, verbose: bool) -> Iterator[None]:
    """Show on a terminal that a stage is running, and for how long."""
    if verbose or not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(label, total=None)
        yield


def _key_metric(chain: Chain, run: Run) -> str:
    metrics = run.metrics() or {}
    table = chain.table
    name = next((name for name in (table.metrics if table else ()) if metrics.get(name) is not None), None)
    if table is None or name is None:
        return ""
    style = table.style_of(name)
    return f", {chain_table.heading(table, name)} {style.scale * metrics[name]:.{style.digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


@contextlib.contextmanager
def _lock(chain: Chain, root: Path) -> Iterator[None]:
    """Let one process at a time run a chain; the lock goes with the process, however it ends."""
    folder = root / chain.name
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        chain_launch.hold(file, f"The chain {chain.name} is running already (it holds {folder}/.lock); wait for it.")
        yield
    finally:
        os.close(file)


def _submit(
    chain: Chain,
    runs: Sequence[Run],
    root: Path,
    entry: str,
    options: dict[str, Any],
    cluster: str | None,
    console: Console,
) -> int:
    todo = [run for run in runs if not run.finished]
    jobs = [
        chain_slurm.Job(run.name, functools.partial(run_stage, run, entry), tuple(p.name for p in run.parents.values()))
        for run in todo
    ]
    submitted = chain_slurm.submit(jobs, root / chain.name / "slurm", options, cluster)
    for run in todo:
        console.print(f"{run.stage.name}, seed {run.seed}: job {submitted[run.name].job_id}", markup=False)
    if cluster in (None, "slurm"):
        console.print("Call the same command again when the jobs have ended: it writes the table.")
        return 0
    code = max(submitted[run.name].result() for run in todo)
    if code == 0 and chain.table is not None:
        finish_table(chain, plan(chain, root), console)
    return code


def run_stage(run: Run, entry: str = chain_launch.ENTRY) -> int:
    """Run one stage in this process (a Slurm job); raises where it fails, so that the jobs after it never start."""
    if run.finished:
        return 0
    if os.environ.get("SLURM_PROCID", "0") == "0":
        run.begin()
    code = chain_launch.run_here(run.argv, entry)
    if code:
        raise RuntimeError(f"the stage {run.stage.name} with seed {run.seed} ended with exit code {code}.")
    return 0
