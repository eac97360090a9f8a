"""Split-brain: losses against loops, halves that share nothing, grey images, baselines, what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab

from baton.ssl_tasks import SplitBrain
from baton.ssl_tasks.color_prior import ColorPrior
from tiny import Arrays, fit

PAIR = {"backbone": "split_brain", "backbone_kwargs": {"base": "wide_resnet", "base_kwargs": {"depth": 10, "width": 1}}}


def task(space="lab_rescaled", **kwargs):
    torch.manual_seed(0)
    return SplitBrain(space, **{"bins": (7, 3), "size": 5, **PAIR, **kwargs})


def images(count=3, side=17):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("space", ["rgb", "lab", "lab_rescaled", "lab_gamut"])
def test_losses_equal_a_loop_over_cells_with_gradients(space):
    one, two = task(space).double().eval(), task(space).double().eval()
    batch = images(), torch.zeros(3)
    losses = one.losses(batch)
    first, rest = two.quantizer(batch[0])
    to_first, to_rest = two(batch[0])
    assert to_first.shape == (3, 7, 5, 5)
    assert to_rest.shape == (3, two.quantizer.num_classes[1], 5, 5)
    expected = {"first": 0.0, "rest": 0.0}
    right = {"first": 0, "rest": 0}
    weights, classes = two.quantizer.soft(two.quantizer.channels(batch[0])) if space == "lab_gamut" else (None, None)
    for b in range(3):
        for y in range(5):
            for x in range(5):
                for name, logits, target in (("first", to_first, first), ("rest", to_rest, rest)):
                    log = F.log_softmax(logits[b, :, y, x], 0)
                    right[name] += int(log.argmax() == target[b, y, x])
                    if name == "rest" and weights is not None:
                        expected[name] -= (weights[b, :, y, x] * log[classes[b, :, y, x]]).sum() / 75
                    else:
                        expected[name] -= log[target[b, y, x]] / 75
    for name in ("first", "rest"):
        # the task computes its losses in float32, as under autocast
        torch.testing.assert_close(losses[f"loss_{name}"].double(), expected[name], atol=1e-5, rtol=1e-5)
        assert losses[f"accuracy_{name}"].item() == pytest.approx(right[name] / 75)
    torch.testing.assert_close(losses["loss"].double(), expected["first"] + expected["rest"], atol=1e-5, rtol=1e-5)
    losses["loss"].backward()
    (expected["first"] + expected["rest"]).backward()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)


def test_gradients_of_one_half_never_touch_the_other():
    for own, other, loss, predictor in (("first", "rest", "loss_rest", 0), ("rest", "first", "loss_first", 1)):
        model = task()
        model.losses((images().float(), torch.zeros(3)))[loss].backward()
        backbone = model.backbone
        assert any(p.grad is not None and p.grad.any() for p in getattr(backbone, own).parameters())
        assert not any(p.grad is not None and p.grad.any() for p in getattr(backbone, other).parameters())
        assert model.predictors[predictor].weight.grad.any()
        idle = model.predictors[1 - predictor].weight.grad
        assert idle is None or not idle.any()


def test_networks_that_predict_cells_need_no_predictor():
    kwargs = {"base": "simplenet", "base_kwargs": {"padded": True, "width": 0.2}}
    model = task("lab", backbone_kwargs=kwargs)
    assert model.hparams["backbone_kwargs"] == {"space": "lab", "out_chans": [9, 7], **kwargs}
    assert all(isinstance(p, torch.nn.Identity) for p in model.predictors)
    assert [logits.shape[1] for logits in model(images(2, 32).float())] == [7, 9]
    with pytest.raises(ValueError, match=r"predicts 4 and 4 classes, but model\.space and model\.bins ask for 9 and 7"):
        task("lab", backbone_kwargs={**kwargs, "out_chans": [4, 4]})


def test_grey_images_contribute_nothing_and_are_counted():
    model = task().eval()
    colored = images(2).float()
    grey = torch.full((2, 3, 17, 17), 0.5) + 0.3 * torch.rand(2, 1, 17, 17)
    alone = model.losses((colored, torch.zeros(2)))
    mixed = model.losses((torch.cat([colored, grey]), torch.zeros(4)))
    torch.testing.assert_close(mixed["loss"], alone["loss"] / 2)
    assert mixed["grey"] == 0.5
    assert model.losses((grey, torch.zeros(2)))["loss"] == 0


class Grey(Arrays):
    """Every image, or all but one, is grey."""

    keep = 0

    def sources(self):
        train, val, test = super().sources()
        train.images[self.keep :] = train.images[self.keep :, :1]
        return train, val, test


def test_a_set_of_grey_images_is_refused_and_a_mixed_one_counted(capsys):
    with pytest.raises(ValueError, match="All of 20 training images looked at are grey"):
        fit(task(), Grey())
    mixed = Grey()
    mixed.keep = 15
    rows = fit(task(), mixed, log_every_n_steps=1)
    assert "5 of 20 training images looked at are grey" in capsys.readouterr().out
    assert sum(rows.column("train/grey")[:2]) > 0


@pytest.mark.parametrize("space", ["rgb", "lab", "lab_rescaled", "lab_gamut"])
def test_every_space_trains_and_measures_colours_against_the_mean(space):
    model = task(space)
    rows = fit(model, Arrays(20, val=9), epochs=3, log_every_n_steps=1)
    losses = rows.column("train/loss")
    assert losses[-1] < losses[0]
    assert rows.column("val/delta_e_mean")[0] == pytest.approx(rows.column("val/delta_e_mean")[-1])
    assert set(rows.rows[-1][1]) >= {"val/loss", "val/accuracy_first", "val/accuracy_rest", "val/delta_e", "val/grey"}


def test_a_perfect_prediction_has_the_error_of_the_bins_alone(monkeypatch):
    model = task("lab", bins=(100, 50))
    picture = images(2).float()
    targets = model.quantizer(picture)
    hot = [F.one_hot(c, n).movedim(-1, 1) * 1e4 for c, n in zip(targets, model.quantizer.num_classes, strict=True)]
    monkeypatch.setattr(SplitBrain, "forward", lambda self, images: tuple(h.float() for h in hot))
    predicted = model.predict((picture, torch.zeros(2)))
    assert predicted["delta_e"].max() < 3  # half a bin's diagonal
    expected = model.quantizer.to_rgb(model.quantizer.channels(picture))
    assert (predicted["colors"] - expected).abs().max() < 0.06


def test_pictures_have_five_rows():
    picture = task().eval().pictures((images(4).float(), torch.zeros(4)))["colors"]
    assert picture.shape == (3, 5 * 19 + 2, 4 * 19 + 2)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="SplitBrain needs the backbone split_brain"):
        SplitBrain(backbone="wrn_16_1")
    with pytest.raises(ValueError, match="The targets are in lab, but the backbone sees rgb"):
        task("lab", backbone_kwargs={"base": "test_resnet", "space": "rgb"})
    with pytest.raises(ValueError, match=r"model\.rebalance must be above 0 and at most 1"):
        task(rebalance=0.0)
    with pytest.raises(ValueError, match=r"model\.temperature must be above 0, got 0"):
        task(temperature=0.0)
    with pytest.raises(ValueError, match="must be two numbers"):
        task(bins=(1, 2, 3))


@pytest.mark.parametrize("space", ["rgb", "lab", "lab_rescaled", "lab_gamut"])
def test_who_sees_nothing_answers_with_the_mean_or_the_frequencies_of_the_training_images(space):
    model, data = task(space), Arrays(20, val=9)
    rows = fit(model, data)
    quantizer, prior = model.quantizer, model.prior.double()

    def images_of(dataset):
        return data.to_float(dataset.images.expand(-1, 3, -1, -1)).double()

    train = ColorPrior(quantizer).double()
    train.learn(quantizer, images_of(data.train_set).split(7))
    for name, value in train.named_buffers():
        torch.testing.assert_close(getattr(prior, name), value, atol=1e-5, rtol=1e-4)
    val = images_of(data.val_set)
    small = quantizer.channels(val)
    low, high = (bound[:, :, None, None] for bound in quantizer.bounds(small))
    mean = (low + prior.mean.view(1, 3, 1, 1) * (high - low)).expand_as(small)
    frequencies = [p.view(1, -1, 1, 1).expand(9, -1, 5, 5) for p in (prior.first, prior.rest)]
    frequent = quantizer.decode(*frequencies, small)

    def error(guess, shown):
        """The distance in Lab between the channels shown as they are and the others guessed."""
        guess = torch.stack([(small if i in shown else guess)[:, i] for i in range(3)], -1).numpy()
        truth = small.movedim(1, -1).numpy()
        if space == "rgb":
            guess, truth = rgb2lab(guess.clip(0, 1)), rgb2lab(truth.clip(0, 1))
        return np.linalg.norm(guess - truth, axis=-1).mean()

    first, rest = quantizer(val)
    loss = -prior.first.log()[first].mean()
    if space == "lab_gamut":
        weights, classes = quantizer.soft(small)
        loss -= (weights * prior.rest.log()[classes]).sum(1).mean()
    else:
        loss -= prior.rest.log()[rest].mean()
    expected = {
        "delta_e_mean": error(mean, (0,)), "delta_e_prior": error(frequent, (0,)),
        "delta_e_first_mean": error(mean, (1, 2)), "loss_prior": loss.item(),
    }  # fmt: skip
    for name, value in expected.items():
        assert rows.column(f"val/{name}")[0] == pytest.approx(value, rel=1e-3), name


def test_rare_colours_weigh_more_where_wanted():
    plain, balanced = task("lab_gamut").eval(), task("lab_gamut", rebalance=0.5).eval()
    batch = images().float(), torch.zeros(3)
    for model in (plain, balanced):
        model.prior.rest.copy_(torch.rand(261, generator=torch.Generator().manual_seed(2)).square())
        model.prior.rest /= model.prior.rest.sum()
    _, rest = plain.quantizer(batch[0])
    soft, classes = plain.quantizer.soft(plain.quantizer.channels(batch[0]))
    log = plain(batch[0])[1].log_softmax(1)
    expected = 0.0
    for b in range(3):
        for y in range(5):
            for x in range(5):
                frequency = plain.prior.rest[rest[b, y, x]]
                cell = -sum(w * log[b, c, y, x] for w, c in zip(soft[b, :, y, x], classes[b, :, y, x], strict=True))
                expected += cell / (0.5 * frequency + 0.5 / 261) / 75
    mean = sum(p / (0.5 * p + 0.5 / 261) for p in plain.prior.rest)
    torch.testing.assert_close(balanced.losses(batch)["loss_rest"], expected / mean, atol=1e-5, rtol=1e-4)
    even = task("lab_gamut", rebalance=1.0).eval()
    for name in ("loss_first", "loss_rest"):
        torch.testing.assert_close(even.losses(batch)[name], plain.losses(batch)[name])


def test_temperature_sharpens_colours_and_nothing_else():
    plain, sharp = task("lab").eval(), task("lab", temperature=1e-3).eval()
    batch = images().float(), torch.zeros(3)
    torch.testing.assert_close(sharp.losses(batch), plain.losses(batch))
    small = plain.quantizer.channels(batch[0])
    first, rest = (logits.argmax(1) for logits in plain(batch[0]))
    expected = plain.quantizer.to_rgb(torch.cat([small[:, :1], plain.quantizer.decode(first, rest, small)[:, 1:]], 1))
    torch.testing.assert_close(sharp.predict(batch)["colors"], expected, atol=1e-3, rtol=1e-3)
