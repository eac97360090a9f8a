"""Every recipe and every chain parses: misspelt options and unknown names show here, not after an hour."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from baton.backbones import create_backbone
from baton.chain_file import read_chain
from baton.layers import DiracConv2d
from baton.optim import Optimizer
from baton.stage import check
from tiny import undrawn

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = [path for path in FILES if "chains" not in path.relative_to(CONFIGS).parts]
CHAINS = [path for path in FILES if "chains" in path.relative_to(CONFIGS).parts]
READ = {path: read_chain(path) for path in CHAINS}


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


def settings(stage):
    """What a stage tells its recipe, one by one; the network and its options are one, as they must fit."""
    network = [stage.options.get(f"model.{option}") for option in ("backbone", "backbone_kwargs")]
    told = [*stage.options.items(), ("network", network), ("links", sorted(stage.links))]
    # whose options the others are
    classes = [value for key, value in told if key.rpartition(".")[2] in ("model", "data", "class_path")]
    return {(stage.recipe, repr(classes), key, repr(value)) for key, value in told}


def unlike():
    """Of every chain the stages that set something no stage before them has set in the same recipe."""
    before, chosen = set(), {}
    for path, chain in READ.items():
        chosen[path] = []
        for stage in chain.stages.values():
            told = settings(stage)
            if not told <= before:
                chosen[path].append(stage)
            before |= told
    return chosen


UNLIKE = unlike()


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_parses_with_every_stage(path):
    for stage in UNLIKE[path]:
        options = [f"--{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
                   for key, value in stage.options.items()]  # fmt: skip
        own = yaml.safe_load(stage.recipe.read_text())["model"]["init_args"].get("backbone")
        links = [] if own or "init_from" not in stage.links else ["--model.backbone=wrn_16_1"]
        with undrawn():
            check(["fit", "--config", str(stage.recipe), *options, *links])


def test_a_mistake_would_show(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(RECIPES[0].read_text().replace("max_epochs", "max_epoch"))
    with pytest.raises(ValueError, match="max_epoch"):
        check(["fit", "--config", str(broken), "--model.backbone=wrn_16_1"])


def told(stage):
    """A stage's recipe with what the chain sets."""
    recipe = yaml.safe_load(stage.recipe.read_text())
    model = recipe["model"]["init_args"]
    sections = {"data": recipe["data"]["init_args"], "trainer": recipe["trainer"], "model": model}
    sections["run"] = recipe.setdefault("run", {})
    for option, value in stage.options.items():
        section, *path, name = option.split(".")
        place = sections[section]
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return recipe


def training(stage):
    """What a stage trains on, how long, and how."""
    recipe = told(stage)
    model = recipe["model"]["init_args"]
    # when to validate, and what to do then, is no training
    return [recipe["data"], recipe["trainer"]["max_epochs"], model["optimizer"], model["lr_scheduler"]]


def model_of(stage):
    return told(stage)["model"]["init_args"]


DISTILLED = [path for path, chain in READ.items() if any("teacher" in stage.links for stage in chain.stages.values())]
SCALED = ["attention_transfer_groups", "attention_transfer_imagenet_table_6_5", "fitnets", "gradient_table_6_3",
          "transfer_learning_table_6_4"]  # fmt: skip


def teachers(chain):
    return {stage.links["teacher"] for stage in chain.stages.values() if "teacher" in stage.links}


def students(chain):
    """The table's rows, without those of teachers."""
    shown = {name: chain.stages[name] for name in chain.table.stages}
    return {name: stage for name, stage in shown.items() if name not in teachers(chain)}


@pytest.mark.parametrize("path", DISTILLED, ids=name)
def test_students_of_a_table_train_alike_and_a_teacher_is_trained_once(path):
    chain = read_chain(path)
    compared = students(chain)
    assert len(compared) > 1
    first = training(next(iter(compared.values())))
    for label, stage in compared.items():
        assert training(stage) == first, label
        assert stage.seeds == chain.seeds, label
    for label in teachers(chain):
        assert len(chain.stages[label].seeds) == 1, label


@pytest.mark.parametrize("stem", SCALED)
def test_a_scaled_table_of_distillation_has_the_rows_of_the_full_one(stem):
    full, small = (read_chain(CONFIGS / "chains" / f"{stem}{end}.yaml") for end in ("", "_small"))
    assert list(full.table.rows) == list(small.table.rows)
    assert list(full.table.rows.values()) == list(small.table.rows.values())
    for label, stage in students(small).items():
        model, original = model_of(stage), model_of(full.stages[label])
        for option in model.keys() | original.keys():
            if option.endswith(("_weight", "_form", "_normalize")) or option in ("temperature", "final", "at_power"):
                assert model.get(option) == original.get(option), (label, option)


def test_pairs_of_table_6_1_are_what_their_labels_say():
    chain = read_chain(CONFIGS / "chains" / "attention_transfer_table_6_1.yaml")
    columns = {"AT": "at", "F-ActT": "full_activation", "KD": "kd", "AT+KD": "at_kd"}
    assert len(chain.table.rows) == 4 * (2 + len(columns))
    for label, name in chain.table.rows.items():
        pair, column = label.split(", ")
        student, teacher = (network.lower().replace("-wide", "").replace("-", "_") for network in pair.split(" from "))
        stage = chain.stages[name]
        assert model_of(stage)["backbone"] == (teacher if column == "teacher" else student)
        assert ("teacher" in stage.links) == (column in columns)
        if column in columns:
            assert model_of(chain.stages[stage.links["teacher"]])["backbone"] == teacher
            assert stage.recipe.stem == f"{columns[column]}_wrn_cifar10"


def test_maps_and_groups_of_attention_transfer_are_what_their_labels_say():
    maps = read_chain(CONFIGS / "chains" / "attention_transfer_table_6_2.yaml")
    asked = {
        (row["at_reduce"], row["at_power"]) for row in map(model_of, students(maps).values()) if "at_weight" in row
    }
    assert asked == {("sum", 1), ("sum", 2), ("sum", 4), ("max", 1)}
    groups = read_chain(CONFIGS / "chains" / "attention_transfer_groups.yaml")
    for number in (1, 2, 3):
        assert model_of(groups.stages[groups.table.rows[f"group {number} alone"]])["pairs"] == [[f"group{number}"] * 2]
    assert "pairs" not in model_of(groups.stages[groups.table.rows["all three groups"]])


@pytest.mark.parametrize("end", ["", "_small"])
def test_rows_of_table_6_3_differ_in_their_term_alone(end):
    chain = read_chain(CONFIGS / "chains" / f"gradient_table_6_3{end}.yaml")
    terms = {"baseline": {"ce"}, "min-l2": {"gradient_penalty"}, "grad-based AT": {"gradient"}, "KD": {"kd"},
             "symmetry norm": {"symmetry"}, "activation-based AT": {"at"}}  # fmt: skip
    assert list(chain.table.rows) == list(terms)
    for label, name in chain.table.rows.items():
        model = model_of(chain.stages[name])
        found = {key.removesuffix("_weight") for key, value in model.items() if key.endswith("_weight") and value}
        assert found | {"ce"} == terms[label] | {"ce"}
        assert not model["backbone_kwargs"]["norm"]
        assert not model["backbone_kwargs"]["relu_before_pool"]
        assert model["backbone_kwargs"] == model_of(chain.stages["baseline"])["backbone_kwargs"]
        assert ("teacher" in chain.stages[name].links) == bool(terms[label] & {"gradient", "kd", "at"})
        if "teacher" in chain.stages[name].links:  # maps of both signs have a teacher of such maps
            kwargs = model_of(chain.stages[chain.stages[name].links["teacher"]]).get("backbone_kwargs", {})
            assert kwargs.get("relu_before_pool", True) == (label != "activation-based AT")
            assert kwargs.get("norm", True)
    for stage in chain.stages.values():
        data = told(stage)["data"]["init_args"]
        assert data["flip"]
        assert not data.get("crop_padding")


@pytest.mark.parametrize("end", ["", "_small"])
def test_networks_of_table_6_4_are_fine_tuned_with_the_same_parts_frozen(end):
    chain = read_chain(CONFIGS / "chains" / f"transfer_learning_table_6_4{end}.yaml")
    rows = [model_of(chain.stages[name]) for name in chain.table.rows.values()]
    assert all(row["freeze"] == rows[0]["freeze"] and row["freeze_batchnorm"] for row in rows)
    assert training(chain.stages["teacher"]) == training(chain.stages["student"])
    ends = [path for path, _ in model_of(chain.stages["at"])["pairs"]]
    assert len(ends) == 2
    assert not set(ends) & set(rows[0]["freeze"])
    started = {chain.stages[name].links.get("init_from", "timm") for name in ("student", "kd", "at")}
    assert started == {"pretrained_student" if end else "timm"}


@pytest.mark.parametrize("end", ["", "_small"])
def test_attention_of_table_6_5_begins_when_the_learning_rate_drops_a_second_time(end):
    chain = read_chain(CONFIGS / "chains" / f"attention_transfer_imagenet_table_6_5{end}.yaml")
    model = model_of(chain.stages["at"])
    assert model["start_epoch"] == {"at": model["lr_scheduler"]["milestones"][1]}
    assert model["pairs"] == [["layer3", "layer3"], ["layer4", "layer4"]]
    assert training(chain.stages["teacher"]) == training(chain.stages["student"])


@pytest.mark.parametrize("end", ["", "_small"])
def test_fitnets_takes_its_hints_first(end):
    stages = read_chain(CONFIGS / "chains" / f"fitnets{end}.yaml").stages
    assert stages["fitnets"].links == {"init_from": "hint", "teacher": "teacher"}
    assert stages["hint"].links == stages["distillation"].links == {"teacher": "teacher"}
    models = [model_of(stages[name]) for name in ("student", "distillation", "hint")]
    networks = [(model["backbone"], model.get("backbone_kwargs")) for model in models]
    assert len({str(network) for network in networks}) == 1
    assert told(stages["hint"])["trainer"]["max_epochs"] < told(stages["fitnets"])["trainer"]["max_epochs"]


SWWAE = ["swwae_table", "swwae_table_small", "swwae_table_few_labels_small"]
VARIANTS = [f"{autoencoder}_{variant}" for autoencoder in ("sae", "swwae") for variant in ("first", "all", "layerwise")]


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


#: tables of chapter 5 of Zagoruyko's thesis, each with a scaled sibling
WIDTH = [f"wrn_table_5_{number}" for number in range(2, 9)]
PLAIN = ["dirac_table_5_10", "dirac_imagenet_table_5_11", "dirac_initialization"]
CHAPTER_5 = [f"{chain}{kind}" for chain in (*WIDTH, *PLAIN) for kind in ("", "_small")]


def chain_of(name):
    return read_chain(CONFIGS / "chains" / f"{name}.yaml")


def backbone_of(stage, **kwargs):
    """The network of a stage, without memory for its weights."""
    own = yaml.safe_load(stage.recipe.read_text())["model"]["init_args"]
    name = stage.options.get("model.backbone", own["backbone"])
    with torch.device("meta"), undrawn():
        return create_backbone(name, **stage.options.get("model.backbone_kwargs", {}) | kwargs)


def parameters(stage):
    return sum(parameter.numel() for parameter in backbone_of(stage).parameters())


@pytest.mark.parametrize("chain", [*CHAPTER_5, "dirac_depth", "dirac_depth_small"])
def test_rows_of_a_table_train_equally_long_and_their_networks_are_different(chain):
    stages = chain_of(chain).stages.values()
    by_data, networks = {}, []
    for stage in stages:
        data, epochs, optimizer, schedule = training(stage)
        given = data["init_args"].pop("class_path", data["class_path"])
        own = [data["init_args"].pop(option, None) for option in ("crop_padding", "flip")]
        told = [data["init_args"], epochs, {**optimizer, "decay_all": None}, schedule]
        assert by_data.setdefault(given, told) == told
        backbone = [stage.options.get(f"model.{option}") for option in ("backbone", "backbone_kwargs")]
        networks.append([given, own, backbone])
        assert max(schedule["milestones"]) < epochs
        if "imagenet" not in stage.recipe.name:  # the optimiser of one kind of network is the same in all of its rows
            assert optimizer.get("decay_all", False) == (stage.recipe.name != "diracnet_cifar10.yaml")
    assert all(networks.count(network) == 1 for network in networks)


NJET = [
    *(f"njet_table_{number}" for number in (1, 2, 3, 4, 5, 6)),
    *(f"njet_{name}" for name in ("filter_size", "mnist_scale", "fashion_scale", "receptive_field")),
]


@pytest.mark.parametrize("chain", ["wrn_table_5_2", "wrn_table_5_3", "wrn_table_5_7", *PLAIN[1:], *NJET])
def test_a_scaled_sibling_has_all_rows(chain):
    full, small = chain_of(chain), chain_of(f"{chain}_small")
    assert list(small.stages) == list(full.stages)
    assert list(small.table.rows.values()) == list(full.table.rows.values())
    assert small.table.metrics == full.table.metrics
    for name, stage in small.stages.items():
        assert stage.recipe == full.stages[name].recipe


@pytest.mark.parametrize("chain", ["wrn_table_5_2", "wrn_table_5_3", "dirac_initialization"])
def test_a_scaled_sibling_differs_in_depth_and_width_alone(chain):
    full, small = chain_of(chain).stages, chain_of(f"{chain}_small").stages
    for name, stage in small.items():
        ours, theirs = (dict(each.options["model.backbone_kwargs"]) for each in (stage, full[name]))
        for size in ("depth", "width"):
            assert ours.pop(size) <= theirs.pop(size)
        assert ours == theirs


def test_scaled_widths_for_imagenet_are_quarters():
    for chain in ("wrn_table_5_7", "dirac_imagenet_table_5_11"):
        full, small = chain_of(chain).stages, chain_of(f"{chain}_small").stages
        for name, stage in small.items():
            theirs, ours = (backbone_of(each).feature_info[1:] for each in (full[name], stage))
            assert [info["num_chs"] for info in theirs] == [4 * info["num_chs"] for info in ours]


# in millions, as the thesis rounds them
PARAMETERS = {
    "wrn_table_5_2": [1.4, 1.2, 1.3, 1.3, 1.5, 1.1],
    "wrn_table_5_3": [2.2, 2.2, 2.2, 2.2],
    "wrn_table_5_4": [0.6, 2.2, 8.9, 35.7, 36.5, 52.5, 17.2, 26.8, 11.0, 17.1],
    "wrn_table_5_5": [1.7, 8.9, 11.0, 36.5],
    "wrn_table_5_7": [11.7, 25.9, 45.6, 101.8, 21.8, 48.6, 86.0],
    "wrn_table_5_8": [25.6, 44.5, 60.2, 68.9, 64.7],
    "dirac_table_5_10": [20.0, 9.1, 36.5, 36.5],
}


@pytest.mark.parametrize("chain", PARAMETERS)
def test_networks_have_the_parameters_of_the_thesis(chain):
    first = list(chain_of(chain).stages.values())[: len(PARAMETERS[chain])]  # CIFAR-10 comes before CIFAR-100
    assert [round(parameters(stage) / 1e6, 1) for stage in first] == PARAMETERS[chain]


def test_blocks_of_a_deepening_table_have_equal_parameters():
    for chain in ("wrn_table_5_3", "wrn_table_5_3_small"):
        assert len({parameters(stage) for stage in chain_of(chain).stages.values()}) == 1


@pytest.mark.parametrize("chain", ["wrn_table_5_6", "wrn_table_5_6_small"])
def test_dropout_is_all_that_a_pair_differs_in(chain):
    stages = chain_of(chain).stages
    with_it = [name for name in stages if "_dropout" in name]
    assert len(stages) == 2 * len(with_it)
    for name in with_it:
        ours, theirs = dict(stages[name].options), stages[name.replace("_dropout", "")].options
        kwargs = dict(ours["model.backbone_kwargs"])
        assert kwargs.pop("drop_rate") == (0.4 if "svhn" in name else 0.3)
        assert {**ours, "model.backbone_kwargs": kwargs} == theirs


@pytest.mark.parametrize("chain", ["dirac_depth", "dirac_depth_small"])
def test_plain_networks_are_dirac_networks_without_the_parameterisation(chain):
    stages = chain_of(chain).stages
    for name in [name for name in stages if name.startswith("plain")]:
        kwargs = stages[name].options["model.backbone_kwargs"]
        twin = stages[name.replace("plain", "dirac")]
        assert {**kwargs, "dirac": True} == twin.options["model.backbone_kwargs"]
        assert kwargs["dirac"] is False
        assert training(stages[name]) == training(twin)


@pytest.mark.parametrize("recipe", ["diracnet_cifar10", "diracnet_imagenet"])
def test_weight_decay_spares_the_scales_of_dirac_layers(recipe):
    told = yaml.safe_load((CONFIGS / "supervised" / f"{recipe}.yaml").read_text())["model"]["init_args"]
    backbone = create_backbone(told["backbone"])
    optimizer = Optimizer(**told["optimizer"]).build(backbone, backbone)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    layers = [module for module in backbone.modules() if isinstance(module, DiracConv2d)]
    assert layers
    for layer in layers:
        assert decay[id(layer.weight)] == told["optimizer"]["weight_decay"] > 0
        assert [decay[id(parameter)] for name, parameter in layer.named_parameters() if name != "weight"] == [0, 0]
    for parameter in backbone.parameters():  # and all that the code spares besides: norms and biases
        assert (decay[id(parameter)] > 0) == (parameter.ndim != 1)


def test_pixels_of_house_numbers_are_not_normalised():
    for stage in chain_of("wrn_table_5_6").stages.values():
        statistics = [list(backbone_of(stage).pretrained_cfg[name]) for name in ("mean", "std")]
        assert (statistics == [[0, 0, 0], [1, 1, 1]]) == (stage.recipe.name == "wrn_svhn.yaml")


@pytest.mark.parametrize("end", ["", "_small"])
def test_receptive_fields_are_what_their_labels_say(end):
    chain = chain_of(f"njet_receptive_field{end}")
    labels = {stage: re.search(r"sees (\d+)", label) for label, stage in chain.table.rows.items()}
    told = {stage: int(seen[1]) for stage, seen in labels.items() if seen}
    assert told == {stage: backbone_of(chain.stages[stage]).receptive_field() for stage in told}
    assert len(told) == 7
