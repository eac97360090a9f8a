"""How long a user waits: `baton --help`, `baton fit` up to the first step, and what a chain costs for each stage.

    python benchmarks/start_up.py

Wall-clock seconds of whole processes; the cost of a stage is the slope between chains of two and of six stages, whose
training is negligible, so it includes parsing, data, W&B (offline), checkpoints, hand-over and test.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = {"data.size": 16, "data.length": 32, "data.val_length": 16, "data.test_length": 16}


def seconds(*args: str, until: Path | None = None) -> float:
    """Time a `baton` command, to its end or until a file has more than its header."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "baton", *args], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if until is not None and until.exists() and len(until.read_text().splitlines()) > 1:
            break
        time.sleep(0.01)
    elapsed = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit(f"baton {' '.join(args)} failed")
    return elapsed


def chain(folder: Path, stages: int) -> float:
    """Time a chain of a pretext stage and fine-tuning stages after it."""
    options = ", ".join(f"{name}: {value}" for name, value in (TINY | {"trainer.max_epochs": 1}).items())
    text = f"name: c{stages}\nseeds: [0]\nset: {{{options}}}\nstages:\n"
    text += f"  pretrain: {{recipe: {ROOT}/configs/ssl_tasks/denoising_shapes.yaml}}\n"
    for number in range(1, stages):
        recipe = f"{ROOT}/configs/supervised/few_labels_shapes.yaml"
        text += f"  tune{number}: {{recipe: {recipe}, init_from: pretrain, set: {{data.labels_per_class: 2, "
        text += "trainer.check_val_every_n_epoch: 1}}\n"
    text += "table: {metric: test/error, rows: {tuned: tune1}}\n"
    file = folder / f"c{stages}.yaml"
    file.write_text(text)
    return seconds("chain", str(file), "--root", str(folder / "runs"))


def main() -> None:
    os.environ.pop("WANDB_MODE", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _say("baton --help", min(seconds("--help") for _ in range(3)), 1.0)
        _say("baton list backbones", min(seconds("list", "backbones") for _ in range(3)), 1.0)
        recipe = str(ROOT / "configs/ssl_tasks/denoising_shapes.yaml")
        args = ["fit", "--config", recipe, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
        args += [f"--{key}={value}" for key, value in TINY.items()]
        metrics = folder / "runs/first/metrics.csv"
        _say(
            "baton fit to the first step",
            seconds(*args, f"--run.root={folder}/runs", "--run.name=first", until=metrics),
            15.0,
        )
        two, six = chain(folder, 2), chain(folder, 6)
        _say("a chain's cost for a stage after the first", (six - two) / 4, 2.0)


def _say(what: str, value: float, target: float) -> None:
    print(f"{what}: {value:.2f} s (target {target:g} s) {'pass' if value <= target else 'FAIL'}", flush=True)


if __name__ == "__main__":
    main()
