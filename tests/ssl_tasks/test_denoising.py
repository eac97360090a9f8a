"""Denoising claims: noise that is what it says, naive losses, and gradients for the whole backbone."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from baton.ssl_tasks import Denoising
from baton.ssl_tasks.denoising import Decoder, TransposedDecoder, corrupt
from tiny import WRN, Arrays, fit, same, state, trainer

BACKBONES = {
    "wide_resnet": (WRN["backbone_kwargs"], (33, 35)),
    "resnet18": ({}, (33, 35)),
    "test_vit": ({"img_size": [32, 48]}, (32, 48)),
    "test_convnext": ({}, (33, 35)),
    "dae_encoder": ({}, (33, 35)),
    "njet_nin": ({"width": 0.1}, (33, 35)),
    "njet_allcnn": ({"width": 0.1}, (33, 35)),
    "njet_resnet32": ({"depth": 8, "order": 2}, (33, 35)),
    "njet_efficientnet_b0": ({}, (33, 35)),
    "converted": ({"base": "test_resnet"}, (33, 35)),
}
#: What acts after the last map: ConvNeXt's norm, behind its pooling, and EfficientNet's last convolution.
UNUSED = {
    "test_convnext": {"head.norm.weight", "head.norm.bias"},
    "njet_efficientnet_b0": {"conv_head.weight", "bn2.weight", "bn2.bias"},
}
POSTER = {
    "backbone": "dae_encoder", "noise": "salt_and_pepper", "amount": 0.05, "loss": "bce", "decoder": "transposed",
}  # fmt: skip


def images(count=64, size=(33, 35)):
    """Far from both 0 and 1, so that corruption shows."""
    return 0.25 + 0.5 * torch.rand(count, 3, *size)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("patch", [1, 2, 4, 5, 50])
@pytest.mark.parametrize("amount", [0.2, 0.5])
def test_masking_clears_whole_squares_in_all_channels(patch, amount):
    torch.manual_seed(patch)
    clean = images()
    noisy = corrupt(clean, "masking", amount, patch)
    masked = noisy == 0
    assert torch.equal(noisy[~masked], clean[~masked])
    assert torch.equal(masked, masked[:, :1].expand_as(masked))
    squares = []
    for row in range(0, 33, patch):
        for column in range(0, 35, patch):
            square = masked[:, 0, row : row + patch, column : column + patch].flatten(1)
            assert torch.equal(square.all(1), square.any(1))
            squares.append(square[:, 0])
    fraction = torch.stack(squares).double().mean().item()
    draws = len(squares) * len(clean)
    assert abs(fraction - amount) < 5 * math.sqrt(amount * (1 - amount) / draws)
    assert not torch.equal(masked[0], masked[1]) or len(squares) == 1


def test_salt_and_pepper_hits_single_elements():
    torch.manual_seed(0)
    clean, amount = images(), 0.3
    noisy = corrupt(clean, "salt_and_pepper", amount)
    pepper, salt = noisy == 0, noisy == 1
    untouched = ~(pepper | salt)
    assert torch.equal(noisy[untouched], clean[untouched])
    bound = 5 * math.sqrt(0.15 * 0.85 / clean.numel())
    assert abs(pepper.double().mean() - 0.15) < bound
    assert abs(salt.double().mean() - 0.15) < bound
    hit = (~untouched).double()
    both = (hit[:, 0] * hit[:, 1]).mean().item()
    assert abs(both - amount**2) < 5 * math.sqrt(0.09 * 0.91 / hit[:, 0].numel())  # channels are independent
    assert abs((hit[0] * hit[1]).mean() - amount**2) < 5 * math.sqrt(0.09 * 0.91 / hit[0].numel())  # so are samples


def test_gaussian_noise_is_not_clipped():
    torch.manual_seed(0)
    clean = images()
    noise = (corrupt(clean, "gaussian", 0.5) - clean).double()
    assert abs(noise.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean()) < 5 * 0.5 / math.sqrt(noise.numel())
    fourth = (noise**4).mean() / noise.var() ** 2
    assert abs(fourth - 3) < 5 * math.sqrt(24 / noise.numel())
    noisy = clean + noise
    assert noisy.min() < 0
    assert noisy.max() > 1


@pytest.mark.parametrize("noise", ["masking", "salt_and_pepper", "gaussian"])
def test_no_amount_is_no_noise_and_shared_noise_knows_no_batches(noise):
    clean = images(7)
    assert torch.equal(corrupt(clean, noise, 0.0, 4), clean)
    torch.manual_seed(3)
    whole = corrupt(clean, noise, 0.4, 4, shared=True)
    parts = []
    for start, end in ((0, 1), (1, 5), (5, 7)):
        torch.manual_seed(3)
        parts.append(corrupt(clean[start:end], noise, 0.4, 4, shared=True))
    assert torch.equal(whole, torch.cat(parts))
    torch.manual_seed(3)
    assert not torch.equal(corrupt(clean, noise, 0.4, 4), whole)
    assert not torch.equal(whole, clean)


def test_full_masking_and_full_salt_and_pepper():
    assert torch.equal(corrupt(images(2), "masking", 1.0, 4), torch.zeros(2, 3, 33, 35))
    assert set(corrupt(images(2), "salt_and_pepper", 1.0).unique().tolist()) == {0.0, 1.0}


# -------------------------------------------------------------------------------------------------------------- losses


def with_output(task, output):
    task.reconstruct = lambda corrupted: output[: len(corrupted)]
    return task


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_losses_and_psnr_are_the_naive_ones(loss):
    torch.manual_seed(0)
    clean, output = images(5, (7, 9)), torch.randn(5, 3, 7, 9)
    task = with_output(Denoising(loss=loss, **WRN), output)
    x, y = np.asarray(clean, np.float64), np.asarray(output, np.float64)
    if loss == "bce":
        pixels = 1 / (1 + np.exp(-y))
        naive = -(x * np.log(pixels) + (1 - x) * np.log(1 - pixels)).mean()
    else:
        pixels = np.clip(y, 0, 1)
        naive = ((x - y) ** 2).mean()
    batch = (clean, torch.zeros(5, dtype=torch.long))
    assert task.losses(batch)["loss"].item() == pytest.approx(naive, rel=1e-5)
    assert task.evaluate(batch)["loss"].item() == pytest.approx(naive, rel=1e-5)
    psnr = 10 * math.log10(1 / ((x - pixels) ** 2).mean())
    assert task.metrics.compute()["psnr"].item() == pytest.approx(psnr, rel=1e-5)
    predicted = task.predict(batch)
    assert np.allclose(predicted["mse"], ((x - pixels) ** 2).mean((1, 2, 3)), rtol=1e-5)
    assert np.allclose(predicted["reconstruction"], pixels, atol=1e-6)


def test_the_network_sees_the_corrupted_image_and_the_loss_the_clean_one():
    task, seen = Denoising(noise="masking", amount=1.0, loss="mse", **WRN), []
    task.reconstruct = lambda corrupted: seen.append(corrupted) or torch.zeros_like(corrupted)
    clean = images(3, (8, 8))
    assert task.losses((clean, torch.zeros(3, dtype=torch.long)))["loss"].item() == pytest.approx(
        clean.square().mean().item(), rel=1e-5
    )
    assert not seen[0].any()


def test_evaluation_of_a_split_equals_one_batch_of_it_and_repeats():
    data = Arrays(8, val=11, batch_size=4)
    task = Denoising(**WRN)
    runner = trainer()
    runner.validate(task, datamodule=data, verbose=False)
    first = dict(task.latest)
    torch.manual_seed(99)
    runner.validate(task, datamodule=data, verbose=False)
    assert task.latest == first
    clean = data.val_set.__getitems__(range(11))[0].float() / 255
    task.eval()
    with torch.no_grad():
        noisy = task._corrupt_fixed(clean)
        pixels = task.reconstruct(noisy).sigmoid().double()
        x = clean.double()
        loss = -(x * pixels.log() + (1 - x) * (1 - pixels).log()).mean().item()
        psnr = -10 * math.log10((x - pixels).square().mean().item())
    assert first == {"val/loss": pytest.approx(loss, rel=1e-5), "val/psnr": pytest.approx(psnr, rel=1e-5)}


# ------------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("reduction", [1, 2, 4, 8, 14, 16, 32])
def test_the_decoder_gives_any_size(reduction):
    decoder = Decoder(5, reduction, 32)
    for height, width in ((33, 35), (64, 32)):
        grid = torch.randn(2, 5, -(-height // reduction), -(-width // reduction))
        assert decoder(grid, (height, width)).shape == (2, 3, height, width)
    doublings = math.ceil(math.log2(reduction)) if reduction > 1 else 0
    assert len(decoder.convs) == doublings + 1
    assert [conv.out_channels for conv in decoder.convs] == [max(32 // 2**level, 16) for level in range(doublings + 1)]


def test_the_decoder_is_convolutions_between_doublings():
    torch.manual_seed(0)
    decoder = Decoder(5, 4, 32)
    features = torch.randn(2, 5, 3, 4)
    x = decoder.convs[0](features).clamp_min(0)
    for conv in decoder.convs[1:]:
        x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)).clamp_min(0)
    assert torch.allclose(decoder(features, (12, 16)), decoder.to_image(x))


@pytest.mark.parametrize(
    ("grid", "doublings"), [((3, 4), 2), ((9, 8), 1), ((12, 7), 2), ((13, 15), 1), ((13, 16), 0), ((25, 31), 0)]
)
def test_the_decoder_does_not_double_a_map_that_is_as_large_as_the_image(grid, doublings):
    """Larger maps than the reduction promises come of scales that became smaller."""
    torch.manual_seed(0)
    decoder, size = Decoder(5, 4, 32).double(), (12, 16)
    features = torch.randn(2, 5, *grid, dtype=torch.float64)
    x = decoder.convs[0](features).clamp_min(0)
    for number, conv in enumerate(decoder.convs[1:]):
        if number < doublings:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(x).clamp_min(0)
    if x.shape[2:] != size:
        x = F.interpolate(x, size, mode="bilinear")
    torch.testing.assert_close(decoder(features, size), decoder.to_image(x))


def naive_transposed(x, weight, bias):
    """4 x 4, stride 2, padding 1: each cell adds its weighted kernel at twice its place; the border goes."""
    batch, _, height, width = x.shape
    out = x.new_zeros(batch, weight.shape[1], 2 * height + 2, 2 * width + 2)
    for row in range(height):
        for column in range(width):
            stamp = torch.einsum("bi,iokl->bokl", x[:, :, row, column], weight)
            out[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += stamp
    return out[:, :, 1:-1, 1:-1] + bias.view(-1, 1, 1)


@pytest.mark.parametrize(("reduction", "levels"), [(2, 1), (4, 2), (8, 3), (14, 4), (16, 4), (32, 5)])
def test_the_transposed_decoder_is_naive_transposed_convolutions(reduction, levels):
    torch.manual_seed(0)
    decoder = TransposedDecoder(40, reduction).double()
    features = torch.randn(2, 40, 2, 3, dtype=torch.float64)
    copies = [p.detach().clone().requires_grad_() for p in decoder.parameters()]
    x, pairs = features, list(zip(copies[::2], copies[1::2], strict=True))
    for number, (weight, bias) in enumerate(pairs, start=1):
        x = naive_transposed(x, weight, bias)
        if number < len(pairs):  # none after the last: the sigmoid is the loss's
            x = x * (x > 0)
    assert len(pairs) == levels
    ours = decoder(features, (2 * 2**levels, 3 * 2**levels))
    torch.testing.assert_close(ours, x)
    assert ours.min() < 0
    ours.square().sum().backward()
    x.square().sum().backward()
    for parameter, copied in zip(decoder.parameters(), copies, strict=True):
        assert copied.grad.any()
        torch.testing.assert_close(parameter.grad, copied.grad)


def test_the_transposed_decoder_mirrors_the_posters_encoder():
    decoder = Denoising(**POSTER).decoder
    assert [(conv.in_channels, conv.out_channels) for conv in decoder.convs] == [(96, 48), (48, 24), (24, 12), (12, 3)]
    by_hand = (16 * 96 * 48 + 48) + (16 * 48 * 24 + 24) + (16 * 24 * 12 + 12) + (16 * 12 * 3 + 3)
    assert sum(p.numel() for p in decoder.parameters()) == by_hand == 97_431
    assert [conv.out_channels for conv in TransposedDecoder(8, 32).convs] == [4, 3, 3, 3, 3]  # never to nothing
    for conv in decoder.convs:  # PyTorch's draw, whose fan-in counts the output channels of a transposed convolution
        bound = 1 / math.sqrt(conv.out_channels * 16)
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert conv.bias.any()


@pytest.mark.parametrize("reduction", [2, 4, 8, 14, 16, 32])
def test_the_transposed_decoder_gives_any_size(reduction):
    """Interpolated, not cropped; exactly what it computes where the reduction divides the image."""
    torch.manual_seed(0)
    decoder = TransposedDecoder(5, reduction)
    doubled = 2 ** len(decoder.convs)
    for height, width in ((33, 35), (64, 32), (67, 96)):
        for grid in ((-(-height // reduction), -(-width // reduction)), (height // reduction, width // reduction)):
            features = torch.randn(2, 5, *grid)
            natural = decoder(features, (grid[0] * doubled, grid[1] * doubled))
            image = decoder(features, (height, width))
            assert image.shape == (2, 3, height, width)
            scaled = F.interpolate(natural, (height, width), mode="bilinear")
            assert torch.equal(image, natural if natural.shape == image.shape else scaled)


def test_a_fixed_seed_gives_what_it_gave_before_there_was_a_choice():
    """`resize` of width 64 is the default, and draws its weights in the same order."""
    states = []
    for options in ({}, {"decoder": "resize"}, {"decoder_width": 64}):
        torch.manual_seed(0)
        states.append(state(Denoising(**options, **WRN)))
    torch.manual_seed(0)
    first = timm.create_model("wide_resnet", depth=10, width=1, num_classes=0)
    decoder = Decoder(64, 4, 64)
    expected = {
        **{f"backbone.{n}": v for n, v in state(first).items()},
        **{f"decoder.{n}": v for n, v in state(decoder).items()},
    }
    assert all(same(expected, one) for one in states)


@pytest.mark.parametrize("decoder", ["resize", "transposed"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_of_the_backbone_gets_a_gradient(name, decoder):
    torch.manual_seed(0)
    kwargs, size = BACKBONES[name]
    task = Denoising(backbone=name, backbone_kwargs=kwargs, decoder=decoder)
    with torch.no_grad():
        for parameter in task.parameters():  # timm starts the last norm of a residual block at zero
            parameter += 0.1 * torch.randn_like(parameter)
    clean = images(3, size)
    assert task.reconstruct(clean).shape == clean.shape
    task.losses((clean, torch.zeros(3, dtype=torch.long)))["loss"].backward()
    without = {n for n, p in task.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"backbone.{parameter}" for parameter in UNUSED.get(name, ())}


def test_training_lowers_the_loss():
    task = Denoising(loss="mse", amount=0.2, **WRN)
    rows = fit(task, Arrays(16, val=8), 8)
    assert rows.column("val/loss")[-1] < rows.column("val/loss")[0]


def test_the_posters_autoencoder_learns():
    """Images of one colour each: what it makes of noise is much nearer to them than the best single colour is."""
    torch.manual_seed(0)
    task = Denoising(**POSTER)
    clean = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    batch = (clean, torch.zeros(16, dtype=torch.long))
    optimizer = torch.optim.Adam(task.parameters(), 0.005)
    for _ in range(150):
        optimizer.zero_grad()
        task.losses(batch)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        cleaned = task.predict(batch)["mse"].mean()
    assert cleaned < 0.5 * clean.var((0, 2, 3)).mean()


def test_pictures_show_image_input_and_output():
    task = Denoising(**WRN).eval()
    before = state(task)
    for count, shown in ((3, 3), (20, 8)):
        batch = (images(count, (10, 12)), torch.zeros(count))
        with torch.no_grad():
            picture = task.pictures(batch)["reconstruction"]
        assert picture.shape == (3, 3 * (10 + 2) + 2, shown * (12 + 2) + 2)
        assert picture.min() >= 0
        assert picture.max() <= 1
        assert torch.allclose(picture[:, 2:12, 2:14], batch[0][0])
        assert torch.equal(picture[:, 14:24, 2:14], task._corrupt_fixed(batch[0][:8])[0])
    assert same(before, state(task))


def test_errors():
    for options, message in (
        ({"amount": 1.5}, "amount of masking noise must lie between 0 and 1, got 1.5"),
        ({"amount": -0.1, "noise": "gaussian"}, "amount of gaussian noise must"),
        ({"patch": 0}, "patch must be at least one pixel, got 0"),
        (
            {"decoder": "transposed", "decoder_width": 64},
            "model.decoder_width=64 belongs to model.decoder=resize; a transposed decoder's widths follow",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Denoising(**options, **WRN)
    with pytest.raises(ValueError, match=r"decoder=transposed needs a backbone whose map is smaller .*decoder=resize"):
        TransposedDecoder(5, 1)
    Denoising(amount=1.5, noise="gaussian", **WRN)


def test_a_backbone_without_a_map_is_an_error(monkeypatch):
    monkeypatch.setattr(Denoising, "_create_backbone", lambda self, *args: _Flat())
    with pytest.raises(ValueError, match="needs a backbone with a spatial map"):
        Denoising(backbone="flat")


class _Flat(nn.Module):
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
