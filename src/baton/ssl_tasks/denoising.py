"""Denoising autoencoder: corrupt the image, reconstruct it, keep the encoder."""

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio
from torchvision.utils import make_grid

from baton.data.images import Batch
from baton.random_state import fixed_randomness
from baton.task import Task

Noise = Literal["masking", "salt_and_pepper", "gaussian"]


def corrupt(
    images: Float[Tensor, "b c h w"], noise: Noise, amount: float, patch: int = 1, *, shared: bool = False
) -> Float[Tensor, "b c h w"]:
    """Corrupt images in [0, 1] with a random draw per sample.

    Args:
        images: (B, C, H, W) in [0, 1].
        noise: `masking` sets squares of `patch` pixels to 0 in all channels (Vincent et al. 2010, section 3.3, who
            mask single elements); `salt_and_pepper` sets `amount / 2` of the elements to 0 and as many to 1, channels
            independently; `gaussian` adds noise of standard deviation `amount` without clipping.
        amount: fraction of what is corrupted, or the standard deviation.
        patch: side of a masked square, in pixels.
        shared: one draw for the whole batch, so that the result does not depend on how samples are batched.
    """
    batch = 1 if shared else len(images)
    channels, height, width = images.shape[1:]
    if noise == "gaussian":
        return images + amount * torch.randn(batch, channels, height, width, device=images.device)
    if noise == "salt_and_pepper":
        draw = torch.rand(batch, channels, height, width, device=images.device)
        return torch.where(draw < amount / 2, 0.0, torch.where(draw < amount, 1.0, images))
    rows, columns = -(-height // patch), -(-width // patch)
    kept = (torch.rand(batch, 1, rows, columns, device=images.device) >= amount).to(images.dtype)
    kept = kept.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :height, :width]
    return images * kept


class Decoder(nn.Module):
    """From a backbone's last map, of any size, to an image of any size: convolutions between doublings, widths halving.

    There are as many doublings as it takes to undo `reduction`. A map that turns out larger, as learned scales may make
    it from one step to the next, is not doubled any more once it is as large as the image; what the doublings end at is
    interpolated bilinearly to the image.

    Args:
        in_channels: channels of the map.
        reduction: how much smaller than the image the map is.
        width: channels after the first convolution.
    """

    def __init__(self, in_channels: int, reduction: int, width: int) -> None:
        super().__init__()
        doublings = max(reduction - 1, 0).bit_length()
        widths = [max(width >> level, 16) for level in range(doublings + 1)]
        channels = [in_channels, *widths]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(channels))
        self.to_image = nn.Conv2d(channels[-1], 3, 3, padding=1)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, features: Float[Tensor, "b f gh gw"], size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
        """Decode a map into an image of the given height and width; the output is unbounded."""
        for level, conv in enumerate(self.convs):
            if level and (features.shape[2] < size[0] or features.shape[3] < size[1]):
                features = F.interpolate(features, scale_factor=2.0, mode="nearest")
            features = F.relu(conv(features))
        if features.shape[2:] != size:
            features = F.interpolate(features, size, mode="bilinear", antialias=False)
        return self.to_image(features)


class TransposedDecoder(nn.Module):
    """The mirror of a convolutional encoder: transposed convolutions that double the map, widths halving, to an image.

    Of 4 x 4, stride 2 and padding 1, a ReLU between them and PyTorch's initialisation, as in the split-brain poster:
    its map of 96 channels goes through 48, 24 and 12 to 3.

    Args:
        in_channels: channels of the map.
        reduction: how much smaller than the image the map is; as many doublings follow as it takes to undo it.

    Raises:
        ValueError: if the map is as large as the image.
    """

    def __init__(self, in_channels: int, reduction: int) -> None:
        super().__init__()
        doublings = max(reduction - 1, 0).bit_length()
        if doublings == 0:
            raise ValueError(
                "model.decoder=transposed needs a backbone whose map is smaller than the image, and this one's is not; "
                "use model.decoder=resize."
            )
        # A narrow map over many doublings would halve to nothing; what becomes three colours keeps three channels.
        widths = [max(in_channels >> level, 3) for level in range(1, doublings)]
        channels = [in_channels, *widths, 3]
        self.convs = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in pairwise(channels))

    def forward(self, features: Float[Tensor, "b f gh gw"], size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
        """Decode a map into an image of the given height and width; the output is unbounded.

        Where the doublings end at another size (sides that the reduction does not divide), the output is interpolated
        bilinearly to the image, not cropped: an encoder that rounds down leaves fewer pixels than the image has.
        """
        for level, conv in enumerate(self.convs):
            features = conv(F.relu(features) if level else features)
        if features.shape[2:] != size:
            features = F.interpolate(features, size, mode="bilinear", antialias=False)
        return features


class Denoising(Task):
    """Reconstruct clean images from corrupted ones; the encoder is the backbone, the decoder is thrown away.

    Source: Vincent et al., "Stacked denoising autoencoders" (JMLR 2010). The baseline of the poster "Split-Brain
    Autoencoders" (Iyengar, Casabuena, Budhkar) and its public code is `dae_encoder` with a `transposed` decoder,
    `salt_and_pepper` noise of 0.05 and `bce` (configs/ssl_tasks/denoising_poster.yaml).

    Args:
        noise: `masking`, `salt_and_pepper` or `gaussian`, see `corrupt`.
        amount: fraction of corrupted elements, or the standard deviation of the Gaussian.
        patch: side of a masked square, in pixels.
        loss: `bce` (a sigmoid output, cross-entropy with the pixel values) or `mse` (a linear output).
        decoder: `resize` (convolutions between nearest-neighbour doublings) or `transposed` (the poster's transposed
            convolutions, see `TransposedDecoder`).
        decoder_width: channels of the first convolution of `resize`, 64 unless given; they halve with every doubling of
            the map. `transposed` takes none: its widths are the halves of the backbone's last map's.
        kwargs: see `Task`. Any backbone with a spatial map will do. Where learned scales choose the map's side, the
            decoder doubles as often as undoes that of the backbone's scales before training, and interpolates the rest.
    """

    def __init__(
        self,
        noise: Noise = "masking",
        amount: float = 0.5,
        patch: int = 4,
        loss: Literal["bce", "mse"] = "bce",
        decoder: Literal["resize", "transposed"] = "resize",
        decoder_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if amount < 0 or (noise != "gaussian" and amount > 1):
            raise ValueError(f"model.amount of {noise} noise must lie between 0 and 1, got {amount:g}.")
        if patch < 1:
            raise ValueError(f"model.patch must be at least one pixel, got {patch}.")
        if decoder == "transposed" and decoder_width is not None:
            raise ValueError(
                f"model.decoder_width={decoder_width} belongs to model.decoder=resize; a transposed decoder's widths "
                "follow from the backbone's, so leave it out."
            )
        self.noise, self.amount, self.patch, self.loss = noise, amount, patch, loss
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(f"Denoising needs a backbone with a spatial map, {self.hparams['backbone']} has none.")
        last = self.backbone.feature_info[-1]
        shape = last["num_chs"], math.ceil(last["reduction"])  # no whole number where scales choose the side
        if decoder == "transposed":
            self.decoder: nn.Module = TransposedDecoder(*shape)
        else:
            self.decoder = Decoder(*shape, 64 if decoder_width is None else decoder_width)
        self.metrics = MetricCollection({"psnr": PeakSignalNoiseRatio(data_range=1.0)})

    def reconstruct(self, corrupted: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the decoder's raw output: logits for `bce`, pixel values for `mse`."""
        return self.decoder(self.feature_map(corrupted), tuple(corrupted.shape[2:]))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean over all pixels, corrupted or not."""
        images, _ = batch
        return self._losses(images, corrupt(images, self.noise, self.amount, self.patch))[0]

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """As `losses`, with one fixed draw of noise for every image, and the peak signal-to-noise ratio."""
        images, _ = batch
        losses, output = self._losses(images, self._corrupt_fixed(images))
        assert self.metrics is not None
        self.metrics.update(self._to_pixels(output), images)
        return losses

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the reconstruction (B, 3, H, W) of corrupted images and its mean squared error (B,)."""
        images, _ = batch
        pixels = self._to_pixels(self.reconstruct(self._corrupt_fixed(images)))
        return {"mse": (pixels - images).square().flatten(1).mean(1), "reconstruction": pixels}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Three rows: the image, what the network sees, what it makes of it."""
        images = batch[0][:8]
        corrupted = self._corrupt_fixed(images)
        rows = torch.cat([images, corrupted.clamp(0, 1), self._to_pixels(self.reconstruct(corrupted))])
        return {"reconstruction": make_grid(rows, nrow=len(images), padding=2, pad_value=1.0)}

    def _losses(
        self, images: Float[Tensor, "b 3 h w"], corrupted: Float[Tensor, "b 3 h w"]
    ) -> tuple[dict[str, Tensor], Tensor]:
        output = self.reconstruct(corrupted)
        if self.loss == "bce":
            return {"loss": F.binary_cross_entropy_with_logits(output, images)}, output
        return {"loss": F.mse_loss(output, images)}, output

    def _corrupt_fixed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        with fixed_randomness(0):
            return corrupt(images, self.noise, self.amount, self.patch, shared=True)

    def _to_pixels(self, output: Tensor) -> Tensor:
        return (output.sigmoid() if self.loss == "bce" else output.clamp(0, 1)).float()
