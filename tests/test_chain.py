"""Chains of stages that train nothing (``fake_stage``): order, skipping, kills, Ctrl-C, failures, the table."""

import csv
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baton.chain import main, run_chain

HERE = str(Path(__file__).parent)
FAKE = {"entry": "fake_stage:main", "preload": ("fake_stage", "pytest")}
CHAIN = """
name: demo
seeds: [0, 1, 2]
stages:
  pretrain: {recipe: r.yaml, set: {steps: 4}}
  finetune: {recipe: r.yaml, init_from: pretrain, set: {error: 0.25}}
  scratch: {recipe: r.yaml}
table: {metric: [test/error, test/loss], scale: 100, unit: "%", rows: {scratch: scratch, fine-tuned: finetune}}
"""
ORDER = [f"demo/{stage}/seed_{seed}" for seed in (0, 1, 2) for stage in ("pretrain", "finetune", "scratch")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("steps: 3\n")
    Path("chain.yaml").write_text(CHAIN)
    Path("runs").mkdir()
    return tmp_path


def calls() -> list[str]:
    path = Path("runs/calls.txt")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def hashes() -> dict[str, str]:
    return {name: json.loads(Path("runs", name, "model/config.json").read_text())["baton"]["sha256"] for name in ORDER}


def start() -> subprocess.Popen:
    """The chain in a process and process group of its own, as a terminal starts it."""
    code = "import sys; sys.argv[0] = 'baton'; from baton.chain import run_chain; "
    code += "sys.exit(run_chain('chain.yaml', entry='fake_stage:main', preload=('fake_stage',)))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_runs_everything_once_in_order_and_ends_with_the_table(here, capsys):
    assert run_chain("chain.yaml", **FAKE) == 0
    assert calls() == ORDER
    shown = capsys.readouterr().out
    assert "[2/9] finetune, seed 0: finished in 0 s, test/error (%) 25.00" in shown
    errors = [100 * (0.25 + 0.01 * seed**2) for seed in (0, 1, 2)]
    cell = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"
    assert cell in shown
    assert f"| fine-tuned | {cell} |" in Path("runs/demo/table.md").read_text()
    assert {path.name for path in Path("runs/demo").glob("*.*")} >= {
        "table.md",
        "table.csv",
        "table.png",
        "results.csv",
    }

    begin = time.monotonic()
    assert run_chain("chain.yaml", **FAKE) == 0  # again: nothing runs, the table is there
    assert time.monotonic() - begin < 5
    assert calls() == ORDER
    shown = capsys.readouterr().out
    assert "all 9 runs are finished" in shown
    assert cell in shown


def test_the_table_is_partial_until_the_last_seed(here):
    Path("chain.yaml").write_text(
        CHAIN.replace("scratch: {recipe: r.yaml}", "scratch: {recipe: r.yaml, seeds: [0, 1, 2]}")
    )
    assert run_chain("chain.yaml", seeds=[0, 2], **FAKE) == 0
    assert calls() == ORDER[:3] + ORDER[6:]
    assert Path("runs/demo/table.md").read_text().count("2 of 3 seeds") == 2
    assert run_chain("chain.yaml", only=["finetune"], **FAKE) == 0
    assert calls()[6:] == ORDER[3:5]
    text = Path("runs/demo/table.md").read_text()
    assert text.count("2 of 3 seeds") == 1
    assert "seeds 0, 1, 2;" in text


def test_a_failing_stage_stops_the_chain_and_a_mended_one_continues(here, capsys):
    Path("chain.yaml").write_text(CHAIN.replace("error: 0.25", "error: 0.25, fail: 7"))
    assert run_chain("chain.yaml", **FAKE) == 7
    assert calls() == ORDER[:2]
    shown = capsys.readouterr().out
    assert "  | something went wrong" in shown
    assert "The stage finetune with seed 0 ended with exit code 7: see runs/demo/finetune/seed_0.log; " in shown
    assert "'baton chain chain.yaml' continues" in shown
    shutil.rmtree("runs/demo/finetune/seed_0")
    Path("chain.yaml").write_text(CHAIN)
    assert run_chain("chain.yaml", **FAKE) == 0
    assert calls() == ORDER[:2] + ORDER[1:]


def test_a_stage_that_hands_nothing_over_has_failed(here, capsys, tmp_path):
    (tmp_path / "empty_stage.py").write_text("def main(argv):\n    return 0\n")
    sys.path.insert(0, str(tmp_path))
    try:
        assert run_chain("chain.yaml", entry="empty_stage:main", preload=()) == 1
    finally:
        sys.path.remove(str(tmp_path))
    assert (
        "ended without handing a network over (runs/demo/pretrain/seed_0/model is missing)" in capsys.readouterr().out
    )


def test_a_misspelt_option_is_found_before_anything_runs(here):
    Path("chain.yaml").write_text(
        CHAIN.replace("scratch: {recipe: r.yaml}", "scratch: {recipe: r.yaml, set: {stpes: 3}}")
    )
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"chain\.yaml: stage scratch: unknown option stpes"):
            run_chain("chain.yaml", dry_run=dry_run, **FAKE)
    assert calls() == []


def test_stale_and_edited_stages_are_refused_up_front(here):
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 0
    Path("chain.yaml").write_text(CHAIN.replace("steps: 4", "steps: 5"))
    with pytest.raises(
        ValueError, match=r"pretrain/seed_0 is finished, but steps was 4 and is now 5: delete that folder"
    ):
        run_chain("chain.yaml", **FAKE)
    shutil.rmtree("runs/demo/pretrain/seed_0")
    with pytest.raises(
        ValueError, match=r"finetune/seed_0 is finished, but the run it started from, demo/pretrain/seed_0"
    ):
        run_chain("chain.yaml", **FAKE)  # found as soon as the parent has been trained again
    assert calls() == [*ORDER[:3], ORDER[0]]
    shutil.rmtree("runs/demo/finetune/seed_0")
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 0


def test_dry_run_prints_the_plan_and_writes_nothing(here, capsys):
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 0
    Path("runs/demo/pretrain/seed_1/checkpoints").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    shutil.rmtree("runs/demo/scratch/seed_0/model")
    capsys.readouterr()
    assert run_chain("chain.yaml", dry_run=True, **FAKE) == 0
    assert [path for path in before if not path.exists()] == [
        Path("runs/demo/scratch/seed_0/model"), Path("runs/demo/scratch/seed_0/model/config.json")
    ]  # fmt: skip
    assert sorted(Path().rglob("*")) == [path for path in before if path.exists()]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: 9 runs, nothing is started."
    assert lines[1].startswith("[1/9] pretrain, seed 0, r.yaml, random weights: finished")
    assert lines[3] == "[2/9] finetune, seed 0, r.yaml, init_from runs/demo/pretrain/seed_0: finished"
    assert lines[5].endswith("random weights: continues")
    assert lines[7].endswith(": new")
    command = shlex.split(lines[8])
    assert command[:6] == ["baton", "fit", "--config", "r.yaml", "--run.root", "runs"]
    assert command[-2:] == ["--steps", "4"]


def test_a_dry_run_of_a_new_chain_makes_no_folder(here):
    Path("runs").rmdir()
    assert run_chain("chain.yaml", dry_run=True, **FAKE) == 0
    assert not Path("runs").exists()


def test_a_chain_runs_once_at_a_time(here):
    Path("chain.yaml").write_text(CHAIN.replace("steps: 4", "steps: 400, pause: 0.05"))
    chain = start()
    try:
        wait_until(lambda: calls() == ORDER[:1])
        with pytest.raises(ValueError, match=r"The chain demo is running already \(it holds runs/demo/\.lock\)"):
            run_chain("chain.yaml", **FAKE)
    finally:
        chain.kill()
        chain.wait()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_numbers_of_an_undisturbed_chain(here):
    text = CHAIN.replace("steps: 4", "steps: 6, pause: 0.05").replace(
        "error: 0.25", "error: 0.25, spawn: 1, pause: 0.05"
    )
    Path("chain.yaml").write_text(text)
    assert run_chain("chain.yaml", **FAKE) == 0
    expected, table = hashes(), Path("runs/demo/table.csv").read_text()
    shutil.rmtree("runs")
    Path("runs").mkdir()
    for number in range(4):
        chain = start()
        wait_until(
            lambda n=number: len(calls()) > 2 * n and Path("runs", calls()[-1], "checkpoints/last.ckpt").exists()
        )
        pids = [int(line.split()[1]) for line in Path("runs/calls.txt").read_text().splitlines()]
        workers = [int(path.read_text() or 0) for path in Path("runs").rglob("worker.pid")]
        os.kill(chain.pid, signal.SIGKILL)
        chain.wait()
        wait_until(lambda p=pids + workers: all(gone(pid) for pid in p if pid), seconds=3.0)
    assert run_chain("chain.yaml", **FAKE) == 0
    assert len(calls()) > len(ORDER)
    assert hashes() == expected
    assert Path("runs/demo/table.csv").read_text() == table


def test_an_orphan_and_its_workers_end_with_the_chain(here):
    Path("chain.yaml").write_text(CHAIN.replace("steps: 4", "steps: 4000, pause: 0.05, spawn: 1"))
    chain = start()
    worker = Path("runs/demo/pretrain/seed_0/worker.pid")
    wait_until(lambda: worker.exists() and worker.read_text())
    stage = int(Path("runs/calls.txt").read_text().split()[1])
    assert not gone(stage)
    os.kill(chain.pid, signal.SIGKILL)
    chain.wait()
    wait_until(lambda: gone(stage) and gone(int(worker.read_text())), seconds=3.0)


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_lets_the_stage_save_and_ends_with_130(here, whole_group):
    """A terminal signals the whole process group, `kill -INT` the chain alone; the stage sees one either way."""
    Path("chain.yaml").write_text(CHAIN.replace("steps: 4", "steps: 4000, pause: 0.02"))
    chain = start()
    wait_until(lambda: Path("runs/demo/pretrain/seed_0/checkpoints/last.ckpt").exists())
    if whole_group:
        os.killpg(chain.pid, signal.SIGINT)
    else:
        os.kill(chain.pid, signal.SIGINT)
    output, _ = chain.communicate(timeout=20)
    assert chain.returncode == 130
    assert Path("runs/demo/pretrain/seed_0/saved_on_interrupt").exists()
    assert output.splitlines()[1:] == ["Interrupted: the same command continues where it stopped."]


def test_several_devices_run_as_a_plain_process(here):
    Path("chain.yaml").write_text(CHAIN.replace("steps: 4", "steps: 4, trainer.devices: 2, report: 1"))
    assert run_chain("chain.yaml", seeds=[0], only=["pretrain"], **FAKE) == 0
    report = json.loads(Path("runs/demo/pretrain/seed_0/model/config.json").read_text())["baton"]["report"]
    assert report["argv"][0].endswith("fake_stage.py")  # DDP starts its ranks from this command line
    assert report["argv"][1:3] == ["fit", "--config"]


def test_a_metric_nobody_logs_is_named_and_the_runs_are_kept(here, capsys):
    Path("chain.yaml").write_text(CHAIN.replace("[test/error, test/loss]", "test/eror"))
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 2
    assert "has no metric 'test/eror'; it has test/error, test/loss" in capsys.readouterr().out
    Path("chain.yaml").write_text(CHAIN)
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 0
    assert calls() == ORDER[:3]


CANDIDATES = """
name: demo
seeds: [0, 1]
stages:
  fast: {recipe: r.yaml, set: {error: 0.2, val: 0.5}}
  slow: {recipe: r.yaml, set: {error: 0.3, val: 0.4}}
  scratch: {recipe: r.yaml, set: {error: 0.6, val: 0.7}}
table:
  metric: test/error
  select: val/error
  scale: 100
  rows: {scratch: scratch, fine-tuned: [fast, slow]}
  curves: val/error
"""


def test_the_candidate_with_the_best_validation_is_shown_once_all_have_finished(here, capsys):
    Path("chain.yaml").write_text(CANDIDATES)
    assert run_chain("chain.yaml", seeds=[0], **FAKE) == 0
    assert "| fine-tuned | – | 2 of 4 runs |" in Path("runs/demo/table.md").read_text()
    assert "chosen" not in capsys.readouterr().out
    assert run_chain("chain.yaml", **FAKE) == 0
    note = "fine-tuned: slow, chosen of 2 by val/error (50.00, 40.00)"
    shown = capsys.readouterr().out
    assert note in shown.splitlines()
    assert "[2/6] slow, seed 0: finished, skipped, test/error 30.00" in shown
    assert "table.png, curves.csv, curves.png and results.csv" in shown
    text = Path("runs/demo/table.md").read_text()
    assert "| fine-tuned | 30.50 ± 0.71 | 2 |" in text
    assert text.endswith(f"\n\n{note}\n")
    for name in ("results", "curves"):
        with Path(f"runs/demo/{name}.csv").open() as file:
            stages = {(row["row"], row["stage"], row["seed"]) for row in csv.DictReader(file)}
        assert stages == {(*row, seed) for row in (("scratch",) * 2, ("fine-tuned", "slow")) for seed in ("0", "1")}
    assert Path("runs/demo/curves.png").stat().st_size > 0


LINES = """
name: demo
seeds: [0, 1]
stages:
  broken: {recipe: r.yaml, seeds: [1], set: {fail: 7}}
  tuned: {recipe: r.yaml, set: {error: 0.25}}
  scratch: {recipe: r.yaml}
table:
  metric: test/error
  rows: {scratch: scratch}
  lines: {x: labels a class, log: true, rows: {fine-tuned: {64: tuned}, from scratch: {64: scratch}}}
"""


def test_lines_are_drawn_over_what_has_finished_and_a_metric_they_lack_is_named(here, capsys):
    def drawn():
        with Path("runs/demo/lines.csv").open() as file:
            return [(row["row"], row["x"], row["stage"], row["seed"], row["value"]) for row in csv.DictReader(file)]

    first = [("fine-tuned", "64", "tuned", "0", "0.25"), ("from scratch", "64", "scratch", "0", "0.5")]
    Path("chain.yaml").write_text(LINES)
    assert run_chain("chain.yaml", **FAKE) == 7
    assert drawn() == first
    Path("chain.yaml").write_text(LINES.replace("  broken:", "  # broken:"))
    assert run_chain("chain.yaml", **FAKE) == 0
    assert drawn() == [first[0], (*first[0][:3], "1", "0.26"), first[1], (*first[1][:3], "1", "0.51")]
    assert Path("runs/demo/lines.png").exists()
    assert "table.png, lines.csv, lines.png and results.csv" in capsys.readouterr().out
    config = Path("runs/demo/tuned/seed_1/model/config.json")
    config.write_text(config.read_text().replace("test/error", "test/eror"))
    assert run_chain("chain.yaml", **FAKE) == 2
    assert "demo/tuned/seed_1 has no metric 'test/error'; it has test/eror, test/loss" in capsys.readouterr().out


PICTURES = """
name: demo
seeds: [4, 0]
set: {picture: reconstruction}
stages:
  sae: {recipe: r.yaml, set: {error: 0.25}}
  swwae: {recipe: r.yaml, init_from: sae, set: {error: 0.5}}
  scratch: {recipe: r.yaml}
table:
  metric: test/error
  rows: {scratch: scratch}
  pictures: {name: reconstruction, rows: {SAE: sae, SWWAE: swwae}}
"""


def test_the_pictures_of_one_seed_are_put_below_each_other_as_far_as_they_have_finished(here, capsys):
    from PIL import Image

    def bands():
        """The colours of the sheet from top to bottom, each with how many rows of pixels it fills; text is grey."""
        sheet = Image.open("runs/demo/pictures.png").convert("RGB")
        rows = [sheet.crop((0, y, sheet.width, y + 1)).getcolors() for y in range(sheet.height)]
        colours = [colour for row in rows for _, colour in row if len(set(colour)) > 1]
        return [(colour, len(list(same))) for colour, same in itertools.groupby(colours)]

    images, sae, swwae = ((4, 0, 0), 64), ((0, 105, 3), 64), ((0, 168, 3), 64)  # of seed 4, after step 3
    Path("chain.yaml").write_text(PICTURES)
    assert run_chain("chain.yaml", only=["sae"], **FAKE) == 0
    assert bands() == [images, sae]
    assert run_chain("chain.yaml", **FAKE) == 0
    assert bands() == [images, sae, swwae]
    assert "table.png, pictures.png and results.csv" in capsys.readouterr().out
    shutil.move("runs/demo/swwae/seed_4", "runs/moved")
    assert run_chain("chain.yaml", only=["scratch"], **FAKE) == 0
    assert bands() == [images, sae]
    assert "no picture" not in capsys.readouterr().out
    shutil.move("runs/moved", "runs/demo/swwae/seed_4")
    Path("chain.yaml").write_text(PICTURES.replace("{name: reconstruction", "{name: reconstrution"))
    assert run_chain("chain.yaml", **FAKE) == 0
    assert bands() == []
    sentence = "sae with seed 4 has no picture 'reconstrution'; it has reconstruction: correct table.pictures and call"
    assert f"pictures.png: {sentence} again." in capsys.readouterr().out.splitlines()


def test_a_choice_by_a_metric_nobody_logs_is_named_and_the_runs_are_kept(here, capsys):
    Path("chain.yaml").write_text(CANDIDATES.replace("select: val/error", "select: val/eror"))
    assert run_chain("chain.yaml", **FAKE) == 2
    sentence = (
        "fine-tuned: nothing is chosen, for fast with seed 0 has no metric 'val/eror'; it has test/error, test/loss"
    )
    assert sentence in capsys.readouterr().out
    text = Path("runs/demo/table.md").read_text()
    assert sentence in text
    assert "| fine-tuned | – | 4 of 4 runs |" in text
    assert "| scratch | 60.50 ± 0.71 | 2 |" in text
    Path("chain.yaml").write_text(CANDIDATES)
    assert run_chain("chain.yaml", **FAKE) == 0
    assert len(calls()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_submitit_runs_the_same_chain(here, cluster, capsys):
    pytest.importorskip("submitit")
    arguments = {"launcher": "slurm", "cluster": cluster, "slurm": ["timeout_min=5"], **FAKE}
    assert run_chain("chain.yaml", seeds=[0], only=["finetune"], **arguments) == 0
    assert calls() == ORDER[:2]
    record = json.loads(Path("runs/demo/finetune/seed_0.json").read_text())
    parent = json.loads(Path("runs/demo/pretrain/seed_0/model/config.json").read_text())
    assert record["parents"]["init_from"]["sha256"] == parent["baton"]["sha256"]
    assert "1 of 3 seeds" in capsys.readouterr().out  # the table knows the runs that were not asked for
    assert run_chain("chain.yaml", seeds=[0], only=["finetune"], **FAKE) == 0  # local and Slurm continue each other
    assert calls() == ORDER[:2]


def test_command_line(here, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--dry-run" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"baton chain: unrecognized arguments: --dry"):
        main(["chain.yaml", "--dryrun"])
    with pytest.raises(
        ValueError, match="--seeds must be whole numbers with commas between them, such as 0,1,2, not 'a'"
    ):
        main(["chain.yaml", "--seeds", "a"])
    with pytest.raises(FileNotFoundError, match=r"The chain file nothing\.yaml does not exist"):
        main(["nothing.yaml"])
    with pytest.raises(ValueError, match="launcher must be local or slurm, not 'k8s'"):
        run_chain("chain.yaml", launcher="k8s")
