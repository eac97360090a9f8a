"""The arrows of the house: a module imports only what stands to its left."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/baton"
MODULES = sorted(SOURCE.rglob("*.py"))

#: Which of our own modules (or packages) each place may import, beside itself.
BASE = {"layers", "losses"}
BACKBONES = BASE | {"backbones"}
DATA = {"layers", "losses", "backbones"}
HANDOVER = BACKBONES | {"data", "handover", "freezing", "model_folder", "optim", "random_state"}
TASK = HANDOVER | {"task"}
ALLOWED = {
    "layers": set(),
    "losses": set(),
    "backbones": BASE,
    "data": DATA,
    "freezing": set(),
    "optim": BACKBONES | {"data"},
    "random_state": set(),
    "model_folder": BACKBONES | {"data"},
    "handover": BACKBONES | {"data", "model_folder"},
    "task": HANDOVER,
    "labels": TASK,
    "ssl_tasks": TASK | {"labels"},
    "supervised": TASK | {"labels"},
    "distill": TASK | {"labels"},
    "callbacks": TASK | {"labels"},
}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def place(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """The places of ours a file imports from."""
    places = {name.split(".")[1] for name in imports(path) if name.startswith("baton.")} - {place(path)}
    return {name for name in places if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()}


def test_the_reader_of_imports_reads(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import a.b\nfrom baton import task, optim as o\ndef f():\n    from baton.data.images import Batch\n"
    )
    assert imports(file) == {"a.b", "baton.task", "baton.optim", "baton.data.images.Batch"}
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_to_the_left(path):
    if place(path) in ALLOWED:
        assert own(path) <= ALLOWED[place(path)]


def test_the_families_of_tasks_do_not_know_each_other():
    families = {"ssl_tasks", "supervised", "distill"}
    for path in MODULES:
        if place(path) in families:
            assert not own(path) & families, path


def test_networks_and_losses_know_no_lightning():
    for path in MODULES:
        if place(path) in {"layers", "losses", "backbones"}:
            assert not {name.split(".")[0] for name in imports(path)} & LIGHTNING, path


def test_the_command_is_the_outermost():
    """Nothing but `python -m baton` imports the command, and chains know the command only through processes."""
    for path in MODULES:
        if place(path) not in {"cli", "__main__", "chain_launch"}:
            assert "cli" not in own(path), path
        if place(path) in ALLOWED:
            assert not {name for name in own(path) if name.startswith("chain")} | (own(path) & {"stage", "run"}), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_are_short_and_named(path):
    assert path.stem not in {"utils", "util", "misc", "helpers", "helper", "common"}
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert "from __future__ import annotations" not in text
    assert not re.search(r"(?<!save_)weights_only=False", text)


def test_tests_mirror_the_source():
    tests = Path(__file__).parent
    for path in MODULES:
        if place(path) in {"ssl_tasks", "supervised", "distill", "losses", "layers"} and path.stem != "__init__":
            folder = tests / path.relative_to(SOURCE).parent
            assert (folder / f"test_{path.stem}.py").exists(), path
