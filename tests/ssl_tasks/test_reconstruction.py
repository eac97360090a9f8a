"""Reconstruction: losses against loops, an encoder that stays as it is, decoders and classifiers that are passed on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baton.layers.njet import njet_layers
from baton.optim import Optimizer
from baton.ssl_tasks import Reconstruction
from baton.supervised import Classification
from baton.task import Task
from tiny import Arrays, fit, same, state, trainer

NIN = {"backbone": "nin", "backbone_kwargs": {"width": 0.1}}


def task(**kwargs):
    torch.manual_seed(0)
    return Reconstruction(**{**NIN, **kwargs})


def batch(count=3, side=17):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, side, side, generator=generator), torch.arange(count) % 3


def naive_relative(output, target):
    ratios = []
    for one, other in zip(output.double(), target.double(), strict=True):
        ratios.append((one - other).square().mean() / (other.square().mean() + 1e-8))
    return sum(ratios) / len(ratios)


def naive_euclidean(output, target):
    total = 0.0
    for one, other in zip(output.double().flatten(), target.double().flatten(), strict=True):
        total = total + (one - other) ** 2
    return total / (2 * len(output))


@pytest.mark.parametrize("autoencoder", ["sae", "swwae"])
@pytest.mark.parametrize("variant", ["first", "all", "layerwise"])
@pytest.mark.parametrize("loss", ["relative", "euclidean"])
def test_the_loss_is_the_weighted_sum_of_what_the_variant_compares(autoencoder, variant, loss):
    weights = [0.5] if variant == "first" else [0.5, 2.0, 3.0]
    model = task(autoencoder=autoencoder, variant=variant, loss=loss, weights=weights, classification_weight=0.7,
                 num_classes=3).eval()  # fmt: skip
    model.configure_model()
    images, labels = batch()
    with torch.no_grad():
        losses = model.losses((images, labels))
        taps = model.row(model.normalize(images))
        outputs = model.decoder.layerwise(taps) if variant == "layerwise" else model.decoder.top_down(taps)
        logits = model.backbone(model.normalize(images))
    naive = naive_relative if loss == "relative" else naive_euclidean
    targets = [images - torch.tensor(model.backbone.pretrained_cfg["mean"]).view(3, 1, 1), taps[0].map, taps[1].map]
    parts = [naive(o, t).item() for o, t in zip(outputs, targets, strict=True)][: len(weights)]
    names = ["loss_image", "loss_map1", "loss_map2"][: len(weights)]
    assert [losses[name].item() for name in names] == pytest.approx(parts, rel=1e-4)
    cross_entropy = F.cross_entropy(logits.double(), labels).item()
    assert losses["loss_class"].item() == pytest.approx(cross_entropy, rel=1e-5)
    expected = np.dot(weights, parts) + 0.7 * cross_entropy
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert losses["error"].item() == pytest.approx((logits.argmax(1) != labels).double().mean().item())


def test_published_weights_and_ones():
    assert task(loss="euclidean", variant="all").weights == [1e-4, 1e-12, 1e-12]
    assert task(loss="euclidean", variant="first").weights == [1e-4]
    assert task(variant="layerwise").weights == [1.0, 1.0, 1.0]


def test_targets_have_a_gradient_only_where_wanted():
    grads = []
    for detach in (True, False):
        model = task(detach_targets=detach, loss="euclidean", weights=[0, 1, 0], variant="layerwise")
        model.losses(batch())["loss"].backward()
        grads.append([p.grad.clone() for p in model.backbone.parameters() if p.grad is not None])
    assert any(not torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("variant", ["first", "all", "layerwise"])
def test_a_frozen_encoder_stays_bit_identical(variant):
    model = task(frozen=True, variant=variant, optimizer=Optimizer("momentum", 0.01, weight_decay=0.1))
    before, decoder = state(model.backbone), state(model.decoder)
    fit(model, Arrays(16, val=8), 2)
    assert same(before, state(model.backbone))
    assert not model.backbone.training
    after = state(model.decoder)
    assert all(not torch.equal(after[name], decoder[name]) for name in decoder)


def test_without_labels_it_pretrains_and_with_them_it_classifies():
    model = task(optimizer=Optimizer("adamw", 0.01))
    rows = fit(model, Arrays(20, val=9, num_classes=0), 8, log_every_n_steps=1)
    losses = rows.column("val/loss")
    assert losses[-1] < losses[0]
    assert rows.column("val/psnr")[-1] > rows.column("val/psnr")[0]
    both = task(classification_weight=1.0, optimizer=Optimizer("adamw", 0.01))
    rows = fit(both, Arrays(20, val=9), 1, log_every_n_steps=1)
    assert {"val/accuracy", "val/error", "val/loss_class", "val/loss_image"} <= set(rows.rows[-1][1])
    with pytest.raises(ValueError, match="Reconstruction needs labelled data"):
        fit(task(classification_weight=1.0), Arrays(20, num_classes=0))


def test_psnr_and_errors_are_those_of_the_whole_split():
    model = task(classification_weight=1.0)
    data = Arrays(8, val=11, batch_size=4)
    trainer().validate(model, datamodule=data, verbose=False)
    images, labels = data.val_set.__getitems__(range(11))
    images = images.float() / 255
    model.eval()
    with torch.no_grad():
        pixels = model(images).clamp(0, 1)
        logits = model.backbone(model.normalize(images))
    error = (pixels - images).double().square().mean()
    assert model.latest["val/psnr"] == pytest.approx(-10 * error.log10().item(), rel=1e-4)
    assert model.latest["val/error"] == pytest.approx((logits.argmax(1) != labels).double().mean().item())
    predicted = model.predict((images, labels))
    torch.testing.assert_close(predicted["mse"], (pixels - images).square().mean((1, 2, 3)))
    assert model.pictures((images, labels))["reconstruction"].shape == (3, 2 * 18 + 2, 8 * 18 + 2)


def test_the_picture_of_layerwise_shows_what_its_first_stage_makes_of_the_first_map():
    model = task(variant="layerwise").eval()
    images, labels = batch()
    with torch.no_grad():
        grid = model.pictures((images, labels))["reconstruction"]
        tap = model.row(model.normalize(images), 1)[0]
        first = model.decoder.stages[0](tap.map, tap) + model.mean
    side = images.shape[-1]
    assert grid.shape[1] == 3 * (side + 2) + 2
    torch.testing.assert_close(grid[:, 2 * side + 6 : -2, 2 : side + 2], first[0].clamp(0, 1))


def test_depth_leaves_the_upper_part_out():
    model = task(depth=1, frozen=True, variant="first").eval()
    assert len(model.decoder.stages) == 1
    images, _ = batch()
    with torch.no_grad():
        expected = model.decoder.layerwise(model.row(model.normalize(images)))[0] + model.mean
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("variant", ["first", "all", "layerwise"])
def test_scales_may_change_the_sides_of_maps_from_step_to_step(variant):
    """Before training, after scales that shrink maps to their least side, and after scales that leave them whole."""
    model = task(backbone="njet_nin", autoencoder="sae", variant=variant, classification_weight=1.0, num_classes=3)
    model.configure_model()
    model.double()
    images, labels = batch(side=25)
    images, sides = images.double(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    for sigma in (1.0, 9.0, 0.01):
        with torch.no_grad():
            for _, layer in njet_layers(model.backbone):
                layer.log2_sigma.fill_(np.log2(sigma))
        sides.append([tap.map.shape[-1] for tap in model.row(model.normalize(images))])
        assert model(images).shape == images.shape
        optimizer.zero_grad()
        losses = model.losses((images, labels))
        losses["loss"].backward()
        assert all(value.isfinite() for value in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert sides == [[21, 18, 15, 15], [5, 4, 4, 4], [25, 25, 25, 25]]


def test_swwae_without_switches_is_sae_and_says_so(recwarn):
    with pytest.warns(UserWarning, match="njet_nin has no max-pooling whose switches swwae could use"):
        swwae = task(backbone="njet_nin").eval()
    recwarn.clear()
    sae = task(backbone="njet_nin", autoencoder="sae").eval()
    task(autoencoder="swwae")
    assert not [warning for warning in recwarn if "switches" in str(warning.message)]
    assert same(state(sae), state(swwae))
    assert torch.equal(sae(batch()[0]), swwae(batch()[0]))


def test_a_network_with_njet_layers_learns_to_reconstruct():
    model = task(backbone="njet_nin", autoencoder="sae", optimizer=Optimizer("adamw", 0.003))
    rows = fit(model, Arrays(20, val=9, num_classes=0), 8, log_every_n_steps=1)
    assert rows.column("train/loss")[-1] < 0.7 * rows.column("train/loss")[0]


# ------------------------------------------------------------------------------------------ what passes on to the next


def checkpoint(model, data, path):
    runner = trainer(1)
    runner.fit(model, datamodule=data, weights_only=True)
    runner.save_checkpoint(path)
    return str(path)


def test_the_four_steps_pass_classifier_and_decoder_on(tmp_path, capsys, monkeypatch):
    for one in (Task, Reconstruction):  # Lightning looks for arguments in frames, where jaxtyping stands
        monkeypatch.setattr(one, "__init__", one.__init__.__wrapped__)
    data, options = Arrays(16, val=8), {"optimizer": Optimizer("adamw", 0.01)}
    classifier = Classification(**NIN, **options)
    first = checkpoint(classifier, data, tmp_path / "1.ckpt")
    layerwise = Reconstruction(init_from=first, keep_classifier=True, frozen=True, variant="layerwise", **options)
    second = checkpoint(layerwise, Arrays(16, val=8), tmp_path / "2.ckpt")
    assert same(state(classifier.backbone), state(layerwise.backbone))
    down = {"init_from": second, "keep_classifier": True, "decoder_from": second}
    top_down = Reconstruction(frozen=True, **down, **options)
    assert same(state(top_down.decoder), state(layerwise.decoder))
    assert "decoder, 18 of 18 tensors" in capsys.readouterr().out
    third = checkpoint(top_down, Arrays(16, val=8), tmp_path / "3.ckpt")
    augmented = Reconstruction(
        init_from=third, keep_classifier=True, decoder_from=third, classification_weight=1.0, **options
    )
    assert same(state(augmented.backbone), state(classifier.backbone))
    checkpoint(augmented, Arrays(16, val=8), tmp_path / "4.ckpt")
    assert not same(state(augmented.backbone), state(classifier.backbone))
    with pytest.raises(ValueError, match=r"trained its decoder with another encoder \(\d+ of \d+ tensors differ"):
        Reconstruction(init_from=str(tmp_path / "4.ckpt"), decoder_from=third, **options)
    for path in (first, second):  # a checkpoint stands alone
        Path(path).unlink()
    alone = Reconstruction.load_from_checkpoint(third, map_location="cpu", weights_only=True)
    assert same(state(alone), state(top_down))


def test_a_kept_classifier_must_fit(tmp_path):
    path = checkpoint(Classification(**NIN), Arrays(16, val=8), tmp_path / "c.ckpt")
    kept = Classification(init_from=path, keep_classifier=True)
    assert kept.backbone.num_classes == 3
    fresh = Classification(init_from=path)
    assert fresh.backbone.num_classes == 0
    with pytest.raises(ValueError, match="kept has 3 classes, but 5 are needed"):
        fit(kept, Arrays(16, num_classes=5))
    unlabelled = checkpoint(task(), Arrays(16, val=8), tmp_path / "r.ckpt")
    with pytest.raises(ValueError, match=r"has no classifier that model\.keep_classifier could keep"):
        Classification(init_from=unlabelled, keep_classifier=True)
    with pytest.raises(ValueError, match=r"model\.keep_classifier keeps that of model\.init_from: name one"):
        Classification(keep_classifier=True, **NIN)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ResNet has branches"):
        Reconstruction(backbone="test_resnet")
    with pytest.raises(ValueError, match=r"classification_weight must be 0"):
        task(frozen=True, classification_weight=1.0)
    with pytest.raises(ValueError, match=r"set model\.frozen"):
        task(depth=1)
    with pytest.raises(ValueError, match=r"between 1 and 3, the encoder's poolings, but got 7"):
        task(depth=7, frozen=True)
    with pytest.raises(ValueError, match=r"model\.weights must be 3 numbers of at least 0.*but got \[1\.0\]"):
        task(weights=[1.0])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        task(decoder_from=str(tmp_path))
    path = checkpoint(Classification(**NIN), Arrays(16, val=8), tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"18 tensors of the decoder in .* do not fit this one"):
        task(decoder_from=path)
