import functools
import sys
from pathlib import Path

import pytest

from baton.chain_slurm import Job, parse_slurm, submit


def note(path: Path, text: str) -> int:
    """Module level, so that it can be pickled by name."""
    with path.open("a") as file:
        file.write(f"{text}\n")
    return 0


def test_jobs_run_parents_first(tmp_path):
    pytest.importorskip("submitit")
    jobs = [
        Job("parent", functools.partial(note, tmp_path / "out", "parent"), ()),
        Job("child", functools.partial(note, tmp_path / "out", "child"), ("parent", "finished long ago")),
    ]
    submitted = submit(jobs, tmp_path / "slurm", {"timeout_min": 1, "partition": "x"}, cluster="debug")
    assert submitted["child"].result() == 0
    assert (tmp_path / "out").read_text() == "parent\nchild\n"


def test_children_depend_on_their_parents_jobs(tmp_path, monkeypatch):
    """On Slurm itself the queue keeps the order: look at what sbatch is given."""
    submitit = pytest.importorskip("submitit")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    answer = f'echo "Submitted batch job 4$(wc -l < {tmp_path}/n)"'
    sbatch.write_text(f'#!/bin/sh\ncat "$1" >> {tmp_path}/scripts\n{answer}\n'
                      f"echo >> {tmp_path}/n\n")  # fmt: skip
    sbatch.chmod(0o755)
    (tmp_path / "n").write_text("")
    import os

    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    (sbatch.parent / "srun").symlink_to(sbatch)
    jobs = [Job("a", dict, ()), Job("b", dict, ("a",)), Job("c", dict, ("a", "b")), Job("d", dict, ())]
    options = {"partition": "gpu", "gpus_per_node": 4, "additional_parameters": {"qos": "high"}}
    submitted = submit(jobs, tmp_path / "slurm", options)
    assert [job.job_id for job in submitted.values()] == ["40", "41", "42", "43"]
    scripts = (tmp_path / "scripts").read_text().split("#!/bin/bash")[1:]
    dependencies = [[line for line in text.splitlines() if "dependency" in line] for text in scripts]
    assert dependencies == [[], ["#SBATCH --dependency=afterok:40"], ["#SBATCH --dependency=afterok:40:41"], []]
    assert all("#SBATCH --partition=gpu" in text and "#SBATCH --qos=high" in text for text in scripts)


def test_errors_are_sentences(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=r"submitit refuses: .*partitoin"):
        submit([Job("a", dict, ())], tmp_path, {"slurm_partitoin": "x", "nonsense": 1}, cluster="debug")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'baton-vision\[slurm\]'"):
        submit([], tmp_path, {}, cluster="debug")


def test_parse_slurm():
    assert parse_slurm(["partition=gpu", "gpus_per_node=4", "comment=a=b"]) == {
        "partition": "gpu",
        "gpus_per_node": 4,
        "comment": "a=b",
    }
    with pytest.raises(ValueError, match=r"expects key=value .* not 'gpu'"):
        parse_slurm(["gpu"])
