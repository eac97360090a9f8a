"""Names read from sources are those that importing would give."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import timm

from baton import stage  # noqa: F401 (imports all families)
from baton.data.images import ImageData
from baton.listing import backbone_names, data_names, run_list, task_names
from baton.task import Task


def public_subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("baton.") and not cls.__name__.startswith("_"):
            yield cls
        yield from public_subclasses(cls)


def test_backbones_are_timms_own_list() -> None:
    ours = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("baton.")]
    assert {"wide_resnet", "wrn_16_1"} <= set(ours)
    others = {name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("test")}
    assert backbone_names() == [name for name in timm.list_models() if name not in others]


@pytest.mark.parametrize(("names", "base"), [(task_names, Task), (data_names, ImageData)])
def test_classes_are_the_real_ones(names, base: type) -> None:
    real = {cls.__name__: (cls.__doc__ or "").partition("\n")[0] for cls in public_subclasses(base)}
    bases = {name for name, text in real.items() if text.startswith("Base of")}
    assert bases == ({"MaskData"} if base is ImageData else set())
    assert names() == {name: text for name, text in real.items() if name not in bases}
    assert len(real) >= 2
    assert all(real.values())


def listed(*args: str, capsys: pytest.CaptureFixture) -> list[str]:
    assert run_list(list(args)) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_counts_without_a_word(capsys: pytest.CaptureFixture) -> None:
    assert run_list([]) == 0
    out = capsys.readouterr().out
    assert f"baton list backbones  {len(timm.list_models())} names" in out
    assert [line.split()[2] for line in out.splitlines()] == ["backbones", "tasks", "data"]


def test_filters(capsys: pytest.CaptureFixture) -> None:
    assert listed("backbones", "wrn_*", capsys=capsys) == timm.list_models("wrn_*")
    assert listed("backbones", "mobilenetv4", capsys=capsys) == timm.list_models("*mobilenetv4*")
    assert listed("data", "cifar", capsys=capsys) == ["CIFAR10", "CIFAR100"]
    assert listed("data", "[cm]*1?", capsys=capsys) == ["CIFAR10"]
    assert listed("tasks", "CLASS", capsys=capsys) == ["Classification"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["taks"], "knows backbones, tasks, data, not 'taks'; the nearest is tasks."),
        (["backbones", "wide_resnt"], "matches 'wide_resnt'; the nearest are wide_resnet, "),
        (["data", "cifr10*"], "the nearest are CIFAR10, CIFAR100."),
        (["tasks", "xyzzy"], "Nothing in `baton list tasks` matches 'xyzzy'."),
        (["backbones", "wrn_16_1", "wrn_16_2"], "quote its wildcards"),
    ],
)
def test_mistakes(args: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"baton list") as error:
        run_list(args)
    assert said in str(error.value)


def test_a_terminal_gets_columns() -> None:
    """Wide, and with every name; only a terminal sees it."""
    program = (
        "import sys, io; sys.argv = ['baton']; from baton.listing import run_list\n"
        "class Terminal(io.StringIO):\n    def isatty(self): return True\n"
        "real, sys.stdout = sys.stdout, Terminal(); run_list(['backbones', 'wrn_*']); run_list(['tasks'])\n"
        "shown = sys.stdout.getvalue(); sys.stdout = real; print(shown)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"COLUMNS": "100"}
    ).stdout
    assert set(timm.list_models("wrn_*")) <= set(shown.split())
    assert len(shown.splitlines()[0].split()) > 1
    assert "Classification" in shown
