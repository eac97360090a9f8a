"""Every mistake is one sentence that names the place and the nearest names, and exit code 2."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from baton import cli
from baton.mistakes import sentence
from tiny import hand_over

CLASSIFY = ["--model=Classification", "--model.backbone=wide_resnet", "--model.backbone_kwargs={depth: 10, width: 1}"]
SHAPES = ["--data=Shapes", "--data.size=16", "--data.length=32", "--data.val_length=9", "--data.test_length=11"]
BRIEF = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--run.wandb=false", "--run.name=r"]
FIT = ["fit", *CLASSIFY, *SHAPES, *BRIEF]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["baton"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("BATON_TRACEBACK", raising=False)


def complaint(args: list[str], capsys: pytest.CaptureFixture) -> str:
    """What the command prints for a mistake: one line, exit 2, nothing else, nothing written."""
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("baton: error: ")
    assert error.count("\n") == 1, error
    return error.removeprefix("baton: error: ").strip()


OPTIONS = [
    ("--model.lrr=3", "--model.lrr is not an option of Classification; the nearest is --model.optimizer.lr."),
    (
        "--trainer.max_epoch=3",
        "--trainer.max_epoch is not an option of `baton fit`; the nearest is --trainer.max_epochs.",
    ),
    ("--run.nmae=x", "--run.nmae is not an option of `baton fit`; the nearest is --run.name."),
    ("--data.batchsize=3", "--data.batchsize is not an option of Shapes; the nearest is --data.batch_size."),
    ("--batch_size=3", "--batch_size is not an option of `baton fit`; the nearest is --data.batch_size."),
    ("--modle=Denoising", "--modle is not an option of `baton fit`; the nearest is --model."),
    ("--model.optimizer.lrr=3", "--model.optimizer.lrr is not an option of Classification; the nearest is --model.opt"),
    (
        "--model.optimizer={lrr: 3}",
        "--model.optimizer.lrr is not an option of Classification; the nearest is --model.o",
    ),
    ("--model.lr_scheduler.milestone=[2]", "the nearest is --model.lr_scheduler.milestones."),
    ("--seed=3", "--seed is not an option of `baton fit`; the nearest are --data.seed and --seed_everything."),
    ("-model.lr=3", "does not know what to do with '-model.lr'; options begin with two dashes"),
    ("hello", "`baton fit` does not know what to do with 'hello'."),
    ("--data.batch_size", "--data.batch_size needs a value."),
]
VALUES = [
    ("--data.batch_size=abc", "--data.batch_size must be a whole number, but got 'abc'."),
    ("--data.batch_size=1.5", "--data.batch_size must be a whole number, but got '1.5'."),
    ("--model.optimizer.lr=fast", "--model.optimizer.lr must be a number, but got 'fast'."),
    ("--trainer.max_epochs=many", "--trainer.max_epochs must be a whole number or null, but got 'many'."),
    ("--run.resume=maybe", "--run.resume must be true or false, but got 'maybe'."),
    ("--model.backbone_kwargs=3", "--model.backbone_kwargs must be a mapping or null, but got '3'."),
    ("--run.keep=lst", "--run.keep must be one of last, best, but got 'lst'; the nearest is last."),
    ("--model.lr_scheduler.name=cosin", "but got 'cosin'; the nearest is cosine."),
    ("--model.protocol=probe", "--model.protocol must be one of finetune, linear_probe, but got 'probe'."),
    ("--trainer.precision=bf8", "--trainer.precision must be one of transformer-engine,"),
]
CLASSES = [
    ("--model=Classifcation", "--model: there is no task 'Classifcation' (`baton list tasks`); the nearest is Classif"),
    ("--model=classification", "the nearest is Classification."),
    (
        "--data=CIFAR1",
        "--data: there is no data module 'CIFAR1' (`baton list data`); the nearest are CIFAR10 and CIFAR100",
    ),
    ("--data=Xyzzy", "there is no data module 'Xyzzy'; there are "),
    ("--model=torch.nn.Linear", "--model expects a subclass of Task, but got 'torch.nn.Linear'."),
    ("--model=nomodule.X", "--model: cannot import 'nomodule.X': No module named 'nomodule'."),
    (
        "--trainer.callbacks+=OnlineKN",
        "--trainer.callbacks: there is no callback 'OnlineKN'; the nearest is OnlineKNN.",
    ),
    ("--trainer.callbacks+=baton.callbacks.Nope", "cannot import 'baton.callbacks.Nope'"),
    ("--trainer.logger=WandbLoger", "--trainer.logger: there is no logger 'WandbLoger'; the nearest is WandbLogger."),
    (
        "--model.help=Clasification",
        "there is no task 'Clasification' (`baton list tasks`); the nearest is Classification.",
    ),
]
SETTINGS = [
    (
        "--model.backbone=wide_resnt",
        "got 'wide_resnt', which neither Baton nor timm knows; the nearest are wide_resnet",
    ),
    ("--model.backbone_kwargs={depth: 11}", "the nearest valid depths are 10 and 16"),
    ("--model.backbone_kwargs={dpth: 10}", "it has no 'dpth'"),
    ("--model.backbone_kwargs={depth: ten}", "'wide_resnet' cannot be built with {'depth': 'ten'}"),
    ("--model.optimizer.name=adamm", "'adamm' is not one of timm's optimisers; nearest: adam"),
    ("--model.optimizer.options={beta: 3}", "The optimiser 'sgd' does not take these options"),
    ("--model.optimizer.lr=-1", "Invalid learning rate: -1.0"),
    ("--model.init_from=nowhere", "There is no 'nowhere'; expected a model/ folder"),
    ("--data.subset=100", "subset asks for 100 training samples, but only 32 are there."),
    ("--data.batch_size=0", "batch_size must be at least 1, got 0."),
    ("--model.num_classes=3", "model.num_classes=3 is too few: the data have 10 classes."),
    ("--ckpt_path=nope.ckpt", "--ckpt_path nope.ckpt does not exist"),
    ("--run.root=/dev/null", "Cannot create the run /dev/null/r: Not a directory"),
    ("--trainer.strategy=dpp", "The trainer's settings do not work here: You selected an invalid strategy name"),
    ("--trainer.accelerator=gpuu", "You selected an invalid accelerator name"),
    ("--trainer.devices=0", "The trainer's settings do not work here"),
    ("--trainer.max_epochs=-5", "The trainer's settings do not work here"),
    ("--run.monitor=val/acc", "run.monitor=val/acc is not a metric of this run, which has train/loss"),
]


@pytest.mark.parametrize(("option", "said"), [*OPTIONS, *VALUES, *CLASSES, *SETTINGS], ids=lambda value: value[:40])
def test_on_the_command_line(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in complaint([*FIT, option], capsys)


AUTORESOLUTION = ["fit", "--model=Autoresolution", "--model.backbone=wide_resnet",
                  "--model.backbone_kwargs={depth: 10, width: 1}", *SHAPES, "--model.super_patch=13",
                  "--model.patch_backbone=autoresolution_patch_rf9", "--model.low_resolution_factor=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "--model.super_patch=127",
            "model.super_patch=127 does not fit into images of 16 x 16 pixels: make it at most 16",
        ),
        ("--model.super_patch=7", "model.super_patch=7 is smaller than the patch tower's receptive field of 9 pixels"),
        ("--model.low_resolution_factor=3", "16 / 3 = 5.33333; use another model.low_resolution_factor"),
        ("--model.patch_backbone=wrn_16_1", "model.patch_backbone='wrn_16_1' pads its input"),
        ("--model.patch_backbone=autoresolution_path", "the nearest are autoresolution_patch"),
        ("--model.patch_backbone_kwargs={receptive_field: 12}", "not 12; the nearest are 11 and 13"),
        ("--data.batch_size=31", "32 images (of one process) in batches of 31 leave a batch of one"),
        ("--data.batch_size=1", "leave a batch of one: set data.drop_last=true"),
        ("--model.objective=regresion", "--model.objective must be one of classification, regression"),
    ],
)
def test_autoresolution_on_the_command_line(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in complaint([*AUTORESOLUTION, option], capsys)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.max_features=0", "model.max_features must be at least 1, got 0."),
        ("--model.max_feature=9", "not an option of LinearProbes; the nearest is --model.max_features."),
        ("--model.num_classes=3", "model.num_classes=3 is too few: the data have 10 classes."),
    ],
)
def test_linear_probes_on_the_command_line(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in complaint(["fit", "--model=LinearProbes", *CLASSIFY[1:], *SHAPES, *BRIEF, option], capsys)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.class_weights=invers", "--model.class_weights must be"),
        (
            "--model.class_weights=[1, 2]",
            "model.class_weights must be 11 numbers of at least 0 (one a class), not all 0",
        ),
        ("--model.class_weight=none", "not an option of Segmentation; the nearest is --model.class_weights."),
        (
            "--data=Shapes",
            "Segmentation needs a mask for every image, and Shapes has none: use data with masks, such as",
        ),
        (
            "--model.backbone_kwargs.global_pool=map4",
            "whose classifier can score one cell of the last map, but that of",
        ),
        (
            "--model.trunk_from=nowhere",
            "model.trunk_from starts the trunk of a fresh backbone, but wide_resnet has none",
        ),
        ("--model.num_classes=3", "model.num_classes=3 is too few: the data have 11 classes."),
    ],
)
def test_segmentation_on_the_command_line(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    masks = ["--data=ShapesMasks", *SHAPES[1:]]
    assert said in complaint(["fit", "--model=Segmentation", *CLASSIFY[1:], *masks, *BRIEF, option], capsys)


def test_classification_of_masks_on_the_command_line(capsys: pytest.CaptureFixture) -> None:
    said = complaint(["fit", *CLASSIFY, "--data=ShapesMasks", *SHAPES[1:], *BRIEF], capsys)
    assert "Classification needs a class for every sample, but 32 of 32 in the train split have none" in said


DISTILL = ["fit", "--model=Distillation", *CLASSIFY[1:], "--model.at_weight=1", *SHAPES, *BRIEF]
PAIR = "must be pairs of a path in the student and one in the teacher, such as [[group1, group1]], but got "
LEARNING = [
    ("--model.pairs=[[group1, gruop1]]", "The teacher (WideResNet) has no module 'gruop1'; the nearest are group1, "),
    ("--model.pairs=[[gruop1, group1]]", "The student (WideResNet) has no module 'gruop1'; the nearest are group1, "),
    ("--model.pairs=[[group1, group1, x]]", f"model.pairs {PAIR}[['group1', 'group1', 'x']]."),
    ("--model.pairs=[[group1]]", f"model.pairs {PAIR}[['group1']]."),
    ("--model.pairs=[a, b]", "--model.pairs must have a list in place of 'a', but got ['a', 'b']."),
    ("--model.pairs=[[a, 3]]", "--model.pairs must have text in place of '3', but got [['a', 3]]."),
    ("--model.pairs=[[fc, fc]]", "The student's module 'fc' returns a Tensor of shape (1, 10), no map (B, C, H, W)"),
    ("--model.start_epoch={att: 2}", "model.start_epoch: there is no term 'att'; did you mean at?"),
    ("--model.start_epoch={at: 0}", "model.start_epoch counts epochs from 1, but got 0 for 'at'."),
    ("--model.start_epoch={at: two}", "must have a whole number in place of 'two', but got {'at': 'two'}."),
    ("--model.start_epoch={kd: 2}", "model.start_epoch schedules 'kd', whose weight is 0: give model.kd_weight."),
    ("--model.start_epoch={at: 9}", "lets 'at' begin in epoch 9, but training ends after 1: begin earlier, or train"),
    ("--model.final={at_weight: 0}", "model.final: there is no term 'at_weight'; did you mean at?"),
    ("--model.final={at: -1}", "model.final is a fraction of a weight, 0 or more, but got -1.0 for 'at'."),
    ("--model.final={at: none}", "--model.final must have a number in place of 'none', but got {'at': 'none'}."),
    ("--model.final=0.3", "--model.final must be a mapping or null, but got '0.3'."),
    ("--model.at_weight=-1", "model.at_weight must be 0 (the term is left out) or more, but got -1.0."),
    ("--model.kd_weight=.inf", "model.kd_weight must be 0 (the term is left out) or more, but got inf."),
    ("--model.at_weight=0", "model.teacher is given, but no term looks at it: set model.kd_weight, model.at_weight"),
    ("--model.teacher=headless", "The teacher 'headless' has no classifier: name a run that classifies"),
    ("--model.teacher=nowhere", "There is no 'nowhere'; expected a model/ folder"),
    ("--model.teacher=null", "model.teacher is missing: name the run, or the model, that the student learns from."),
    ("--model.teacher=three", "The teacher 'three' has 3 classes, the student has 10, so that its class scores say"),
    ("--model.teacher=vit", "The teacher 'vit' cannot look at images of 16 x 16 pixels (Input height (16) doesn't"),
    ("--model.cache_teacher=true", "but data.crop_padding=4 and data.flip=true would vary them: leave the augment"),
]


@pytest.mark.parametrize(("option", "said"), LEARNING)
def test_distillation_on_the_command_line(option: str, said: str, capsys: pytest.CaptureFixture) -> None:
    name = option.partition("--model.teacher=")[2] or "teacher"
    kinds: dict[str, Any] = {
        "teacher": {}, "headless": {"classes": 0}, "three": {"classes": 3},
        "vit": {"backbone": "vit_tiny_patch16_224", "embed_dim": 12, "depth": 1, "num_heads": 1},
    }  # fmt: skip
    if name in kinds:
        own = {"classes": 10, "depth": 10, "width": 1} if "backbone" not in kinds[name] else {"classes": 10}
        hand_over(Path(name), **{**own, **kinds[name]})
    scores = ["--model.kd_weight=1"] if name in ("three", "vit") else []
    assert said in complaint([*DISTILL, f"--model.teacher={name}", *scores, option], capsys)
    assert not Path("runs/r/config.yaml").exists()  # the name is still free


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("option", ["--trainer.sync_batchnorm=true", "--trainer.accelerator=gpu"])
def test_devices_that_are_not_there(option: str, capsys: pytest.CaptureFixture) -> None:
    assert "here" in complaint([*FIT, option], capsys)


def test_an_option_of_a_callback(capsys: pytest.CaptureFixture) -> None:
    said = complaint([*FIT, "--trainer.callbacks+=OnlineKNN", "--trainer.callbacks.kk=3"], capsys)
    assert said == "--trainer.callbacks.kk is not an option of OnlineKNN; the nearest is --trainer.callbacks.k."


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit"], "needs --model TASK and --data DATA, or a recipe"),
        (["fit", *SHAPES], "`baton fit` needs --model TASK, or"),
        (["fit", *CLASSIFY], "`baton fit` needs --data DATA, or"),
        (["fit", "--model"], "--model needs a value."),
        (["fit", "--model=Classification", *SHAPES], "model.backbone is missing"),
        (["test"], "`baton test` looks at a finished run: name it with --run.name. There is no run in runs yet."),
        (["test", "--run.name=nope"], "There is no run runs/nope"),
        (["predict", *CLASSIFY, *SHAPES], "`baton predict` needs a trained run"),
        (["fit", "--data=Shapes", "--model.noise=mask", "--model=Denoising"], "stands before --model: write --model D"),
        (["fit", "--model=Denoising", "--data.length=9", "--data=Shapes"], "stands before --data: write --data Shapes"),
    ],
)
def test_something_is_missing_or_late(args: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert said in complaint(args, capsys)


RECIPE = """
model:
  class_path: Classification
  init_args:
    backbone: test_resnet
    lable_smoothing: 0.1
data:
  class_path: Shapes
  init_args: {size: 16, length: 32}
trainer:
  callbacks:
  - class_path: OnlineKNN
    init_args: {k: 5}
"""
GOOD = RECIPE.replace("lable", "label")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            RECIPE,
            "recipe.yaml: model.lable_smoothing is not an option of Classification; the nearest is model.label_sm",
        ),
        (
            GOOD + "sed_everything: 3",
            "recipe.yaml: sed_everything is not an option of `baton fit`; the nearest is seed_ev",
        ),
        (GOOD.replace("data:", "dta:"), "recipe.yaml: dta is not an option of `baton fit`; the nearest is data."),
        (
            GOOD + "  max_epoch: 3",
            "recipe.yaml: trainer.max_epoch is not an option of `baton fit`; the nearest is trainer.m",
        ),
        (GOOD.replace("Classification", "Classifcation"), "recipe.yaml: model: there is no task 'Classifcation'"),
        (GOOD.replace("length: 32", "length: abc"), "recipe.yaml: data.length must be a whole number, but got 'abc'."),
        (
            GOOD.replace("{k:", "{kk:"),
            "recipe.yaml: trainer.callbacks.kk is not an option of OnlineKNN; the nearest is tr",
        ),
        (GOOD.replace("k: 5", "k: many"), "recipe.yaml: trainer.callbacks.k must be a whole number, but got 'many'."),
        (
            GOOD.replace("OnlineKNN", "OnlineKN"),
            "recipe.yaml: trainer.callbacks: there is no callback 'OnlineKN'; the ne",
        ),
        (
            GOOD.replace("  init_args:\n    backbone", "  backbone"),
            "recipe.yaml is not valid YAML in line 5, column 20",
        ),
        (
            "model: {class_path: Classification, backbone: x}",
            "recipe.yaml: model: beside class_path, everything belongs",
        ),
        ("model:\n  a: [1\nb", "The recipe recipe.yaml is not valid YAML in line 3"),
        ("- a", "The recipe recipe.yaml must hold settings such as `model:` and `data:`, but holds a list."),
        ("", "must hold settings such as `model:` and `data:`, but holds nothing."),
        ("\0", "The recipe recipe.yaml is not valid YAML"),
    ],
)
def test_in_a_recipe(recipe: str, said: str, capsys: pytest.CaptureFixture) -> None:
    Path("recipe.yaml").write_text(recipe)
    assert said in complaint(["fit", "--config", "recipe.yaml"], capsys)


def test_a_good_recipe_with_a_bad_option(capsys: pytest.CaptureFixture) -> None:
    Path("recipe.yaml").write_text(GOOD)
    args = ["fit", "--config=recipe.yaml"]
    assert complaint([*args, "--data.lenght=3"], capsys).startswith(
        "--data.lenght is not an option of Shapes; the near"
    )
    assert complaint([*args, "--data.length=abc"], capsys).startswith("--data.length must be a whole number")


@pytest.mark.parametrize("flag", [["--config", "recipes.yaml"], ["--config=recipes.yaml"], ["-c", "recipes.yaml"]])
def test_a_recipe_that_is_not_there(flag: list[str], capsys: pytest.CaptureFixture) -> None:
    Path("recipe.yaml").write_text(GOOD)
    said = complaint(["fit", *flag], capsys)
    assert said == "The recipe recipes.yaml cannot be read: No such file or directory; the nearest is recipe.yaml."


# A run that is there already


def test_runs_do_not_mix(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(FIT) == 0
    capsys.readouterr()
    assert "The run runs/r exists" in complaint(FIT, capsys)
    said = complaint([*FIT, "--run.resume=true", "--data.batch_size=4"], capsys)
    assert "was started with data.init_args.batch_size=128, now it is 4" in said
    checkpoint = "--ckpt_path=runs/r/checkpoints/last.ckpt"
    said = complaint([*FIT, "--model=Denoising", "--run.name=s", checkpoint], capsys)
    assert "is of baton.supervised.Classification, the model is baton.ssl_tasks.Denoising" in said
    said = complaint([*FIT, "--model.init_from=runs/r", "--model.backbone=test_resnet", "--run.name=s"], capsys)
    assert "'runs/r' holds backbone 'wide_resnet', but 'test_resnet' was asked for" in said
    assert "There is no 'runs/rr'; did you mean r" in complaint(
        [*FIT, "--model.init_from=runs/rr", "--run.name=s"], capsys
    )
    assert "The nearest is r." in complaint(["test", "--run.name=rr"], capsys)
    assert "The runs in runs: r." in complaint(["test"], capsys)
    said = complaint(["test", "--run.name=r", "--model.backbone=test_resnet"], capsys)
    assert "holds backbone 'wide_resnet', but 'test_resnet' was asked for" in said


def test_images_of_another_size(capsys: pytest.CaptureFixture) -> None:
    args = [*FIT, "--model.backbone=vit_tiny_patch16_224", "--model.backbone_kwargs={depth: 1}"]
    assert "Input height (16) doesn't match model (224); give them that size" in complaint(args, capsys)


# Errors of others


def raised(function, *args) -> BaseException:
    try:
        function(*args)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_defect_has_no_sentence() -> None:
    assert sentence(raised(int, "x")) is None
    assert sentence(raised(os.stat, "nowhere")) is None
    assert sentence(raised(lambda: {}["x"])) is None


def test_the_world_outside_has_one() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "runs/r/metrics.csv")

    assert sentence(raised(full)) == "runs/r/metrics.csv: No space left on device."
    assert "lower data.batch_size" in str(sentence(torch.OutOfMemoryError("CUDA out of memory")))
