"""The chain file: which stages a chain has, where each one's weights come from, and what its table shows.

A chain file is YAML::

    name: denoising_cifar10             # optional: the file's own name
    seeds: [0, 1, 2]
    set: {trainer.max_epochs: 10}       # options for every stage
    stages:
      pretrain:
        recipe: ../ssl_tasks/denoising_cifar10.yaml     # relative to this file
        set: {data.init_args.batch_size: 256}
      finetune:
        recipe: ../supervised/cifar10_few_labels.yaml
        init_from: pretrain             # an earlier stage, the same seed of it
      scratch:
        recipe: ../supervised/cifar10_few_labels.yaml
    table:
      metric: test/error                # or a list
      unit: "%"
      scale: 100                        # the table shows scale x metric
      rows: {from scratch: scratch, "denoising, fine-tuned": finetune}

A stage with one seed of its own (``seeds: [0]``) runs once and serves every seed of the stages after it;
``teacher: stage`` hands a stage's network to ``--model.init_args.teacher``.

A row may list candidates, say one recipe with several learning rates, and the table may draw curves::

    table:
      metric: test/error
      select: val/error                 # or {metric: val/accuracy, mode: max}; the mode is min unless it is given
      rows: {from scratch: scratch, fine-tuned: [lr_0_01, lr_0_003]}
      curves: val/error                 # or a list

The row shows the candidate with the best mean of the ``select`` metric over its seeds (of equal ones the first), and a
line under the table says which one that is; the table's own metric takes no part (:mod:`baton.chain_choice`). As long
as a run of a candidate is missing, nothing is chosen. Candidates have the same seeds. ``curves`` draws each metric
over the training steps, one line a row, into ``curves.png`` (:mod:`baton.chain_curves`).
"""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

#: Where a stage may take a network from, and the option that receives the folder of the run.
LINKS = {"init_from": "model.init_from", "teacher": "model.init_args.teacher"}
_OWNED = ("run.root", "run.name", "run.resume", "run.chain", "run.stage", "seed_everything", "config")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        name: of the stage, also a folder's name.
        recipe: the recipe's path.
        options: overrides, dotted name -> plain value; the chain's own ``set`` is merged in.
        links: "init_from" / "teacher" -> an earlier stage.
        seeds: the seeds it runs with.
    """

    name: str
    recipe: Path
    options: dict[str, Any]
    links: dict[str, str]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Select:
    """What decides among the candidates of a row.

    Attributes:
        metric: name as the tasks log it, such as ``val/error``.
        mode: whether the best is the "min" or the "max".
    """

    metric: str
    mode: str = "min"


@dataclass(frozen=True)
class Table:
    """What the results table shows.

    Attributes:
        metrics: names as the tasks log them, such as ``test/error``.
        rows: label -> stage, or the candidates for it, in the order of the table.
        unit: written behind the metric's name.
        scale: factor from the logged value to the shown one.
        digits: decimals shown.
        select: what decides among candidates; None: there are none.
        curves: metrics drawn over the training steps.
    """

    metrics: tuple[str, ...]
    rows: dict[str, str | tuple[str, ...]]
    unit: str = ""
    scale: float = 1.0
    digits: int = 2
    select: Select | None = None
    curves: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage that a row shows or may show."""
        return tuple(stage for row in self.rows.values() for stage in ((row,) if isinstance(row, str) else row))


@dataclass(frozen=True)
class Chain:
    """A validated chain file.

    Attributes:
        name: of the chain, also its folder's name.
        path: of the file.
        seeds: of every stage that has none of its own.
        stages: by name, in the order of the file.
        table: None: the chain prints no table.
    """

    name: str
    path: Path
    seeds: tuple[int, ...]
    stages: dict[str, Stage]
    table: Table | None


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: plain YAML keeps the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise ValueError(f"{key!r} is given twice (line {key_node.start_mark.line + 1}); keep one.")
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no valid YAML, holds no mapping, or gives a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping (key: value), not {_kind(content)}.")
    return content


def flatten(nested: Mapping[Any, Any], where: str = "the mapping") -> dict[str, Any]:
    """Turn ``{"a": {"b": 1}}`` into ``{"a.b": 1}``; empty mappings and lists stay values.

    Raises:
        ValueError: two ways of writing the same name.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flatten(value, where) if isinstance(value, Mapping) and value else {"": value}
        for tail, leaf in inner.items():
            name = f"{key}.{tail}" if tail else str(key)
            if name in flat:
                raise ValueError(f"{where} gives {name!r} twice; keep one.")
            flat[name] = leaf
    return flat


def read_chain(path: str | Path, extra_seeds: Iterable[int] = ()) -> Chain:
    """Read and validate a chain file.

    Args:
        path: of the file.
        extra_seeds: seeds asked for besides the file's own.

    Raises:
        FileNotFoundError: the file or one of its recipes does not exist.
        ValueError: anything else that is wrong with it, in one sentence with the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The chain file {path} does not exist.")
    content = read_yaml(path)
    _known(content, ("name", "seeds", "set", "stages", "table"), f"{path}")
    name = content.get("name", path.stem)
    _folder_name(name, f"{path}: name")
    seeds = _seeds(content.get("seeds", [0]), f"{path}: seeds")
    seeds += tuple(seed for seed in dict.fromkeys(extra_seeds) if seed not in seeds)
    common = _options(content.get("set"), f"{path}: set")
    described = content.get("stages")
    if not isinstance(described, dict) or not described:
        raise ValueError(f"{path}: stages must name at least one stage, not be {_kind(described)}.")
    stages: dict[str, Stage] = {}
    for stage_name, entry in described.items():
        stages[stage_name] = _stage(stage_name, entry, path, seeds, common, stages, list(described))
    table = _table(content["table"], f"{path}: table", stages) if content.get("table") is not None else None
    return Chain(name, path, seeds, stages, table)


def _stage(
    name: Any,
    entry: Any,
    path: Path,
    seeds: tuple[int, ...],
    common: dict[str, Any],
    earlier: dict[str, Stage],
    order: list[str],
) -> Stage:
    where = f"{path}: stages.{name}"
    _folder_name(name, where)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must hold at least 'recipe: FILE.yaml', not {_kind(entry)}.")
    _known(entry, ("recipe", "set", "init_from", "teacher", "seeds"), where)
    if not isinstance(entry.get("recipe"), str):
        raise ValueError(f"{where}: recipe must name a YAML file, not {_kind(entry.get('recipe'))}.")
    recipe = path.parent / entry["recipe"]
    if not recipe.is_file():
        raise FileNotFoundError(
            f"{where}: the recipe {recipe} does not exist (the path is relative to the chain file)."
        )
    own = _options(entry.get("set"), f"{where}.set")
    seeds = _seeds(entry["seeds"], f"{where}.seeds") if "seeds" in entry else seeds
    links = {link: entry[link] for link in LINKS if entry.get(link) is not None}
    for link, parent in links.items():
        _link(where, link, parent, seeds, earlier, order)
        for option in (LINKS[link], f"model.init_args.{link}", f"model.{link}"):
            if option in own or option in common:
                raise ValueError(f"{where} has '{link}: {parent}' and sets {option} as well; keep one of the two.")
    return Stage(name, _from_here(recipe), {**common, **own}, links, seeds)


def _link(
    where: str, link: str, parent: Any, seeds: tuple[int, ...], earlier: dict[str, Stage], order: list[str]
) -> None:
    if parent not in order:
        raise ValueError(
            f"{where}: {link} names {parent!r}, which is no stage of this chain{_nearest(parent, order)}; "
            f"weights from elsewhere go into 'set: {{{LINKS[link]}: …}}'."
        )
    if parent not in earlier:
        raise ValueError(f"{where}: {link} names {parent!r}, which does not come before it; stages run in file order.")
    given = earlier[parent].seeds
    missing = [seed for seed in seeds if seed not in given]
    if missing and len(given) > 1:
        raise ValueError(
            f"{where}: {link} needs seed {missing[0]} of {parent!r}, which has the seeds {_words(given)}; "
            f"give {parent!r} the same seeds, or one seed that serves all."
        )


def _table(entry: Any, where: str, stages: dict[str, Stage]) -> Table:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with at least 'metric: test/error', not {_kind(entry)}.")
    _known(entry, ("metric", "unit", "scale", "digits", "select", "rows", "curves"), where)
    metrics = _metrics(entry.get("metric"), f"{where}.metric", "test/error")
    curves = _metrics(entry["curves"], f"{where}.curves", "val/error") if entry.get("curves") is not None else ()
    select = _select(entry["select"], f"{where}.select") if entry.get("select") is not None else None
    rows = _rows(entry.get("rows", {name: name for name in stages}), f"{where}.rows", stages)
    lists = [label for label, row in rows.items() if isinstance(row, tuple)]
    if lists and select is None:
        raise ValueError(
            f"{where}.rows: {lists[0]!r} lists stages to choose from, but no select says how; add 'select: val/error'."
        )
    if select is not None and not lists:
        raise ValueError(
            f"{where}.select is given, but no row lists stages to choose from; leave it out, or list some "
            "('label: [stage, other_stage]')."
        )
    scale, digits = entry.get("scale", 1.0), entry.get("digits", 2)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale == 0:
        raise ValueError(f"{where}.scale must be a number other than 0, not {scale!r}.")
    if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 10:
        raise ValueError(f"{where}.digits must be a whole number from 0 to 10, not {digits!r}.")
    return Table(metrics, rows, str(entry.get("unit", "")), float(scale), digits, select, curves)


def _metrics(entry: Any, where: str, example: str) -> tuple[str, ...]:
    metrics = [entry] if isinstance(entry, str) else entry
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"{where} must be a metric's name such as {example}, or a list, not {_kind(entry)}.")
    return tuple(metrics)


def _select(entry: Any, where: str) -> Select:
    given = {"metric": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict):
        raise ValueError(
            f"{where} must be a metric's name such as val/error, or {{metric: val/accuracy, mode: max}}, "
            f"not {_kind(entry)}."
        )
    _known(given, ("metric", "mode"), where)
    metric, mode = given.get("metric"), given.get("mode", "min")
    if not isinstance(metric, str):
        raise ValueError(f"{where}.metric must be a metric's name such as val/error, not {_kind(metric)}.")
    if mode not in ("min", "max"):
        raise ValueError(f"{where}.mode must be min or max, not {_kind(mode)}.")
    return Select(metric, mode)


def _rows(entry: Any, where: str, stages: dict[str, Stage]) -> dict[str, str | tuple[str, ...]]:
    if not isinstance(entry, dict) or not entry:
        raise ValueError(f"{where} must map labels to stages ('from scratch: scratch'), not be {_kind(entry)}.")
    rows: dict[str, str | tuple[str, ...]] = {}
    for label, row in entry.items():
        names = row if isinstance(row, list) else [row]
        if not names:
            raise ValueError(f"{where}: {label!r} lists no stage to choose from; name one or more.")
        for name in names:
            if not isinstance(name, str) or name not in stages:
                raise ValueError(
                    f"{where}: {label!r} names the stage {name!r}, which does not exist{_nearest(name, stages)}."
                )
            if names.count(name) > 1:
                raise ValueError(f"{where}: {label!r} names the stage {name!r} twice; list each candidate once.")
            first, own = stages[names[0]].seeds, stages[name].seeds
            if sorted(own) != sorted(first):
                raise ValueError(
                    f"{where}: the candidates of {label!r} must have the same seeds, but {names[0]!r} has "
                    f"{_words(first)} and {name!r} has {_words(own)}; give them the same."
                )
        rows[str(label)] = tuple(names) if isinstance(row, list) else row
    return rows


def _options(entry: Any, where: str) -> dict[str, Any]:
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must map options to values ('trainer.max_epochs: 10'), not be {_kind(entry)}.")
    options = flatten(entry, where)
    for name in options:
        if name.startswith("-"):
            raise ValueError(f"{where}: write {name.lstrip('-')!r} without dashes.")
        if name in _OWNED:
            raise ValueError(f"{where} may not set {name}: the chain decides it itself.")
    return options


def _seeds(entry: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(entry, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in entry)
    if not whole or not entry or min(entry) < 0:
        raise ValueError(f"{where} must be a list of whole numbers >= 0 such as [0, 1, 2], not {entry!r}.")
    twice = [seed for seed in entry if entry.count(seed) > 1]
    if twice:
        raise ValueError(f"{where} names the seed {twice[0]} twice; each seed is one independent repetition.")
    return tuple(entry)


def _known(entry: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in entry:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{_nearest(key, known)}; known are {_words(known)}.")


def _folder_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} becomes a folder, so use letters, digits, '_', '-' and '.' only.")


def _from_here(path: Path) -> Path:
    """The path as one would type it from the working directory, so that a printed command can be pasted."""
    absolute, here = path.resolve(), Path.cwd().resolve()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


def _nearest(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), [str(entry) for entry in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _words(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return f"{value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
