"""Segmentation: losses, weights and metrics by hand, one process as two, and pixels that do not count."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from baton.data.masks import IGNORE
from baton.optim import Optimizer
from baton.supervised import Classification, Segmentation
from baton.supervised.mask_pictures import GREY
from baton.supervised.segmentation import intersection_over_union, inverse_frequencies
from baton.task import Task
from tiny import WRN, Arrays, MaskArrays, fit, same, state, trainer

UNET = {"backbone": "unet", "backbone_kwargs": {"levels": 2, "width": 4, "convs": 1}}
WIDER = {"backbone": "unet", "backbone_kwargs": {"levels": 2, "width": 8}}
STILL = Optimizer("momentum", lr=0.0)


def ready(classes=4, double=True, **kwargs):
    torch.manual_seed(0)
    task = Segmentation(num_classes=classes, **{**UNET, **kwargs})
    task.configure_model()
    torch.nn.init.normal_(task.backbone.get_classifier().weight)
    return task.double() if double else task


def fixed(task, scores):
    """Let the network say these scores, the same for every batch of this size."""
    task.scores = lambda images, size=None: scores[: len(images)]
    return task


def draw(count, size, classes, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, *size, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (count, *size), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = IGNORE
    return images, masks


# --------------------------------------------------------------------------------------------------------------- loss


def naive_loss(scores, masks, weights):
    """Pixel by pixel; the mean over images of their means over pixels that count."""
    total = 0.0
    for image, mask in zip(scores, masks, strict=True):
        loss, counted = 0.0, 0
        for y, x in np.ndindex(mask.shape):
            label = int(mask[y, x])
            if label == IGNORE:
                continue
            row = image[:, y, x]
            counted += 1
            loss += weights[label] * (math.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
        total += loss / counted if counted else 0.0
    return total / len(masks)


WEIGHTS = [[1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 3.0, 1.25]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", [(5, 7), (6, 3)])
def test_losses_by_hand(size, weights):
    task = ready(class_weights=weights)
    images, masks = draw(3, size, 4)
    masks[1] = IGNORE
    scores = torch.randn(3, 4, *size, dtype=torch.float64) * 4
    losses = fixed(task, scores).losses((images, masks))
    assert losses["loss"].item() == pytest.approx(naive_loss(scores.numpy(), masks.numpy(), weights), rel=1e-10)
    assert task.evaluate((images, masks))["loss"].item() == losses["loss"].item()
    wrong = []
    for image, mask in zip(scores, masks, strict=True):
        pixels = [int(image[:, y, x].argmax()) != int(mask[y, x]) for y, x in np.ndindex(size) if mask[y, x] != IGNORE]
        wrong.append(sum(pixels) / len(pixels) if pixels else 0.0)
    assert losses["pixel_error"].item() == pytest.approx(sum(wrong) / 3, rel=1e-5)


def test_gradients_by_hand():
    weights = WEIGHTS[1]
    task = ready(class_weights=weights)
    images, masks = draw(3, (5, 4), 4)
    scores = torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    fixed(task, scores).losses((images, masks))["loss"].backward()
    chances = scores.detach().softmax(1).numpy()
    expected = np.zeros(scores.shape)
    for number, mask in enumerate(masks.numpy()):
        for y, x in np.ndindex(mask.shape):
            if (label := mask[y, x]) != IGNORE:
                residue = chances[number, :, y, x] - np.eye(4)[label]
                expected[number, :, y, x] = weights[label] * residue / (mask != IGNORE).sum() / 3
    np.testing.assert_allclose(scores.grad.numpy(), expected, atol=1e-15)
    assert not scores.grad[(masks == IGNORE)[:, None].expand_as(scores)].any()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_process_is_the_mean_of_two(weights):
    """Although processes see other numbers of pixels of other weights."""
    task = ready(class_weights=weights)
    images, masks = draw(8, (9, 6), 4)
    masks[1, :7], masks[3], masks[4] = IGNORE, IGNORE, 2

    def run(part):
        task.zero_grad()
        loss = task.losses((images[part], masks[part]))["loss"]
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in task.parameters())]

    whole = run(slice(None))
    halves = [run(slice(rank, None, 2)) for rank in range(2)]
    for one, *two in zip(whole, *halves, strict=True):
        torch.testing.assert_close(one, sum(two) / 2)


def test_a_batch_of_ignored_pixels_teaches_nothing():
    task = ready(class_weights=WEIGHTS[1])
    images, masks = draw(2, (6, 6), 4, ignored=1.1)
    losses = task.losses((images, masks))
    losses["loss"].backward()
    assert losses["loss"].item() == losses["pixel_error"].item() == 0.0
    assert all(not parameter.grad.any() for parameter in task.backbone.parameters())  # and none is not a number


# ------------------------------------------------------------------------------------------------------------- scores


def naive_enlarge(scores, height, width):
    """Bilinear, centres of pixels at halves."""
    channels, rows, columns = scores.shape
    out = np.zeros((channels, height, width))
    for y, x in np.ndindex(height, width):
        place = [max((i + 0.5) * n / m - 0.5, 0) for i, n, m in ((y, rows, height), (x, columns, width))]
        for down in (0, 1):
            for right in (0, 1):
                cell = [int(place[0]) + down, int(place[1]) + right]
                share = abs(1 - down - place[0] % 1) * abs(1 - right - place[1] % 1)
                out[:, y, x] += share * scores[:, min(cell[0], rows - 1), min(cell[1], columns - 1)]
    return out


@pytest.mark.parametrize(
    ("kwargs", "map_size"), [(WRN, (4, 6)), (UNET, (16, 22)), ({"backbone": "test_resnet"}, (1, 1))]
)
def test_scores_are_those_of_cells_enlarged(kwargs, map_size):
    task = ready(classes=3, **{"backbone_kwargs": None, **kwargs}).eval()
    images = torch.rand(2, 3, 16, 22, dtype=torch.float64)
    with torch.no_grad():
        scores, features = task.scores(images), task.backbone.forward_features(task.normalize(images))
        assert features.shape[2:] == map_size
        linear = task.backbone.get_classifier()
        cells = torch.einsum("bfhw,cf->bchw", features, linear.weight) + linear.bias.view(-1, 1, 1)
        assert scores.shape == (2, 3, 16, 22)
        for image, expected in zip(scores.numpy(), cells.numpy(), strict=True):
            np.testing.assert_allclose(image, naive_enlarge(expected, 16, 22), atol=1e-12)
        assert task.scores(images, (5, 9)).shape == (2, 3, 5, 9)


def test_masks_of_another_size_than_the_image():
    task = ready()
    images, masks = draw(2, (10, 8), 4)[0], draw(2, (7, 5), 4)[1]
    assert task.losses((images, masks))["loss"].isfinite()
    assert task.predict((images, masks))["prediction"].shape == masks.shape


def test_scores_are_single_precision_under_autocast():
    task = ready(double=False)
    images = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.scores(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "kwargs"), [("test_vit", {"img_size": 32}), ("test_convnext", {}), ("mobilenetv3_small_050", {})]
)
def test_timms_networks_learn(name, kwargs):
    torch.manual_seed(0)
    options = {"backbone": name, "backbone_kwargs": kwargs, "optimizer": Optimizer("adamw", 1e-3)}
    rows = fit(Segmentation(**options), MaskArrays(6, val=2, size=(32, 32), batch_size=2), 2)
    assert all(math.isfinite(value) for value in rows.column("val/loss"))


def test_it_learns_what_pixels_know():
    torch.manual_seed(0)
    task = Segmentation(class_weights="inverse_frequency", optimizer=Optimizer("adam", 0.02), **WIDER)
    rows = fit(task, MaskArrays(24, val=8, batch_size=4, size=(11, 14)), 12)
    assert rows.column("val/mean_iou")[-1] > 0.9
    assert rows.column("val/loss")[-1] < rows.column("val/loss")[0] / 3


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("counts", [[5, 5, 5], [900, 90, 9, 1], [7, 0, 3], [4], [10**12, 1]])
def test_weights_are_inverse_to_frequencies(counts):
    weights = inverse_frequencies(torch.tensor(counts))
    total, there = sum(counts), sum(count > 0 for count in counts)
    for count, weight in zip(counts, weights.tolist(), strict=True):
        assert weight == pytest.approx(total / (there * count) if count else 0.0, rel=1e-6)
    assert sum(c * w for c, w in zip(counts, weights.tolist(), strict=True)) / total == pytest.approx(1, rel=1e-6)


def naive_weights(data, classes):
    _, masks = data.train_set.__getitems__(range(len(data.train_set)))
    counts = [int((masks == number).sum()) for number in range(classes)]
    there = sum(count > 0 for count in counts)
    return [sum(counts) / there / count if count else 0.0 for count in counts]


def test_weights_come_from_the_training_split(tmp_path, monkeypatch):
    data = MaskArrays(20, val=6, test=6, subset=13, flip=True)
    data.setup()
    data.train_set.dataset.masks[:, :4] = 1
    task = Segmentation(class_weights="inverse_frequency", optimizer=STILL, **UNET)
    saver = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=1, enable_version_counter=False)
    fit(task, data, callbacks=[saver], enable_checkpointing=True)
    expected = naive_weights(data, 3)
    assert task.weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert len({round(weight, 3) for weight in expected}) == 3
    # They travel with the checkpoint, whatever the data are.
    path = tmp_path / "one.ckpt"
    for one in (Task, Segmentation):  # Lightning looks for arguments in frames, where jaxtyping stands
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weights"], task.weights)
    loaded = Segmentation.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert torch.equal(loaded.weights, task.weights)
    for options in ({"class_weights": "inverse_frequency"}, {}):
        other = Segmentation(**options, **UNET)
        trainer().validate(other, MaskArrays(8, val=6), ckpt_path=path, verbose=False, weights_only=True)
        assert torch.equal(other.weights, task.weights)


def test_classes_without_a_pixel_have_no_weight_and_a_warning():
    data = MaskArrays(8, val=4, num_classes=5)
    data.setup()
    data.train_set.masks[data.train_set.masks == 3] = IGNORE
    task = Segmentation(num_classes=6, class_weights="inverse_frequency", optimizer=STILL, **UNET)
    with pytest.warns(UserWarning, match=r"No training pixel is of 1 of 5 classes \(class 3\): their weight is 0"):
        fit(task, data)
    assert task.weights.tolist() == pytest.approx([*naive_weights(data, 5), 0.0], rel=1e-6)
    assert task.weights[3] == 0
    assert math.isfinite(task.latest["val/loss"])


def test_weights_of_none_are_one():
    task = Segmentation(optimizer=STILL, **UNET)
    fit(task, MaskArrays(8))
    assert task.weights.tolist() == [1.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------------------------------ metrics


def naive_metrics(predictions, masks, classes):
    """Over all pixels of all images that count."""
    both, either, right, seen = np.zeros(classes), np.zeros(classes), 0, 0
    for prediction, mask in zip(np.asarray(predictions).ravel(), np.asarray(masks).ravel(), strict=True):
        if mask == IGNORE:
            continue
        seen += 1
        right += prediction == mask
        for number in {int(prediction), int(mask)}:
            either[number] += 1
            both[number] += prediction == mask
    ratios = [b / e if e else math.nan for b, e in zip(both, either, strict=True)]
    there = [ratio for ratio in ratios if not math.isnan(ratio)]
    objects = [ratio for ratio in ratios[1:] if not math.isnan(ratio)]
    return {
        "pixel_accuracy": right / seen if seen else math.nan,
        "mean_iou": sum(there) / len(there) if there else math.nan,
        "mean_iou_objects": sum(objects) / len(objects) if objects else math.nan,
    }, ratios


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_a_split_are_counted_over_all_its_pixels(stage):
    data = MaskArrays(8, val=11, test=11, batch_size=4, num_classes=5, size=(9, 13))
    data.setup()
    split, dataset = ("val", data.val_set) if stage == "validate" else ("test", data.test_set)
    dataset.masks[dataset.masks == 4] = IGNORE  # a class that no mask has
    dataset.masks[2] = IGNORE
    torch.manual_seed(0)
    task = Segmentation(per_class=True, **UNET)
    task.num_classes = 5
    getattr(trainer(), stage)(task, data, verbose=False)
    torch.nn.init.normal_(task.backbone.fc.weight)
    task.backbone.fc.bias.data[4] = -1e6  # nor any prediction
    getattr(trainer(), stage)(task, data, verbose=False)
    images, masks = dataset.__getitems__(range(11))
    with torch.no_grad():
        scores = task.eval().scores(images.float() / 255)
    expected, ratios = naive_metrics(scores.argmax(1), masks, 5)
    expected["loss"] = naive_loss(scores.double().numpy(), masks.numpy(), [1.0] * 5)
    names = ["iou_background", *(f"iou_class {number}" for number in range(1, 5))]
    found = {name.removeprefix(f"{split}/"): value for name, value in task.latest.items()}
    assert found == pytest.approx({**expected, **dict(zip(names, ratios, strict=True))}, rel=1e-5, nan_ok=True)
    assert math.isnan(found["iou_class 4"])
    assert len(set(np.round(ratios[:4], 3))) > 2


def test_without_a_background_there_are_no_objects():
    data = MaskArrays(4, val=4)
    data.classes = ["sky", "road", "car"]
    task = Segmentation(optimizer=STILL, **UNET)
    fit(task, data)
    assert task.latest.keys() == {
        "train/loss", "train/pixel_error", "lr", "val/loss", "val/pixel_accuracy", "val/mean_iou",
    }  # fmt: skip


def test_a_split_of_ignored_pixels_has_no_metrics():
    data = MaskArrays(4, val=4)
    data.setup()
    data.val_set.masks[:] = IGNORE
    task = Segmentation(optimizer=STILL, **UNET)
    fit(task, data)
    assert task.latest["val/loss"] == 0
    assert all(math.isnan(task.latest[f"val/{name}"]) for name in ("pixel_accuracy", "mean_iou", "mean_iou_objects"))


def test_metrics_start_afresh_every_epoch():
    rows = fit(Segmentation(optimizer=STILL, **UNET), MaskArrays(8, val=5), 3)
    assert len(set(rows.column("val/mean_iou"))) == 1
    assert len(rows.column("val/mean_iou")) == 3


def test_the_ratio_of_each_class():
    matrix = torch.tensor([[3.0, 1.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert intersection_over_union(matrix).tolist() == pytest.approx([3 / 6, 4 / 7, 0.0, 0.0])
    assert intersection_over_union(torch.eye(2) * torch.tensor([1.0, 0.0])).tolist() == pytest.approx(
        [1.0, math.nan], nan_ok=True
    )


# ----------------------------------------------------------------------------------------------- predictions, pictures


def test_predictions_of_every_image():
    task = ready()
    images, masks = draw(4, (6, 7), 4)
    masks[3] = IGNORE
    predicted = task.eval().predict((images, masks))
    classes = task.scores(images).argmax(1)
    assert predicted["prediction"].dtype == predicted["target"].dtype == torch.uint8
    assert torch.equal(predicted["prediction"].long(), classes)
    assert torch.equal(predicted["target"].long(), masks)
    for number in range(4):
        expected, _ = naive_metrics(classes[number], masks[number], 4)
        for name in ("pixel_accuracy", "mean_iou"):
            assert predicted[name][number].item() == pytest.approx(expected[name], nan_ok=True)


def test_predictions_of_images_without_masks():
    task = Segmentation(num_classes=5, optimizer=STILL, **UNET)
    parts = trainer().predict(task, Arrays(4, test=6, num_classes=0, batch_size=4))
    assert [part.keys() for part in parts] == [{"prediction"}] * 2
    assert torch.cat([part["prediction"] for part in parts]).shape == (6, 16, 16)


def test_pictures_show_image_mask_and_prediction():
    task = ready(classes=3)
    task.classes = ["background", "a", "b"]
    images, masks = draw(10, (6, 5), 3)
    picture = task.pictures((images, masks))["segmentation"]
    assert picture.shape == (3, 3 * 8 + 2, 8 * 7 + 2)
    grey, black = torch.tensor(GREY), torch.zeros(3)
    for number in range(8):
        image, truth, found = (
            picture[:, 2 + 8 * row : 8 + 8 * row, 2 + 7 * number : 7 + 7 * number] for row in range(3)
        )
        assert torch.equal(image, images[number])
        ignored = (truth == grey.view(3, 1, 1)).all(0)
        assert torch.equal(ignored, masks[number] == IGNORE)
        assert torch.equal((truth == black.view(3, 1, 1)).all(0), masks[number] == 0)
        classes = task.scores(images[number : number + 1]).argmax(1)[0]
        assert torch.equal((found == black.view(3, 1, 1)).all(0), classes == 0)
        known = ~ignored
        agree = (truth == found).all(0)
        assert torch.equal(agree[known], (classes == masks[number])[known])


# ------------------------------------------------------------------------------------------------------------ hand-over


def run(tmp_path, name, task, data):
    from baton.handover import write_model

    fit(task, data)
    write_model(
        tmp_path / name, task.backbone, backbone_kwargs=task.hparams["backbone_kwargs"], config={}, metrics={},
        parent=task.parent, classes=task.classes,
    )  # fmt: skip
    return str(tmp_path / name)


@pytest.mark.parametrize("kwargs", [WRN, UNET], ids=["wide_resnet", "unet"])
def test_a_segmented_trunk_goes_on_to_classification_and_back(kwargs, tmp_path):
    data = MaskArrays(8, num_classes=4)
    first = Segmentation(optimizer=Optimizer("momentum", 0.01), **kwargs)
    folder = run(tmp_path, "segmentation", first, data)
    handed = load_file(Path(folder) / "model.safetensors")
    assert handed["fc.weight"].shape[0] == 4
    record = json.loads((Path(folder) / "config.json").read_text())
    assert record["label_names"] == data.classes
    second = Classification(init_from=folder, optimizer=Optimizer("momentum", 0.01))
    trunk = {name: value for name, value in handed.items() if not name.startswith("fc.")}
    assert same(trunk, state(second.backbone))
    third = Segmentation(init_from=run(tmp_path, "classification", second, Arrays(8, num_classes=7)))
    fit(third, data)
    kept = Segmentation(init_from=folder, keep_classifier=True, optimizer=STILL)
    fit(kept, data)
    if kwargs is UNET:  # without BatchNorm, whose statistics move
        assert same(state(kept.backbone), handed)
    with pytest.raises(ValueError, match="kept has 4 classes, but 3 are needed"):
        fit(Segmentation(init_from=folder, keep_classifier=True), MaskArrays(8))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_data_without_masks(stage):
    with pytest.raises(
        ValueError, match=r"needs a mask for every image, and Arrays has none: use data with masks"
    ) as e:
        getattr(trainer(), stage)(Segmentation(**UNET), Arrays(8, val=4, test=4))
    assert "\n" not in str(e.value)


def test_masks_without_classes():
    data = MaskArrays(8)
    data.setup()
    data.classes = []
    with pytest.raises(ValueError, match="Segmentation needs labelled data of at least two classes"):
        fit(Segmentation(**UNET), data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 2}, "model.num_classes=2 is too few: the data have 3 classes"),
        ({"num_classes": 256}, "Masks can hold at most 255 classes, but there are 256"),
        ({"class_weights": [1.0, 2.0]}, r"class_weights must be 3 numbers of at least 0 .*, but got \[1.0, 2.0\]"),
        ({"class_weights": [1.0, -2.0, 0.0]}, "must be 3 numbers of at least 0"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"class_weights": [1.0, math.nan, 0.0]}, "must be 3 numbers"),
        ({**WRN, "backbone_kwargs": {"depth": 10, "width": 1, "global_pool": "map4"}}, "sees 4 x 4 cells at once"),
        ({"trunk_from": "nowhere"}, "but unet has none: leave one of them out"),
    ],
)
def test_mistakes_are_sentences(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        fit(Segmentation(**{**UNET, **options}), MaskArrays(8))
    assert "\n" not in str(caught.value)


def test_training_pixels_that_are_all_ignored_have_no_frequencies():
    data = MaskArrays(8)
    data.setup()
    data.train_set.masks[:] = IGNORE
    with pytest.raises(ValueError, match="inverse_frequency needs masks, but all training pixels are ignored"):
        fit(Segmentation(class_weights="inverse_frequency", **UNET), data)


def test_classification_says_that_masks_are_no_classes():
    with pytest.raises(
        ValueError, match="Classification needs a class for every sample, but 8 of 8 in the train split"
    ):
        fit(Classification(**WRN), MaskArrays(8))
