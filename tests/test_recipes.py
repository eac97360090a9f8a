"""Every recipe and every chain parses: misspelt options and unknown names show here, not after an hour."""

import re
from pathlib import Path

import pytest
import yaml

from baton.chain_file import read_chain
from baton.stage import check

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = [path for path in FILES if "chains" not in path.relative_to(CONFIGS).parts]
CHAINS = [path for path in FILES if "chains" in path.relative_to(CONFIGS).parts]


def name(path):
    return str(path.relative_to(CONFIGS))


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))])


def test_there_are_recipes_and_chains():
    assert RECIPES
    assert CHAINS
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_parses(path):
    recipe = yaml.safe_load(path.read_text())
    given = [] if recipe["model"]["init_args"].get("backbone") else ["--model.backbone=wrn_16_1"]
    config = check(["fit", "--config", str(path), *given])
    assert config["model"]["class_path"].rpartition(".")[2] == recipe["model"]["class_path"].rpartition(".")[2]
    for section in ("optimizer", "lr_scheduler"):
        for option, value in recipe["model"]["init_args"].get(section, {}).items():
            assert config["model"]["init_args"][section][option] == value
    kind = path.relative_to(CONFIGS).parts[0]
    assert f".{kind}." in config["model"]["class_path"]
    assert not {"name", "root", "resume"} & recipe.get("run", {}).keys()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_header_says_how_to_run_it(path):
    assert f"configs/{name(path)}" in header(path)
    assert re.search(r"^# +Command:|^# Command:", header(path), re.MULTILINE)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_parses_with_every_stage(path):
    chain = read_chain(path)
    for stage in chain.stages.values() if isinstance(chain.stages, dict) else chain.stages:
        options = [f"--{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
                   for key, value in stage.options.items()]  # fmt: skip
        links = [] if "init_from" not in stage.links else ["--model.backbone=wrn_16_1"]
        check(["fit", "--config", str(stage.recipe), *options, *links])


def test_a_mistake_would_show(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPES[0].read_text().replace("max_epochs", "max_epoch"))
    with pytest.raises(ValueError, match="max_epoch"):
        check(["fit", "--config", str(broken), "--model.backbone=wrn_16_1"])
