"""The chain file: which stages a chain has and where each one's weights come from.

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
``teacher: stage`` hands a stage's network to ``--model.init_args.teacher``, ``decoder_from: stage`` a stage's decoder
to ``--model.init_args.decoder_from``, ``trunk_from: stage`` a network for the trunk of another to
``--model.init_args.trunk_from``. Everything else that a table may show is described in :mod:`baton.chain_table_file`.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.chain_table_file import Table, check_keys, kind, nearest, read_table, words

#: Where a stage may take a network from, and the option that receives the folder of the run.
LINKS = {
    "init_from": "model.init_from",
    "teacher": "model.init_args.teacher",
    "decoder_from": "model.init_args.decoder_from",
    "trunk_from": "model.init_args.trunk_from",
}
_OWNED = ("run.root", "run.name", "run.resume", "run.chain", "run.stage", "seed_everything", "config")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        name: of the stage, also a folder's name.
        recipe: the recipe's path.
        options: overrides, dotted name -> plain value; the chain's own ``set`` is merged in.
        links: "init_from" / "teacher" / "decoder_from" / "trunk_from" -> an earlier stage.
        seeds: the seeds it runs with.
    """

    name: str
    recipe: Path
    options: dict[str, Any]
    links: dict[str, str]
    seeds: tuple[int, ...]


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
        raise ValueError(f"{path} must hold a mapping (key: value), not {kind(content)}.")
    return content


def flatten(nested: Mapping[Any, Any], where: str = "the mapping") -> dict[str, Any]:
    """Turn ``{"a": {"b": 1}}`` into ``{"a.b": 1}``; empty mappings, lists and what ``*_kwargs`` hold stay values.

    Arguments that are handed on have no option of their own, so they replace those of the recipe as a whole.

    Raises:
        ValueError: two ways of writing the same name.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        whole = not isinstance(value, Mapping) or not value or str(key).endswith("_kwargs")
        inner = {"": value} if whole else flatten(value, where)
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
    check_keys(content, ("name", "seeds", "set", "stages", "table"), f"{path}")
    name = content.get("name", path.stem)
    _folder_name(name, f"{path}: name")
    seeds = _seeds(content.get("seeds", [0]), f"{path}: seeds")
    seeds += tuple(seed for seed in dict.fromkeys(extra_seeds) if seed not in seeds)
    common = _options(content.get("set"), f"{path}: set")
    described = content.get("stages")
    if not isinstance(described, dict) or not described:
        raise ValueError(f"{path}: stages must name at least one stage, not be {kind(described)}.")
    stages: dict[str, Stage] = {}
    for stage_name, entry in described.items():
        stages[stage_name] = _stage(stage_name, entry, path, seeds, common, stages, list(described))
    table = None
    if content.get("table") is not None:
        own = {stage.name: stage.seeds for stage in stages.values()}
        table = read_table(content["table"], f"{path}: table", own)
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
        raise ValueError(f"{where} must hold at least 'recipe: FILE.yaml', not {kind(entry)}.")
    check_keys(entry, ("recipe", "set", *LINKS, "seeds"), where)
    if not isinstance(entry.get("recipe"), str):
        raise ValueError(f"{where}: recipe must name a YAML file, not {kind(entry.get('recipe'))}.")
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
            f"{where}: {link} names {parent!r}, which is no stage of this chain{nearest(parent, order)}; "
            f"weights from elsewhere go into 'set: {{{LINKS[link]}: …}}'."
        )
    if parent not in earlier:
        raise ValueError(f"{where}: {link} names {parent!r}, which does not come before it; stages run in file order.")
    given = earlier[parent].seeds
    missing = [seed for seed in seeds if seed not in given]
    if missing and len(given) > 1:
        raise ValueError(
            f"{where}: {link} needs seed {missing[0]} of {parent!r}, which has the seeds {words(given)}; "
            f"give {parent!r} the same seeds, or one seed that serves all."
        )


def _options(entry: Any, where: str) -> dict[str, Any]:
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must map options to values ('trainer.max_epochs: 10'), not be {kind(entry)}.")
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


def _folder_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not _FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{where}: {name!r} becomes a folder, so use letters, digits, '_', '-' and '.' only.")


def _from_here(path: Path) -> Path:
    """The path as one would type it from the working directory, so that a printed command can be pasted."""
    absolute, here = path.resolve(), Path.cwd().resolve()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
