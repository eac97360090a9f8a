import re
from pathlib import Path

import pytest
import yaml

from baton.chain_file import flatten, read_chain
from baton.chain_table_file import Style

GOOD = """
name: demo
seeds: [0, 1]
set: {trainer.max_epochs: 3, trainer.precision: bf16-mixed}
stages:
  teacher:
    recipe: recipes/a.yaml
    seeds: [7]
  pretrain:
    recipe: recipes/a.yaml
    set: {trainer: {max_epochs: 5}, model.class_path: X}
  finetune:
    recipe: recipes/b.yaml
    init_from: pretrain
    teacher: teacher
table:
  metric: test/error
  unit: "%"
  scale: 100
  rows: {"pre-trained": finetune}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text("model: {class_path: X}\n")
    return tmp_path


def read(folder: Path, text: str):
    (folder / "chain.yaml").write_text(text)
    return read_chain(folder / "chain.yaml")


def changed(**changes) -> str:
    """GOOD with dotted keys (``stages__finetune``) replaced; None removes."""
    content = yaml.safe_load(GOOD)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = content
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return yaml.safe_dump(content, sort_keys=False)


def test_reads_every_part(folder):
    chain = read(folder, GOOD)
    assert (chain.name, chain.seeds, list(chain.stages)) == ("demo", (0, 1), ["teacher", "pretrain", "finetune"])
    assert chain.stages["teacher"].seeds == (7,)
    assert chain.stages["pretrain"].options == {
        "trainer.max_epochs": 5,
        "trainer.precision": "bf16-mixed",
        "model.class_path": "X",
    }
    assert chain.stages["finetune"].options["trainer.max_epochs"] == 3
    assert chain.stages["finetune"].links == {"init_from": "pretrain", "teacher": "teacher"}
    assert chain.table is not None
    assert (chain.table.metrics, chain.table.style) == (("test/error",), Style("%", 100.0))


def test_defaults(folder):
    chain = read(folder, "stages: {one: {recipe: recipes/a.yaml}}\ntable: {metric: [m, n]}")
    assert (chain.name, chain.seeds, chain.stages["one"].options) == ("chain", (0,), {})
    assert chain.table is not None
    assert chain.table.rows == {"one": "one"}
    assert read(folder, "stages: {one: {recipe: recipes/a.yaml}}").table is None


def test_recipe_path_is_relative_to_the_chain_file_and_shown_from_here(folder, monkeypatch):
    (folder / "chains").mkdir()
    (folder / "chains" / "chain.yaml").write_text("stages: {one: {recipe: ../recipes/a.yaml}}")
    monkeypatch.chdir(folder)
    assert read_chain("chains/chain.yaml").stages["one"].recipe == Path("recipes/a.yaml")
    monkeypatch.chdir(folder / "chains")
    assert read_chain("chain.yaml").stages["one"].recipe == (folder / "recipes" / "a.yaml").resolve()


BAD = {
    "unknown key": (changed(sedes=[0]), "unknown key 'sedes' (did you mean 'seeds'?)"),
    "unknown stage key": (changed(stages__finetune__recip="x"), "stages.finetune: unknown key 'recip' (did you mean"),
    "unknown table key": (changed(table__metrics="x"), "table: unknown key 'metrics' (did you mean 'metric'?)"),
    "no stages": (changed(stages=None, table=None), "stages must name at least one stage, not be empty"),
    "empty stages": (changed(stages={}, table=None), "stages must name at least one stage"),
    "empty stage": (changed(stages__finetune=[]), "stages.finetune must hold at least 'recipe: FILE.yaml'"),
    "no recipe": (changed(stages__finetune__recipe=None), "stages.finetune: recipe must name a YAML file, not empty"),
    "unknown parent": (
        changed(stages__finetune__init_from="pretrian"),
        "init_from names 'pretrian', which is no stage of this chain (did you mean 'pretrain'?)",
    ),
    "forward": (changed(stages__pretrain__init_from="finetune"), "'finetune', which does not come before it"),
    "itself": (changed(stages__pretrain__init_from="pretrain"), "'pretrain', which does not come before it"),
    "link and option": (
        changed(stages__finetune__set={"model.init_args.init_from": "x"}),
        "has 'init_from: pretrain' and sets model.init_args.init_from as well",
    ),
    "owned": (changed(set={"run.name": "x"}), "set may not set run.name: the chain decides it itself"),
    "owned, nested": (changed(set={"run": {"root": "x"}}), "may not set run.root"),
    "dashes": (changed(set={"--trainer.max_epochs": 1}), "write 'trainer.max_epochs' without dashes"),
    "option twice": (changed(set={"a.b": 1, "a": {"b": 2}}), "gives 'a.b' twice"),
    "set is no mapping": (changed(set=["a"]), "set must map options to values"),
    "seed twice": (changed(seeds=[0, 1, 0]), "seeds names the seed 0 twice"),
    "seeds empty": (changed(seeds=[]), "seeds must be a list of whole numbers"),
    "seeds no list": (changed(seeds=3), "seeds must be a list of whole numbers >= 0 such as [0, 1, 2], not 3"),
    "seeds negative": (changed(seeds=[-1]), "seeds must be a list"),
    "seeds bool": (changed(seeds=[True]), "seeds must be a list"),
    "parent lacks seed": (changed(stages__pretrain__seeds=[0, 3]), "init_from needs seed 1 of 'pretrain', which has"),
    "table": (
        changed(table__lines={"x": "labels", "rows": {"a": {1: "finetuen"}}}),
        "table.lines.rows: 'a' names the stage 'finetuen', which does not exist (did you mean 'finetune'?)",
    ),
    "name": (changed(name="a/b"), "name: 'a/b' becomes a folder"),
    "stage name": (changed(stages__pretrain={"recipe": "x"}).replace("pretrain:", "../up:"), "becomes a folder"),
    "stage twice": (GOOD.replace("  finetune:", "  pretrain:"), "'pretrain' is given twice (line 12)"),
    "no mapping": ("- a\n- b", "must hold a mapping (key: value), not a list"),
    "no yaml": ("a: [1", "is not valid YAML"),
    "empty": ("", "must hold a mapping (key: value), not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_with_file_and_key(folder, case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(folder, text)
    assert "chain.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(folder):
    with pytest.raises(FileNotFoundError, match=r"stages.finetune: the recipe .*nothing.yaml does not exist"):
        read(folder, changed(stages__finetune__recipe="nothing.yaml"))
    with pytest.raises(FileNotFoundError, match=r"The chain file .*none.yaml does not exist"):
        read_chain(folder / "none.yaml")


def test_extra_seeds_join_the_files_own(folder):
    (folder / "chain.yaml").write_text(GOOD)
    assert read_chain(folder / "chain.yaml", [1, 5]).seeds == (0, 1, 5)


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [{"e": 2}]}}, "f": {}}) == {"a.b": 1, "a.c.d": [{"e": 2}], "f": {}}
    kwargs = {"base": "simplenet", "base_kwargs": {"width": 0.5}}
    assert flatten({"model": {"backbone_kwargs": kwargs}, "model.patch_backbone_kwargs": {"width": 0.5}}) == {
        "model.backbone_kwargs": kwargs, "model.patch_backbone_kwargs": {"width": 0.5},
    }  # fmt: skip
