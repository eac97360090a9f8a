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
        own = yaml.safe_load(stage.recipe.read_text())["model"]["init_args"].get("backbone")
        links = [] if own or "init_from" not in stage.links else ["--model.backbone=wrn_16_1"]
        check(["fit", "--config", str(stage.recipe), *options, *links])


def test_a_mistake_would_show(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPES[0].read_text().replace("max_epochs", "max_epoch"))
    with pytest.raises(ValueError, match="max_epoch"):
        check(["fit", "--config", str(broken), "--model.backbone=wrn_16_1"])


SWWAE = ["swwae_table", "swwae_table_small", "swwae_table_few_labels_small"]
VARIANTS = [f"{autoencoder}_{variant}" for autoencoder in ("sae", "swwae") for variant in ("first", "all", "layerwise")]


def training(stage):
    """What a stage trains on, how long, and how."""
    recipe = yaml.safe_load(stage.recipe.read_text())
    model = recipe["model"]["init_args"]
    told = {"data": recipe["data"]["init_args"], "trainer": recipe["trainer"], "model": model}
    for option, value in stage.options.items():
        section, *path, name = option.split(".")
        place = told[section]
        for part in path:
            place = place[part]
        place[name] = value
    # when to validate, and what to do then, is no training
    return [recipe["data"], told["trainer"]["max_epochs"], model["optimizer"], model["lr_scheduler"]]


@pytest.mark.parametrize("chain", SWWAE)
def test_augmented_networks_take_all_steps_and_the_baseline_trains_exactly_as_long(chain):
    stages = read_chain(CONFIGS / "chains" / f"{chain}.yaml").stages
    for name in VARIANTS:
        autoencoder, variant = name.split("_")
        last = f"{autoencoder}_2" if variant == "layerwise" else f"{autoencoder}_3"
        assert stages[name].links == {"init_from": last, "decoder_from": last}
        assert stages[f"{autoencoder}_3"].links == dict.fromkeys(("init_from", "decoder_from"), f"{autoencoder}_2")
        start = {} if chain == "swwae_table" else {"init_from": "step_1"}
        assert stages[f"{autoencoder}_2"].links == stages["baseline"].links == start
        assert stages[name].options["model.autoencoder"] == autoencoder
        assert stages[name].options["model.variant"] == variant
        assert training(stages[name]) == training(stages["baseline"])
