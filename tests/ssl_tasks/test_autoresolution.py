"""Autoresolution: tiled equals separate, losses against loops, what is handed on, and what is refused."""

import pytest
import torch

from baton.data import Shapes
from baton.ssl_tasks import Autoresolution
from tiny import WRN

#: of 47 in a row or column
CELLS = torch.tensor([0, 1, 22, 35, 46])
PATCH = {"patch_backbone": "autoresolution_patch_rf9", "patch_backbone_kwargs": {"width": 0.15, "norm": False}}


def make(objective="classification", **options):
    torch.manual_seed(0)
    options = {"super_patch": 13, "low_resolution_factor": 2, "head_width": 8, **WRN, **PATCH, **options}
    return Autoresolution(objective=objective, **options)


def images(count=5, height=22, width=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 255


def batch(count=5, **sizes):
    return images(count, **sizes), torch.zeros(count, dtype=torch.long)


def spread(task):
    """Random weights everywhere, so that answers differ from cell to cell."""
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    torch.nn.init.normal_(task.head.last.weight)
    return task


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_tiled_equals_patches_evaluated_separately_on_the_papers_sizes(objective):
    """127 px super patch, 47 x 47 cells, receptive field 35, stride 2; BatchNorm everywhere, in evaluation mode.

    Of the cells: the corners, others at the edges, and some within. The next test looks at all of a smaller grid.
    """
    task = make(
        objective, super_patch=127, low_resolution_factor=8, patch_backbone="autoresolution_patch",
        patch_backbone_kwargs={"width": 0.1},
    )  # fmt: skip
    task = spread(task).double().eval()
    x = images(2, 256, 256).double()
    places = torch.tensor([0, 129]), torch.tensor([77, 3])
    low, super_patches = task.low_resolution(x), task.tiling.crop(x, *places)
    cells = torch.cartesian_prod(CELLS, CELLS)
    rows, columns = cells.unbind(1)
    patches = torch.stack([super_patches[:, :, 2 * r : 2 * r + 35, 2 * c : 2 * c + 35] for r, c in cells])
    lows = low.repeat(len(rows), 1, 1, 1)
    with torch.no_grad():
        tiled = task(low, super_patches, (0, 1)).view(2, 2, 2, 47, 47)  # shift, image, answer, row, column
        for shift in (0, 1):
            alone = task(lows, patches.roll(-shift, 1).flatten(0, 1)).view(len(rows), 2, 2)  # cell, image, answer
            assert torch.allclose(alone.permute(1, 2, 0), tiled[shift, :, :, rows, columns], atol=1e-10)
    assert tiled.std() > 1e-3


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_tiled_equals_every_patch_in_every_cell(objective):
    task = spread(make(objective)).double().eval()
    x = images(3).double()
    low, super_patches = task.low_resolution(x), task.tiling.crop(x, torch.tensor([0, 9, 4]), torch.tensor([5, 0, 2]))
    with torch.no_grad():
        tiled = task(low, super_patches, (0, 1))
        for row in range(5):
            for column in range(5):
                alone = task(low, super_patches[:, :, row : row + 9, column : column + 9], (0, 1))
                assert torch.allclose(alone[..., 0, 0], tiled[..., row, column], atol=1e-12)
    assert tiled.std() > 1e-3


def test_the_low_resolution_image_is_the_mean_of_squares():
    task = make()
    x = images(2)
    low = task.low_resolution(x)
    assert low.shape == (2, 3, 11, 9)
    for i in range(11):
        for j in range(9):
            assert torch.allclose(low[:, :, i, j], x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)))


def test_classification_loss_and_accuracy_against_a_loop():
    task = spread(make()).double().eval()
    x = images(4).double()
    found = task.evaluate((x, torch.zeros(4).long()))
    tops, lefts = task.tiling.fixed(x)
    losses, right = [], {0: [], 1: []}
    for i in range(4):
        for shift, label in ((0, 1), (1, 0)):
            other = (i + shift) % 4
            patch = x[other : other + 1, :, tops[other] : tops[other] + 13, lefts[other] : lefts[other] + 13]
            logits = task(task.low_resolution(x[i : i + 1]), patch)[0]
            for row in range(5):
                for column in range(5):
                    cell = logits[:, row, column]
                    losses.append(cell.logsumexp(0) - cell[label])
                    right[label].append(float(cell.argmax() == label))
    # evaluation is in float32 from the logits on
    assert found["loss"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    mean = {label: sum(values) / len(values) for label, values in right.items()}
    assert found["accuracy_own"].item() == pytest.approx(mean[1])
    assert found["accuracy_other"].item() == pytest.approx(mean[0])
    assert found["accuracy"].item() == pytest.approx((mean[0] + mean[1]) / 2)


def test_regression_loss_and_errors_in_pixels_against_a_loop():
    task = spread(make("regression")).double().eval()
    x = images(4).double()
    found = task.evaluate((x, torch.zeros(4).long()))
    zones = {name: float(value) for name, value in task.summarize(task.metrics.compute()).items()}
    tops, lefts = task.tiling.fixed(x)
    squares, errors, chance, by_zone = [], [], [], {}
    for i in range(4):
        patch = x[i : i + 1, :, tops[i] : tops[i] + 13, lefts[i] : lefts[i] + 13]
        output = task(task.low_resolution(x[i : i + 1]), patch)[0]
        for row in range(5):
            for column in range(5):
                centre_x, centre_y = lefts[i] + column + 4.5, tops[i] + row + 4.5  # pixels from the left, the top
                px, py = (output[0, row, column] + 1) * 9, (output[1, row, column] + 1) * 11
                errors.append(((px - centre_x) ** 2 + (py - centre_y) ** 2).sqrt().item())
                squares += [((px - centre_x) / 9).item() ** 2, ((py - centre_y) / 11).item() ** 2]
                chance.append(((9 - centre_x) ** 2 + (11 - centre_y) ** 2).sqrt().item())
                # patches of 9 pixels: centres are at most 4.5 columns and 6.5 rows away from the middle
                far = max(abs(centre_x - 9) / 4.5, abs(centre_y - 11) / 6.5)
                zone = ("centre", "middle", "edge")[min(int(3 * far + 1e-4), 2)]
                by_zone.setdefault(zone, []).append(errors[-1])
    assert found["loss"].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert found["error_px"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert found["chance_error_px"].item() == pytest.approx(sum(chance) / len(chance), rel=1e-5)
    assert zones.keys() == {f"error_px_{zone}" for zone in by_zone}
    for zone, values in by_zone.items():
        assert zones[f"error_px_{zone}"] == pytest.approx(sum(values) / len(values), rel=1e-5)


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_training_draws_new_places_and_everything_learns(objective):
    task = spread(make(objective)).train()
    first = task.losses(batch())["loss"]
    first.backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    torch.manual_seed(1)
    one = task.losses(batch())["loss"]
    torch.manual_seed(2)
    assert task.losses(batch())["loss"] != one


def coordinates(count, generator):
    """Images whose colour says where a pixel is, with noise, each with an offset of its own in blue."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij")
    blue = torch.rand(count, 1, 1, 1, generator=generator).expand(-1, 1, 24, 24)
    images = torch.cat([x.expand(count, 1, -1, -1), y.expand(count, 1, -1, -1), blue], 1)
    return (images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def test_both_objectives_learn_what_can_be_seen():
    generator = torch.Generator().manual_seed(0)
    for objective in ("regression", "classification"):
        task = make(objective, head_width=32, patch_backbone_kwargs={"width": 0.25}).train()
        optimizer = torch.optim.AdamW(task.parameters(), lr=0.005)
        for _ in range(160):
            optimizer.zero_grad()
            task.losses((coordinates(16, generator), torch.zeros(16).long()))["loss"].backward()
            optimizer.step()
        task.eval()
        with torch.no_grad():
            found = task.evaluate((coordinates(32, generator), torch.zeros(32).long()))
        if objective == "regression":
            assert found["error_px"] < 0.5 * found["chance_error_px"]
        else:
            assert found["accuracy"] > 0.75, found


def test_evaluation_does_not_depend_on_batches_or_random_state():
    task = spread(make("regression")).eval()
    x, y = batch(6)
    whole = task.evaluate((x, y))["error_px"].item()
    parts = [task.evaluate((x[:2], y[:2]))["error_px"], task.evaluate((x[2:], y[2:]))["error_px"]]
    assert whole == pytest.approx((2 * parts[0].item() + 4 * parts[1].item()) / 6, rel=1e-5)


def test_an_embedding_grid_keeps_where_things_are():
    task = make(embedding_grid=3)
    low = images(2, 11, 9)
    grid = task.embed_images(low)
    assert grid.shape == (2, 9 * task.backbone.num_features)
    assert make().embed_images(low).shape == (2, task.backbone.num_features)
    assert task.losses(batch())["loss"].isfinite()


def test_grey_images_leave_nothing_of_the_colour():
    x, y = batch(4)
    swapped = x[:, [2, 0, 1]]
    grey, colourful = spread(make(grey=True)).eval(), spread(make()).eval()
    assert torch.allclose(grey.evaluate((x, y))["loss"], grey.evaluate((swapped, y))["loss"], rtol=1e-4)
    assert not torch.allclose(colourful.evaluate((x, y))["loss"], colourful.evaluate((swapped, y))["loss"], rtol=1e-4)


def test_the_patch_tower_and_the_head_stay_behind():
    task = make()
    assert not any("patch_tower" in name or "head." in name for name in task.backbone.state_dict())
    assert task.patch_tower.num_classes == 0
    assert task.networks() == [task.backbone, task.patch_tower]


def test_predictions_and_pictures():
    for objective, names in (("classification", {"pairs", "heat_maps"}), ("regression", {"pairs", "positions"})):
        task = make(objective).eval()
        with torch.no_grad():
            pictures = task.pictures(batch(3))
            predicted = task.predict(batch(3))
            assert task.predict(batch(1)).keys() == predicted.keys()
        assert pictures.keys() == names
        for picture in pictures.values():
            assert picture.shape[0] == 3
            assert picture.std() > 0.05
        assert all(len(value) == 3 for value in predicted.values())
    assert predicted["centres"].shape == predicted["true_centres"].shape == (3, 2, 5, 5)


@pytest.mark.parametrize(("options", "words"), [
    ({"patch_backbone": "resnet18", "patch_backbone_kwargs": None}, "pads its input"),
    ({"embedding_grid": 0}, "embedding_grid must be at least 1"),
    ({"super_patch": 8}, "smaller than the patch tower's receptive field of 9"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit into images of 12 x 12"):
        make().losses(batch(height=12, width=12))
    with pytest.raises(ValueError, match="averaged in squares of 2"):
        make().losses(batch(height=21))


def test_a_batch_of_one_has_no_negative():
    with pytest.raises(ValueError, match="there is a batch of one"):
        make().losses(batch(1))
    assert make("regression").losses(batch(1))["loss"].isfinite()


def quiet_trainer():
    import lightning.pytorch as pl

    return pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


@pytest.mark.parametrize(("length", "batch_size", "drop_last", "refused"), [
    (17, 8, False, True), (17, 8, True, False), (16, 8, False, False), (8, 1, False, True), (8, 1, True, True),
])  # fmt: skip
def test_a_last_batch_of_one_is_refused_before_the_first_step(length, batch_size, drop_last, refused):
    data = Shapes(size=16, length=length, val_length=0, batch_size=batch_size, drop_last=drop_last)
    trainer = quiet_trainer()
    if refused:
        with pytest.raises(ValueError, match=r"leave a batch of one: set data\.drop_last=true"):
            trainer.fit(make(), datamodule=data)
        assert trainer.global_step == 0
    else:
        trainer.fit(make(), datamodule=data)
        assert trainer.global_step == 2


@pytest.mark.parametrize(("val", "test", "batch_size", "said"), [
    (9, 8, 2, "9 validation images in batches of 2"), (1, 8, 8, "1 validation images"), (0, 5, 2, "5 test images"),
])  # fmt: skip
def test_an_evaluation_batch_of_one_is_refused_before_the_first_step(val, test, batch_size, said):
    data = Shapes(size=16, length=16, val_length=val, test_length=test, batch_size=batch_size)
    trainer = quiet_trainer()
    with pytest.raises(ValueError, match=said):
        trainer.fit(make(), datamodule=data)
    assert trainer.global_step == 0
    trainer = quiet_trainer()
    trainer.fit(make("regression"), datamodule=data)  # needs no negatives
    assert trainer.global_step == 16 // batch_size
