"""How a stage of a chain becomes a process: forked from a warm one, a plain subprocess for DDP, or a Slurm job.

Importing the libraries takes about ten seconds, so one server process imports them once (multiprocessing's
fork server) and every stage is a fork of it. Nothing in the server may start threads or touch CUDA: a fork
inherits neither. A stage that trains on several devices is run by its fork as ``python -m baton …``,
because DDP starts its other ranks from the command line.

A stage is a process group of its own. The terminal's Ctrl-C therefore reaches the chain alone, which passes
exactly one on; and when the chain dies, whatever the stage has started dies with it.
"""

import contextlib
import fcntl
import importlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

#: What a stage imports anyway.
PRELOAD = ("baton.warm_start",)
ENTRY = "baton.cli:main"
INTERRUPTED = 130


@dataclass(frozen=True)
class Checked:
    """What the check of one stage found.

    Attributes:
        error: one sentence, or None.
        config: the stage's whole configuration with every default, as far as the entry prints it.
        gpus: GPUs this machine has.
        step: step of the run's last checkpoint, if it has one.
    """

    error: str | None
    config: dict[str, Any] = field(default_factory=dict)
    gpus: int = 0
    step: int | None = None


def check_stage(argv: list[str], entry: str = ENTRY) -> dict[str, Any]:
    """Parse a stage's command without running it, so that a misspelt option fails now and not at hour three.

    If the entry's module has a function ``check(argv) -> dict``, that is asked; else the entry is called with
    ``--print_config``, which finds unknown options and wrong types, but not an unknown backbone's name.

    Args:
        argv: the stage's command.
        entry: "module:function" that runs a stage.

    Returns:
        The stage's whole configuration.

    Raises:
        ValueError: with the entry's own sentence, if it refuses the command.
    """
    check = getattr(importlib.import_module(entry.partition(":")[0]), "check", None)
    if check is not None:
        return check(argv)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _entry(entry)([*argv, "--print_config"])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code:
        said = " ".join(err.getvalue().split()).rpartition("baton: error: ")[2]
        raise ValueError(said or f"the check ended with exit code {code}.")
    try:
        config = yaml.safe_load(out.getvalue())
    except yaml.YAMLError:
        config = None
    return config if isinstance(config, dict) else {}


def device_count(config: dict[str, Any], gpus: int) -> int:
    """Processes a stage's trainer will start, from its configuration and the machine's number of GPUs."""
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes") or 1
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name.strip()]
    elif isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        return max(len(devices), 1) * int(nodes)
    if devices in ("auto", -1, None):
        devices = 1 if trainer.get("accelerator") in ("cpu", "mps") else max(gpus, 1)
    return int(devices) * int(nodes)


class WarmProcesses:
    """Starts stages as forks of one process that has imported the libraries.

    Args:
        entry: "module:function" that runs a stage.
        preload: modules to import once.
    """

    def __init__(self, entry: str = ENTRY, preload: Sequence[str] = PRELOAD) -> None:
        self.entry = entry
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*preload, __name__])
        # Asking CUDA how many devices there are would make CUDA unusable in every fork; asking the driver does not.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        with _ctrl_c_ignored():
            forkserver.ensure_running()  # its imports go on in the background

    def check(self, commands: Sequence[list[str]], checkpoints: Sequence[Path | None]) -> list[Checked]:
        """Check stages (see :func:`check_stage`) in one warm process.

        Args:
            commands: one argv a stage; an empty one is not checked.
            checkpoints: each one's last checkpoint, to say at which step it continues.
        """
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_check_all, args=(sender, self.entry, list(commands), list(checkpoints)))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            raise RuntimeError("the process that checks the stages died; run one stage by hand to see why.") from None
        except KeyboardInterrupt:
            process.kill()
            raise
        process.join()
        return found

    def run(self, argv: list[str], log: Path, *, own_process: bool = False, verbose: bool = False) -> int:
        """Run one stage and wait for it.

        Args:
            argv: the stage's command.
            log: file that receives everything the stage prints.
            own_process: start it as ``python -m baton …`` (several devices).
            verbose: show what it prints as well.

        Returns:
            The exit code, 128 + n if signal n ended it.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when the stage has ended.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        process = self.context.Process(target=_stage, args=(self.entry, argv, str(log), own_process))
        process.start()
        with _shown(log, start) if verbose else contextlib.nullcontext():
            try:
                process.join()
            except KeyboardInterrupt:
                _interrupt(process)
                raise
            finally:
                _sweep(process)
        code = process.exitcode or 0
        return 128 - code if code < 0 else code


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A process started within never sees Ctrl-C: the server would answer it with a traceback while it imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(process: BaseProcess) -> None:
    """Pass Ctrl-C on and let the stage save; a second Ctrl-C ends it at once."""
    assert process.pid is not None
    try:
        _send(process.pid, signal.SIGINT)
        process.join()
    except KeyboardInterrupt:
        _sweep(process)
        process.join()


def _sweep(process: BaseProcess) -> None:
    """End what a stage has left behind (workers of one that crashed), or all of it."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _entry(name: str) -> Callable[[list[str]], int]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _die_with_the_chain() -> None:
    """Make this process a group of its own that ends when the chain (or the server it was forked from) does."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chain, server = multiprocessing.parent_process(), os.getppid()
    assert chain is not None

    def watch() -> None:
        while not wait([chain.sentinel], timeout=1.0) and os.getppid() == server:
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="chain-watch", daemon=True).start()


def _check_all(answer: Connection, entry: str, commands: list[list[str]], checkpoints: list[Path | None]) -> None:
    _die_with_the_chain()
    torch = sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch is not None else 0
    found = []
    for argv, checkpoint in zip(commands, checkpoints, strict=True):
        try:
            found.append(Checked(None, check_stage(argv, entry) if argv else {}, gpus, _step(checkpoint)))
        except Exception as error:  # whatever it is, it belongs into one sentence of the chain's
            text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
            found.append(Checked(" ".join(text.split())))
    answer.send(found)


def _step(checkpoint: Path | None) -> int | None:
    if checkpoint is None or "torch" not in sys.modules:
        return None
    try:
        loaded = sys.modules["torch"].load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return int(loaded["global_step"])
    except Exception:  # the stage itself will say what is wrong with its checkpoint
        return None


def _stage(entry: str, argv: list[str], log: str, own_process: bool) -> None:
    """Be the stage: in a fork of the warm process, with the log as standard output."""
    _die_with_the_chain()
    _write_to(log)
    print(f"$ baton {' '.join(argv)}", flush=True)
    try:
        code = _relay(entry, argv) if own_process else run_here(argv, entry)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def run_here(argv: list[str], entry: str = ENTRY) -> int:
    """Run a stage in this process and return its exit code."""
    sys.argv = ["baton", *argv]  # what the stage believes it was called with
    try:
        return _entry(entry)(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _relay(entry: str, argv: list[str]) -> int:
    """Run the stage as a subprocess: for DDP, which starts its ranks from the command line of their parent."""
    module = entry.partition(":")[0].removesuffix(".cli")
    process = subprocess.Popen([sys.executable, "-m", module, *argv])
    signal.signal(signal.SIGINT, lambda number, _: _send(process.pid, number))
    code = process.wait()
    return 128 - code if code < 0 else code


def _write_to(log: str) -> None:
    """Send this process's output to the log, and hold the log: two processes never run the same stage.

    The lock belongs to the open file, so it also waits for what an earlier stage has left behind.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    hold(file, f"Another process still runs this stage (it holds {log}).", seconds=60.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def hold(file: int, message: str, seconds: float = 0.0) -> None:
    """Lock an open file for as long as it is open.

    Raises:
        ValueError: with the message, if it is still locked by another process after the given time (seconds).
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise ValueError(message) from None
            time.sleep(0.05)


@contextlib.contextmanager
def _shown(log: Path, start: int) -> Iterator[None]:
    """Copy what is written to the log, from byte ``start`` on, to the terminal."""
    done = threading.Event()

    def copy() -> None:
        position, last = start, False
        while True:
            last = done.is_set()
            if log.exists():
                with log.open("rb") as file:
                    file.seek(position)
                    new = file.read()
                position += len(new)
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
            if last:
                return
            done.wait(0.1)

    thread = threading.Thread(target=copy, name="log-view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
