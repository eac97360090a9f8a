"""The runs of a chain: one a stage and seed, what each was started with, and whether that still holds."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from baton.chain_file import LINKS, Chain, Stage, flatten, read_yaml
from baton.chain_table import commit, machine
from baton.chain_table_file import nearest, words

# Options that may change between two starts of a run, because they do not change its numbers.
_MAY_DIFFER = ("data.root", "data.init_args.root", "data.num_workers", "data.init_args.num_workers", "run.wandb",
               "run.project", "trainer.enable_progress_bar", "trainer.enable_model_summary")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One stage with one seed.

    Attributes:
        chain: name of the chain.
        stage: what to run.
        seed: of everything random in it.
        root: folder of all runs.
        parents: "init_from" / "teacher" / "decoder_from" / "trunk_from" -> the run whose network it takes.
    """

    chain: str
    stage: Stage
    seed: int
    root: Path
    parents: dict[str, "Run"]

    @property
    def name(self) -> str:
        """Name of the run: its folder below the root."""
        return f"{self.chain}/{self.stage.name}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.root / self.name

    @property
    def record(self) -> Path:
        """File that says what the run was started with; beside its folder, which belongs to the run."""
        return self.root / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """File with everything the run prints."""
        return self.root / f"{self.name}.log"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint the run continues from."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def argv(self) -> list[str]:
        """The ``baton`` command of the run."""
        argv = ["fit", "--config", str(self.stage.recipe), "--run.root", str(self.root), "--run.name", self.name]
        argv += ["--run.resume", "true", "--run.chain", self.chain, "--run.stage", self.stage.name]
        argv += ["--seed_everything", str(self.seed)]
        for link, parent in self.parents.items():
            argv += [f"--{LINKS[link]}", str(parent.folder)]
        for option, value in self.stage.options.items():
            argv += [f"--{option}", as_argument(value)]
        return argv

    @property
    def finished(self) -> bool:
        """Whether it has handed its network over."""
        return (self.folder / "model" / "config.json").is_file()

    def handed_over(self) -> dict[str, Any]:
        """What the finished run says about itself: the ``baton`` entry of ``model/config.json``."""
        path = self.folder / "model" / "config.json"
        try:
            return json.loads(path.read_text())["baton"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: delete {self.folder} to run this stage again.") from error

    def metrics(self) -> dict[str, float] | None:
        """Final metrics; None before it has finished."""
        return self.handed_over().get("metrics", {}) if self.finished else None

    def recorded(self) -> dict[str, Any] | None:
        """What the run was started with; None if it never was."""
        if not self.record.is_file():
            return None
        try:
            return json.loads(self.record.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.record} is damaged: delete it and {self.folder} to run this stage again."
            ) from error

    def planned(self) -> dict[str, Any]:
        """What it would be started with now."""
        recipe = self.stage.recipe.read_bytes()
        options = {**flatten(read_yaml(self.stage.recipe), str(self.stage.recipe)), **self.stage.options}
        parents = {}
        for link, parent in self.parents.items():
            sha256 = parent.handed_over().get("sha256") if parent.finished else None
            parents[link] = {"run": parent.name, "sha256": sha256}
        return {
            "argv": self.argv,
            "recipe_sha256": hashlib.sha256(recipe).hexdigest(),
            "options": json.loads(json.dumps(options, default=str)),
            "parents": parents,
        }

    def check_record(self) -> None:
        """Refuse a run that was started with something else than the chain now says.

        Raises:
            ValueError: names the difference and the folder.
        """
        if not self.finished and not self.checkpoint.exists():
            return
        before, now = self.recorded(), self.planned()
        if before is None:
            raise ValueError(f"{self.folder} was not made by this chain (there is no {self.record}): move it away.")
        what = _difference(before, now)
        if what:
            state = "finished" if self.finished else "half-trained"
            raise ValueError(
                f"{self.folder} is {state}, but {what}: delete that folder to train it again, "
                "or give the chain another name."
            )

    def begin(self) -> None:
        """Record what the run starts with, after checking that it may."""
        self.check_record()
        where = {"commit": commit(), "hardware": machine()}
        record = {**self.planned(), **where, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.record.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.record.with_suffix(".partial")
        temporary.write_text(json.dumps(record, indent=2))
        temporary.replace(self.record)


def as_argument(value: Any) -> str:
    """Write an option's value as the command line expects it: plain words as they are, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict) or value is None:
        return json.dumps(value, default=str)
    return str(value)  # YAML dates


def plan(chain: Chain, root: str | Path = "runs") -> list[Run]:
    """All runs of a chain, in order: all stages of the first seed, then of the next; parents before children."""
    runs: dict[tuple[str, int], Run] = {}

    def add(stage: Stage, seed: int) -> Run:
        seed = seed if seed in stage.seeds else stage.seeds[0]
        if (stage.name, seed) not in runs:
            parents = {link: add(chain.stages[name], seed) for link, name in stage.links.items()}
            runs[stage.name, seed] = Run(chain.name, stage, seed, Path(root), parents)
        return runs[stage.name, seed]

    own = [seed for stage in chain.stages.values() for seed in stage.seeds]
    for seed in dict.fromkeys([*chain.seeds, *own]):
        for stage in chain.stages.values():
            if seed in stage.seeds:
                add(stage, seed)
    return list(runs.values())


def select(runs: Sequence[Run], chain: Chain, seeds: Sequence[int] | None, only: Sequence[str]) -> list[Run]:
    """Keep the runs that were asked for and those they start from.

    Raises:
        ValueError: there is no such stage, or none of their runs has one of the seeds.
    """
    stages = set() if only else set(chain.stages)
    for pattern in only:
        found = [name for name in chain.stages if fnmatchcase(name, pattern)]
        if not found:
            close = nearest(pattern, chain.stages)
            raise ValueError(f"{chain.path} has no stage {pattern!r}{close}; its stages are {words(chain.stages)}.")
        stages.update(found)
    wanted = [run for run in runs if run.stage.name in stages and (seeds is None or run.seed in seeds)]
    if not wanted:
        asked = words(only) or "any stage"
        raise ValueError(f"{chain.path}: no run of {asked} has one of the seeds {list(seeds or [])}.")
    names: set[str] = set()
    for run in reversed(runs):  # children come after their parents
        if run in wanted or run.name in names:
            names |= {run.name, *(parent.name for parent in run.parents.values())}
    return [run for run in runs if run.name in names]


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first difference between two records in words, or nothing."""
    for link, parent in now["parents"].items():
        earlier = before["parents"].get(link)
        if earlier is None or earlier["run"] != parent["run"]:
            return f"its {link} is now {parent['run']} instead of {earlier['run'] if earlier else 'nothing'}"
        if parent["sha256"] is not None and earlier["sha256"] != parent["sha256"]:
            return f"the run it started from, {parent['run']}, has been trained again and has other weights"
    for link in before["parents"]:
        if link not in now["parents"]:
            return f"it started from {before['parents'][link]['run']} and now has no {link}"
    old, new = before["options"], now["options"]
    for name in sorted(old.keys() | new.keys()):
        if name not in _MAY_DIFFER and (name in old, old.get(name)) != (name in new, new.get(name)):
            was = as_argument(old[name]) if name in old else "not set"
            return f"{name} was {was} and is now {as_argument(new[name]) if name in new else 'not set'}"
    return ""
