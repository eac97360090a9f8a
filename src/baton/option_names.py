"""What the command line says, where a setting was written, and which names are near a misspelt one."""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml


class CommandLine:
    """The words of a command, the recipes they name, and the parser that knows the options.

    Args:
        words: as in `sys.argv[1:]`, beginning with the command.
        parser: LightningCLI's parser or the one of a command; None where options do not matter.
    """

    def __init__(self, words: Sequence[str], parser: Any) -> None:
        self.words = list(words)
        self.command = self.words[0] if self.words else ""
        commands = getattr(getattr(parser, "_subcommands_action", None), "_name_parser_map", {})
        self.parser = commands.get(self.command, parser)

    # What was written

    def options(self) -> Iterator[tuple[str, str | None]]:
        """All options as (dotted key, value)."""
        for position, word in enumerate(self.words):
            if not word.startswith("--"):
                continue
            name, equals, value = word[2:].partition("=")
            following = self.words[position + 1 : position + 2]
            spaced = following[0] if following and not following[0].startswith("--") else None
            yield name.rstrip("+"), value if equals else spaced

    def given(self, key: str) -> str | None:
        """The last value of an option on the command line."""
        return next((value for name, value in reversed(list(self.options())) if name == key), None)

    def option_without_value(self) -> str | None:
        """The first option that is followed by another one or by nothing."""
        known = {"--print_config", "--help"}
        for position, word in enumerate(self.words):
            following = self.words[position + 1 : position + 2]
            alone = not following or following[0].startswith("--")
            if alone and word.startswith("--") and "=" not in word and word not in known:
                return word
        return None

    def recipe_files(self) -> list[tuple[str, Any]]:
        """Every `--config` file with its content, or with the error that reading it gave."""
        names = [value for name, value in self.options() if name == "config" and value is not None]
        names += [after for word, after in zip(self.words, self.words[1:], strict=False) if word == "-c"]
        return [(name, _read(name)) for name in names if "://" not in name and not name.lstrip().startswith("{")]

    @cached_property
    def recipes(self) -> list[tuple[str, dict[str, Any]]]:
        """The recipes that can be read; the last one wins, so it comes first."""
        return [(name, content) for name, content in reversed(self.recipe_files()) if isinstance(content, dict)]

    def on_command_line(self, key: str) -> bool:
        """Whether the setting was given as an option, perhaps inside the value of one."""
        last = key.rpartition(".")[2]
        return any(
            name == key or name.startswith(f"{key}.") or (key.startswith(f"{name}.") and last in (value or ""))
            for name, value in self.options()
        )

    def dashes(self, key: str) -> str:
        """How the setting is written where the user wrote it: with dashes on the command line, without in a file."""
        return "--" if self.on_command_line(key) or self._recipe_with(key) is None else ""

    def place(self, key: str) -> str:
        """Name a setting together with the file that holds it."""
        file = None if self.on_command_line(key) else self._recipe_with(key)
        return f"--{key}" if file is None else f"{file}: {key}"

    def _recipe_with(self, key: str) -> str | None:
        return next((name for name, content in self.recipes if _holds(content, key.split("."))), None)

    # What is known

    def groups(self) -> list[str]:
        """First words of all options: model, data, trainer, run, config, …"""
        return list(dict.fromkeys(key.partition(".")[0] for key in self._own_keys()))

    def keys(self, key: str, owner: type | None) -> list[str]:
        """All dotted options; those of the classes that are in use included.

        Args:
            key: an option that takes a class, such as `model`.
            owner: that class, where it is known.
        """
        keys = self._own_keys()
        owners = {name: self.class_of(name) for name in ("model", "data")}
        if owner is not None:
            owners[key] = owner
        for name, cls in owners.items():
            if cls is not None:
                keys += [f"{name}.{option}" for option in class_options(cls)]
        return keys

    def _own_keys(self) -> list[str]:
        actions = getattr(self.parser, "_actions", [])
        names = [option for action in actions for option in action.option_strings]
        return [name[2:] for name in names if name.startswith("--") and not name.endswith(("+", ".help"))]

    def classes(self, key: str) -> list[str]:
        """Names of the classes an option accepts."""
        return sorted(_public_subclasses(self._bases(key)))

    def class_of(self, key: str, option: str = "", value: str = "") -> type | None:
        """The class given for an option, if it can be told.

        Args:
            key: the option.
            option: of that class; of several classes (callbacks) the one that was given it is meant.
            value: what the parser quotes.
        """
        before = value[: value.rfind(f"'{option.rpartition('.')[2]}'")] if option in value else value
        named = re.findall(r"'?class_path'?[=:] ?'([\w.]+)'", before)
        if not named:
            given = [text for name, text in self.options() if name == key and text]
            given += [_dig(content, [*key.split("."), "class_path"]) for _, content in self.recipes]
            named = [text for text in given if isinstance(text, str)][:1] if key in ("model", "data") else given[-1:]
        return _public_subclasses(self._bases(key)).get(str(named[-1]).rpartition(".")[2]) if named else None

    def _bases(self, key: str) -> list[type]:
        action = next((a for a in getattr(self.parser, "_actions", []) if a.dest == key), None)
        paths = re.findall(r"([\w]+(?:\.[\w]+)+)", str(getattr(action, "_typehint", "")))
        return [found for path in paths if inspect.isclass(found := _import(path))]


def class_options(cls: type) -> list[str]:
    """Names of a class's arguments, those passed on to its bases and those of nested dataclasses (dotted) included."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.append(parameter.name)
                if dataclasses.is_dataclass(parameter.annotation):
                    fields = dataclasses.fields(parameter.annotation)
                    names += [f"{parameter.name}.{field.name}" for field in fields]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(dict.fromkeys(names))


def nearest(name: str, known: Iterable[str], count: int = 2) -> list[str]:
    """Known names near a misspelt one, best first; case does not matter."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), list(by_lower), count, 0.6)]


def nearest_keys(key: str, known: Iterable[str], count: int = 2) -> list[str]:
    """Known dotted keys near a misspelt one: near as a whole, or with a last word near its last word."""
    scores = {candidate: _similarity(key, candidate) for candidate in known if not key.startswith(f"{candidate}.")}
    best = max(scores.values(), default=0.0)
    good = [candidate for candidate, score in scores.items() if score >= max(0.65, best - 0.1)]
    return sorted(good, key=lambda candidate: -scores[candidate])[:count]


def _similarity(key: str, candidate: str) -> float:
    group, _, last = key.rpartition(".")
    other_group, _, other_last = candidate.rpartition(".")
    words = difflib.SequenceMatcher(None, last, other_last).ratio()
    same_root = key.partition(".")[0] == candidate.partition(".")[0]
    together = words if group == other_group else words * (0.97 if same_root or not group else 0.8)
    if len(last) > 2 and other_last.startswith(last) and group in ("", other_group):
        together = max(together, 0.95)  # half a name
    if group == other_group:
        return together  # the long part that is equal says nothing
    return max(together, difflib.SequenceMatcher(None, key, candidate).ratio() * 0.9)


def _public_subclasses(bases: Iterable[type]) -> dict[str, type]:
    found: dict[str, type] = {}
    cls: type
    for base in bases:
        for cls in base.__subclasses__():
            if not cls.__name__.startswith("_"):
                found.setdefault(cls.__name__, cls)
            found = {**_public_subclasses([cls]), **found}
    return found


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _read(name: str) -> Any:
    try:
        return yaml.safe_load(Path(name).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        return error


def _dig(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _holds(content: Any, keys: Sequence[str]) -> bool:
    """Whether nested settings hold a dotted key; `init_args` is not spelt in keys, and lists may stand in between."""
    if not keys:
        return True
    if isinstance(content, list):
        return any(_holds(item, keys) for item in content)
    if not isinstance(content, dict):
        return False
    if "init_args" in content and _holds(content["init_args"], keys):
        return True
    return keys[0] in content and _holds(content[keys[0]], keys[1:])
