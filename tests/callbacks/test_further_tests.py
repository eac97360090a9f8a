"""Further tests claim what a naive loop over the files finds, and to change nothing about the run they look at."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from baton import cli
from baton.callbacks import further_tests as further  # not their names: pytest would take them for tests
from baton.data import ImageFolder
from baton.data.decoding import centre_crop, decode, resize_shorter
from baton.ssl_tasks import Denoising, Reconstruction
from baton.supervised import Classification, LinearProbes
from test_ddp import TWO, run
from tiny import WRN, Arrays, fit, same, state, trainer

DROPOUT = {"backbone": "wide_resnet", "backbone_kwargs": {"depth": 10, "width": 1, "drop_rate": 0.3}}
NIN = {"backbone": "nin", "backbone_kwargs": {"width": 0.1}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven classes of images of odd shapes, of which some are alike: five training and three test images each."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 1), ("test", 3)):
        for name in "abcdefg":
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shape = (*generator.integers(3, 7, 2) * 7, 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8) // 2 + 15 * (ord(name) - ord("a"))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def folder(root, **options):
    return ImageFolder(str(root), **{"image_size": 16, "resize": 20, "num_workers": 0, "batch_size": 8, **options})


def scores_of(task, images):
    """One image at a time, in float32, by the network itself: for global average pooling that is the convolution."""
    task.eval()
    with torch.no_grad():
        return torch.cat([task.backbone(task.normalize(image[None].float() / 255)) for image in images])


def expected(scores, targets, name):
    ranks = [int((row > row[target]).sum()) for row, target in zip(scores, targets, strict=True)]
    one, five = (sum(rank < top for rank in ranks) / len(ranks) for top in (1, 5))
    return {
        f"test/{name}_accuracy": pytest.approx(one),
        f"test/{name}_error": pytest.approx(1 - one),
        f"test/{name}_accuracy_top5": pytest.approx(five),
        f"test/{name}_error_top5": pytest.approx(1 - five),
    }


def split(root, name):
    files = sorted((root / name).glob("*/*"))
    return [decode(file) for file in files], [ord(file.parent.name) - ord("a") for file in files]


def recorded(task, name):
    return {key: value for key, value in task.latest.items() if key.startswith(f"test/{name}_")}


TASKS = [
    lambda: Classification(**WRN),
    lambda: Reconstruction(classification_weight=1.0, **NIN),
]


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_the_recorded_errors_are_those_of_a_loop_over_the_files(make, batch_size, root):
    torch.manual_seed(0)
    task, data = make(), folder(root, batch_size=batch_size)
    callbacks = [further.TestOnWholeImages(20), further.TestOnTrainingImages(), further.TestOnTrainingImages(11)]
    for callback, name in zip(callbacks[1:], ("training", "some"), strict=True):
        callback.prefix = name
    runner = trainer(callbacks=callbacks)
    runner.test(task, data, verbose=False)
    images, targets = split(root, "test")
    whole = [resize_shorter(image, 20) for image in images]
    assert len({image.shape for image in whole}) > 3
    assert recorded(task, "convolution") == expected(scores_of(task, whole), targets, "convolution")
    images, targets = split(root, "train")
    crops = [centre_crop(image, 16, 20) for image in images]
    assert recorded(task, "training") == expected(scores_of(task, crops), targets, "training")
    some = [index * 35 // 11 for index in range(11)]
    scores = scores_of(task, [crops[index] for index in some])
    assert recorded(task, "some") == expected(scores, [targets[index] for index in some], "some")
    images, targets = split(root, "test")
    crops = [centre_crop(image, 16, 20) for image in images]
    assert task.latest["test/error"] == expected(scores_of(task, crops), targets, "x")["test/x_error"]
    rows = {name: value for _, row in runner.logger.rows for name, value in row.items()}
    assert rows.items() >= task.latest.items()
    assert len(task.latest) > 12


def test_a_classifier_over_the_map_sees_every_window(root):
    torch.manual_seed(0)
    kwargs = {**WRN["backbone_kwargs"], "global_pool": "map2"}
    task = Classification(backbone="wide_resnet", backbone_kwargs=kwargs)
    trainer(callbacks=[further.TestOnWholeImages(23)]).test(task, folder(root), verbose=False)
    task.eval()
    images, targets = split(root, "test")
    scores = []
    with torch.no_grad():
        for image in images:
            features = task.backbone.forward_features(task.normalize(resize_shorter(image, 23)[None].float() / 255))
            windows = [features[:, :, y : y + 4, x : x + 4] for y in range(features.shape[2] - 3)
                       for x in range(features.shape[3] - 3)]  # fmt: skip
            scores.append(torch.stack([task.backbone.forward_head(window) for window in windows]).mean(0))
    assert recorded(task, "convolution") == expected(torch.cat(scores), targets, "convolution")


def test_images_of_a_crops_size_are_tested_as_crops(tmp_path):
    for name in ("train", "test"):
        for label in "abc":
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(5):
                pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{number}.png")
    torch.manual_seed(0)
    task = Classification(**WRN)
    callbacks = [further.TestOnWholeImages(16), further.TestOnTrainingImages()]
    trainer(callbacks=callbacks).test(task, folder(tmp_path, resize=None), verbose=False)
    errors = {name: value for name, value in task.latest.items() if name.endswith("error")}
    assert errors.keys() == {"test/error", "test/convolution_error", "test/training_error"}
    assert list(errors.values()) == pytest.approx([2 / 3] * 3)  # the same five images in every class
    assert not any("top5" in name for name in task.latest)


def test_a_run_is_bit_identical_with_and_without_further_tests(root):
    def trained(*callbacks):
        torch.manual_seed(0)
        task, data = Classification(**DROPOUT), folder(root, flip=True)
        runner = trainer(2, callbacks=list(callbacks))
        runner.fit(task, datamodule=data)
        modes = [module.training for module in task.modules()]
        runner.test(task, data, verbose=False)
        assert modes == [module.training for module in task.modules()]
        kept = [
            (step, row) for step, row in runner.logger.rows if not any(re.search("convol|traini", key) for key in row)
        ]
        return state(task), kept, torch.rand(1), runner.logger

    plain = trained()
    watched = trained(further.TestOnWholeImages(20), further.TestOnTrainingImages(9))
    assert same(plain[0], watched[0])
    assert plain[1] == watched[1]
    assert torch.equal(plain[2], watched[2])
    assert len(watched[3].column("test/convolution_error")) == len(watched[3].column("test/training_error")) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_network_evaluates_in_the_precision_of_the_run(precision, root):
    seen = []
    task = Classification(**DROPOUT)

    def look(module, inputs, output):
        seen.append((module.training, torch.is_grad_enabled(), output.dtype, inputs[0].shape[0]))

    task.configure_model = lambda configure=task.configure_model: (
        configure(),
        task.backbone.fc.register_forward_hook(look),
    )
    callbacks = [further.TestOnWholeImages(20), further.TestOnTrainingImages()]
    trainer(callbacks=callbacks, precision=precision).test(task, folder(root), verbose=False)
    assert {kind[:2] for kind in seen} == {(False, False)}
    assert {kind[2] for kind in seen} == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    assert sum(count for *_, count in seen) == 21 + 21 + 35
    assert max(count for *_, count in seen[3:-5]) > 1, "images of one shape are measured together"


@pytest.mark.parametrize(("limit", "wanted"), [(1, 7), (2, 14), (9, 21), (0.5, 7), (1.0, 21)])
def test_fewer_batches_where_the_trainer_says_so(limit, wanted, root):
    counts = []

    class Counted(further.TestOnWholeImages):
        def batches(self, loaded, data):
            counts.append(len(loaded[0]))
            return super().batches(loaded, data)

    trainer(callbacks=[Counted(20)], limit_test_batches=limit).test(Classification(**WRN), folder(root), verbose=False)
    assert sum(counts) == wanted


@pytest.mark.parametrize(
    ("make", "data", "callback", "said"),
    [
        (TASKS[0], lambda root: Arrays(8, test=8), lambda: further.TestOnWholeImages(16),
         "^Arrays has images of one size alone"),
        (TASKS[0], folder, lambda: further.TestOnWholeImages(15), "16 pixels of data.image_size, but got shorter_side"),
        (TASKS[0], lambda root: folder(root, crop="squash", cache=True), lambda: further.TestOnWholeImages(20),
         "^data.cache=true keeps cropped images alone"),
        (lambda: Classification(backbone="test_vit"), lambda root: folder(root, image_size=160, resize=None),
         lambda: further.TestOnWholeImages(180), "test_vit has one fixed size"),
        (lambda: Denoising(**WRN), folder, lambda: further.TestOnWholeImages(20),
         "^TestOnWholeImages measures the backbone's linear classifier, and Denoising trains none here: use it with"),
        (lambda: LinearProbes(**WRN), folder, further.TestOnTrainingImages, "and LinearProbes trains none here"),
        (lambda: Denoising(**WRN), lambda root: Arrays(8, test=8, num_classes=0), further.TestOnTrainingImages,
         "^Arrays has no labelled training images here"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_training(make, data, callback, said, root):
    for verb in ("fit", "test"):
        steps = []
        task = make()
        task.losses = task.evaluate = lambda batch, steps=steps: steps.append(batch)
        runner = trainer(callbacks=[callback()])
        with pytest.raises(ValueError, match=said) as caught:
            getattr(runner, verb)(task, datamodule=data(root))
        assert "\n" not in str(caught.value)
        assert not steps


def test_validation_is_left_alone():
    rows = fit(Classification(**WRN), Arrays(16, val=8), callbacks=[further.TestOnTrainingImages()])
    assert rows.column("val/error")
    assert not [name for _, row in rows.rows for name in row if "training" in name]
    runner = trainer(callbacks=[further.TestOnWholeImages()])  # in `validate`, nobody asks for whole images
    runner.validate(Classification(**WRN), Arrays(16, val=8), verbose=False)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"limit must be at least 1, or null for all images, got 0\."):
        further.TestOnTrainingImages(0)


# ---------------------------------------------------------------------------------------------------------- by command


def recipe(tmp_path: Path, root: Path, shorter_side: int = 20, **data: object) -> list[str]:
    content = {
        "model": {"class_path": "Classification", "init_args": dict(WRN)},
        "data": {"class_path": "ImageFolder", "init_args": {
            "root": str(root), "image_size": 16, "num_workers": 0, "batch_size": 4, **data}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": [
            {"class_path": "TestOnWholeImages", "init_args": {"shorter_side": shorter_side}},
            {"class_path": "TestOnTrainingImages", "init_args": {"limit": 11}},
        ]},
        "run": {"root": str(tmp_path), "name": "r", "wandb": False, "test": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(tmp_path / "recipe.yaml")]


NAMES = {
    f"test/{kind}_{name}"
    for kind in ("convolution", "training")
    for name in ("error", "accuracy", "error_top5", "accuracy_top5")
}


def measured(run: Path) -> dict[str, float]:
    """The last values of the further tests in metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: float(row[name]) for row in rows for name in NAMES if row.get(name)}


def test_by_their_short_names_in_a_recipe(tmp_path, root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["baton"])
    assert cli.main(recipe(tmp_path, root)) == 0
    metrics = json.loads((tmp_path / "r/model/config.json").read_text())["baton"]["metrics"]
    assert metrics.keys() >= NAMES
    first = measured(tmp_path / "r")
    assert first == {name: metrics[name] for name in NAMES}
    (tmp_path / "r/metrics.csv").unlink()
    capsys.readouterr()
    assert cli.main(["test", "--run.name=r", f"--run.root={tmp_path}"]) == 0
    assert f"test/convolution_error {first['test/convolution_error']:.4f}" in capsys.readouterr().out
    assert measured(tmp_path / "r") == first


def test_a_mistake_is_one_sentence(tmp_path, root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["baton"])
    assert cli.main(recipe(tmp_path, root, shorter_side=15)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "but got shorter_side=15: make it larger." in error
    assert not (tmp_path / "r/model").exists()


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path, root):
    python = [sys.executable, "-m", "baton"]
    run([*python, *recipe(tmp_path, root), *TWO])  # 21 whole and 11 training images: the second process has fewer
    together = measured(tmp_path / "r")
    assert together.keys() == NAMES
    (tmp_path / "r/metrics.csv").unlink()
    run([*python, "test", "--run.name=r", f"--run.root={tmp_path}", "--trainer.devices=1", "--trainer.strategy=auto"])
    assert measured(tmp_path / "r") == pytest.approx(together)
