"""`baton list`: what there is, read from source files, because importing torch and timm would take seconds."""

import ast
import difflib
import fnmatch
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent
_TASK_FOLDERS = ("ssl_tasks", "supervised", "distill")
_REGISTERED = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
WORDS = ("backbones", "tasks", "data")
USAGE = """usage: baton list [backbones | tasks | data] [FILTER]

FILTER is part of a name, or a pattern with wildcards ("wrn_*").
"""


def run_list(args: Sequence[str]) -> int:
    """Print names, one a line; without an argument, how many there are.

    Raises:
        ValueError: an unknown word, or nothing matches.
    """
    if any(arg in ("-h", "--help") for arg in args):
        print(USAGE, end="")
        return 0
    if not args:
        lines = [(f"baton list {word}", f"{len(_entries(word))} names") for word in WORDS]
    else:
        word, *filters = args
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS, 1)
            raise ValueError(f"`baton list` knows {', '.join(WORDS)}, not {word!r}{_nearest_are(near)}.")
        if len(filters) > 1:
            raise ValueError(f"`baton list {word}` takes one filter, got {' '.join(filters)}; quote its wildcards.")
        lines = _matching(word, _entries(word), filters[0] if filters else "")
    _print(lines)
    return 0


def backbone_names() -> list[str]:
    """Names of all backbones, timm's and Baton's, in natural order; deprecated names are left out, as timm does."""
    folders = [_HERE / "backbones"]
    timm = importlib.util.find_spec("timm")
    if timm is not None and timm.submodule_search_locations:
        folders.append(Path(timm.submodule_search_locations[0]) / "models")
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    names = {name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))}
    return sorted(names, key=_natural)


def task_names() -> dict[str, str]:
    """Names of all tasks with the first line of their description."""
    return _subclasses("Task", [file for folder in _TASK_FOLDERS for file in sorted((_HERE / folder).glob("*.py"))])


def data_names() -> dict[str, str]:
    """Names of all data modules with the first line of their description."""
    return _subclasses("ImageData", sorted((_HERE / "data").glob("*.py")))


def _entries(word: str) -> list[tuple[str, str]]:
    if word == "backbones":
        return [(name, "") for name in backbone_names()]
    return sorted((task_names() if word == "tasks" else data_names()).items())


def _matching(word: str, entries: list[tuple[str, str]], filter: str) -> list[tuple[str, str]]:
    """Entries whose name matches a pattern, or holds it where it has no wildcards; case does not matter."""
    pattern = filter.lower() if any(letter in filter for letter in "*?[") else f"*{filter.lower()}*"
    matching = [entry for entry in entries if fnmatch.fnmatchcase(entry[0].lower(), pattern)]
    if not matching:
        by_lower = {name.lower(): name for name, _ in entries}
        near = difflib.get_close_matches(filter.strip("*?").lower(), list(by_lower), 3)
        raise ValueError(
            f"Nothing in `baton list {word}` matches {filter!r}{_nearest_are([by_lower[n] for n in near])}."
        )
    return matching


def _subclasses(base: str, files: Sequence[Path]) -> dict[str, str]:
    """Public classes in these files that derive from `base`, directly or not, with their first docstring line.

    Classes that are there to be derived from say so: "Base of …".
    """
    classes: dict[str, tuple[list[str], str]] = {}
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(parent).rpartition(".")[2] for parent in node.bases]
                classes[node.name] = (bases, (ast.get_docstring(node) or "").partition("\n")[0])
    found, size = {base}, 0
    while len(found) > size:
        size = len(found)
        found |= {name for name, (bases, _) in classes.items() if found & set(bases)}
    texts = {name: classes[name][1] for name in found - {base} if not name.startswith("_")}
    return {name: text for name, text in texts.items() if not text.startswith("Base of ")}


def _natural(name: str) -> list[int | str]:
    """Sort key in which `wrn_16_8` stands before `wrn_16_10`, as in timm."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _nearest_are(near: Sequence[str]) -> str:
    return f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""


def _print(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    if not sys.stdout.isatty():
        print("\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines))
        return
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    if not any(text for _, text in lines):
        Console().print(Columns([name for name, _ in lines], padding=(0, 2)))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for line in lines:
        table.add_row(*line)
    Console().print(table)
