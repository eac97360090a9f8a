import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from baton.chain_launch import WarmProcesses, check_stage, device_count, hold

HERE = str(Path(__file__).parent)


@pytest.fixture
def warm(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", HERE)  # for the fork server and for plain subprocesses
    monkeypatch.syspath_prepend(HERE)
    (tmp_path / "runs").mkdir()
    return WarmProcesses("fake_stage:main", preload=("fake_stage", "pytest"))


def command(tmp_path, *options, name="c/s/seed_0"):
    return ["fit", "--run.root", str(tmp_path / "runs"), "--run.name", name, "--seed_everything", "0", *options]


@pytest.mark.parametrize("own_process", [False, True])
def test_output_goes_to_the_log_and_the_exit_code_comes_back(warm, tmp_path, own_process, capfd):
    log = tmp_path / "deep" / "stage.log"
    assert warm.run(command(tmp_path), log, own_process=own_process) == 0
    assert log.read_text().splitlines()[1:] == ["step 1", "step 2", "step 3"]
    assert log.read_text().startswith("$ baton fit --run.root")
    assert warm.run(command(tmp_path, "--fail", "3", name="f"), log, own_process=own_process) == 3
    assert warm.run(command(tmp_path, "--fail", "-9", name="k"), log, own_process=own_process) == 137
    assert len(log.read_text().splitlines()) == 4 + 3 + 2  # appended, each with its command
    assert "step" not in capfd.readouterr().out


def test_verbose_shows_what_this_stage_prints_and_nothing_older(warm, tmp_path, capsys):
    log = tmp_path / "stage.log"
    log.write_text("older\n")
    assert warm.run(command(tmp_path), log, verbose=True) == 0
    shown = capsys.readouterr().out
    assert shown == log.read_text().removeprefix("older\n")
    assert "step 3" in shown


def test_the_stage_is_a_fork_of_a_server_without_threads(warm, tmp_path):
    import json

    warm.run(command(tmp_path, "--report", "1"), tmp_path / "log")
    report = json.loads((tmp_path / "runs/c/s/seed_0/model/config.json").read_text())["baton"]["report"]
    assert report["argv"][:2] == ["baton", "fit"]
    assert len(report["threads_of_server"]) == 1
    assert report["ppid"] != os.getpid()
    warm.run(command(tmp_path, "--report", "1", name="two"), tmp_path / "log")
    again = json.loads((tmp_path / "runs/two/model/config.json").read_text())["baton"]["report"]
    assert again["ppid"] == report["ppid"]


def test_check_reports_each_stage(warm, tmp_path):
    good, bad = command(tmp_path, "--trainer.devices", "4"), command(tmp_path, "--stpes", "3")
    found = warm.check([good, bad, []], [None, None, None])
    assert [result.error for result in found] == [None, "unknown option stpes", None]
    assert found[0].config == {"trainer": {"devices": 4, "accelerator": "cpu"}}
    assert not any((tmp_path / "runs").iterdir())  # nothing was run


def test_an_entry_with_a_check_of_its_own_is_asked(monkeypatch):
    import types

    def check(argv):
        if "--bad" in argv:
            raise ValueError("no such option --bad")
        return {"trainer": {"devices": 2}}

    monkeypatch.setitem(sys.modules, "own_entry", types.SimpleNamespace(check=check, main=None))
    assert check_stage(["fit"], "own_entry:main") == {"trainer": {"devices": 2}}
    with pytest.raises(ValueError, match="no such option --bad"):
        check_stage(["fit", "--bad"], "own_entry:main")


@pytest.mark.parametrize(
    ("trainer", "gpus", "expected"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"devices": "auto", "accelerator": "cpu"}, 4, 1),
        ({"devices": -1, "accelerator": "gpu"}, 3, 3),
        ({"devices": "-1"}, 3, 3),
        ({"devices": 2, "accelerator": "cpu"}, 0, 2),
        ({"devices": "2"}, 0, 2),
        ({"devices": [1, 3]}, 4, 2),
        ({"devices": [3]}, 4, 1),
        ({"devices": "0,1,2"}, 4, 3),
        ({"devices": "1,"}, 4, 1),
        ({"devices": 1, "num_nodes": 2}, 1, 2),
        ({"devices": 1, "num_nodes": None}, 4, 1),
    ],
)
def test_device_count(trainer, gpus, expected):
    assert device_count({"trainer": trainer}, gpus) == expected
    assert device_count({}, 1) == 1


@pytest.mark.parametrize("own_process", [False, True])
def test_ctrl_c_reaches_the_stage_once_which_saves(warm, tmp_path, own_process):
    folder = tmp_path / "runs/c/s/seed_0"

    def press() -> None:
        while not (folder / "checkpoints/last.ckpt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        warm.run(command(tmp_path, "--steps", "2000", "--pause", "0.02"), tmp_path / "log", own_process=own_process)
    thread.join()
    assert int((folder / "saved_on_interrupt").read_text()) >= 1


def test_what_a_crashed_stage_leaves_behind_is_ended(warm, tmp_path):
    assert warm.run(command(tmp_path, "--spawn", "1", "--pause", "0.2", "--fail", "-9"), tmp_path / "log") == 137
    worker = int((tmp_path / "runs/c/s/seed_0/worker.pid").read_text())
    end = time.monotonic() + 3
    while Path(f"/proc/{worker}").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_process_waits_for_what_holds_the_log(warm, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        hold(file.fileno(), "never")
        threading.Timer(0.5, file.close).start()
        begin = time.monotonic()
        assert warm.run(command(tmp_path), log) == 0
        assert time.monotonic() - begin > 0.4


def test_hold_refuses_with_the_message(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as first, path.open("w") as second:
        hold(first.fileno(), "taken")
        with pytest.raises(ValueError, match="taken"):
            hold(second.fileno(), "taken")
    with path.open("w") as third:
        hold(third.fileno(), "taken")


@pytest.mark.slow
def test_torch_is_whole_after_the_fork(tmp_path):
    """The real libraries are imported without a thread and without CUDA; a stage still computes on two threads."""
    (tmp_path / "probe.py").write_text(
        "import os, sys, time\n"
        "def main(argv):\n"
        "    assert 'torch' in sys.modules and 'lightning.pytorch' in sys.modules and 'baton.stage' in sys.modules\n"
        "    import torch\n"
        "    assert os.listdir(f'/proc/{os.getppid()}/task') == [str(os.getppid())]\n"
        "    assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()\n"
        "    torch.set_num_threads(2)\n"
        "    conv = torch.nn.Conv2d(16, 16, 3)\n"
        "    conv(torch.randn(8, 16, 48, 48)).sum().backward()\n"
        "    assert len(os.listdir('/proc/self/task')) > 1\n"
        "    if torch.cuda.is_available():\n"
        "        conv.cuda()(torch.randn(8, 16, 48, 48, device='cuda')).sum().item()\n"
        "    return 0\n"
    )
    (tmp_path / "drive.py").write_text(
        "import sys, time\n"
        "sys.argv[0] = 'baton'\n"
        "from pathlib import Path\n"
        "from baton.chain_launch import WarmProcesses\n"
        "if __name__ == '__main__':\n"
        "    warm = WarmProcesses('probe:main')\n"
        "    assert warm.run(['fit'], Path('log')) == 0, Path('log').read_text()\n"
        "    begin = time.monotonic()\n"
        "    assert warm.run(['fit'], Path('log')) == 0\n"
        "    print(time.monotonic() - begin)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "drive.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10  # a cold start takes longer; typically 0.4 s
