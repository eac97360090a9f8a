"""A stage without training, for the tests of chains: counts steps, writes what a real one would write.

Every stage appends a line to ``<root>/calls.txt``. Options: ``--steps N``, ``--pause SECONDS`` a step,
``--fail CODE`` (after the first step), ``--error VALUE`` for the metric (plus the seed), ``--val VALUE`` for val/error,
which falls to it step by step in metrics.csv, ``--picture NAME`` for a picture in every step: bands of the seed's
colour and, below them, of one that depends on the error.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if sys.argv[0] == "-c":  # the fork server: spare it torch, as the `baton` command is spared
    sys.argv[0] = "baton"

KNOWN = {"config", "seed_everything", "model.init_from", "model.init_args.teacher", "trainer.devices",
         "trainer.accelerator", "steps", "pause", "fail", "error", "val", "spawn", "wait_file", "report",
         "picture"}  # fmt: skip


def main(argv: list[str]) -> int:
    check = argv[-1] == "--print_config"
    words = argv[1:-1] if check else argv[1:]
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    for key in options:
        if key not in KNOWN and not key.startswith("run."):
            print(f"baton: error: unknown option {key}", file=sys.stderr)
            return 2
    if check:
        trainer = {"devices": json.loads(options.get("trainer.devices", "1")), "accelerator": "cpu"}
        print(json.dumps({"trainer": trainer}))
        return 0
    folder = Path(options["run.root"]) / options["run.name"]
    with (Path(options["run.root"]) / "calls.txt").open("a") as file:
        file.write(f"{options['run.name']} {os.getpid()}\n")
    last = folder / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True, exist_ok=True)
    state = json.loads(last.read_text()) if last.exists() else {"step": 0, "digest": _start(options)}
    if "spawn" in options and os.fork() == 0:  # a worker, as a DataLoader would start one
        (folder / "worker.pid").write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    try:
        code = _train(state, options, last)
    except KeyboardInterrupt:
        (folder / "saved_on_interrupt").write_text(str(state["step"]))
        return 130
    return code or _hand_over(folder, state, options)


def _start(options: dict[str, str]) -> str:
    parent = options.get("model.init_from")
    weights = json.loads((Path(parent) / "model" / "config.json").read_text())["baton"]["sha256"] if parent else ""
    return hashlib.sha256(f"{weights}{options['seed_everything']}".encode()).hexdigest()


def _train(state: dict, options: dict[str, str], last: Path) -> int:
    for _ in range(state["step"], int(options.get("steps", "3"))):
        time.sleep(float(options.get("pause", "0")))
        state["step"] += 1
        state["digest"] = hashlib.sha256(f"{state['digest']}{state['step']}".encode()).hexdigest()
        last.with_suffix(".new").write_text(json.dumps(state))
        last.with_suffix(".new").replace(last)
        print(f"step {state['step']}")
        if "fail" in options:
            if int(options["fail"]) < 0:
                os.kill(os.getpid(), signal.Signals(-int(options["fail"])))
            print("something went wrong")
            return int(options["fail"])
    return 0


def _hand_over(folder: Path, state: dict, options: dict[str, str]) -> int:
    seed = int(options["seed_everything"])
    value = float(options.get("error", "0.5")) + 0.01 * seed**2
    record = {"sha256": state["digest"], "metrics": {"test/error": value, "test/loss": 2 * value}}
    if "val" in options:
        record["metrics"]["val/error"] = float(options["val"])
        lines = [f"{step},{float(options['val']) * state['step'] / step}" for step in range(1, state["step"] + 1)]
        (folder / "metrics.csv").write_text("\n".join(["step,val/error", *lines, ""]))
    if "picture" in options:
        _draw(folder / "pictures", state["step"], options["picture"], (seed, round(255 * value)))
    if "report" in options:
        record["report"] = _report()
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"baton": record}))
    return 0


def _draw(folder: Path, steps: int, name: str, shades: tuple[int, int]) -> None:
    from PIL import Image  # here: a stage that draws nothing starts faster without

    folder.mkdir(exist_ok=True)
    for step in range(1, steps + 1):
        picture = Image.new("RGB", (40, 22), "white")
        picture.paste((shades[0], 0, 0), (2, 2, 38, 10))
        picture.paste((0, shades[1], step), (2, 12, 38, 20))
        picture.save(folder / f"{name}_epoch_{step:04d}.png")


def _report() -> dict:
    threads = {task.name: (task / "comm").read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").iterdir()}
    return {"argv": sys.argv, "threads_of_server": threads, "pid": os.getpid(), "ppid": os.getppid()}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
