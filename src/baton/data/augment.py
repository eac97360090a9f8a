"""Random crops and flips of a whole uint8 batch at once, each sample with its own draw."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


def random_crop_flip(
    images: UInt8[Tensor, "b c h w"], padding: int, *, flip: bool = True, mode: str = "reflect"
) -> UInt8[Tensor, "b c h w"]:
    """Pad by `padding`, crop back to the original size at a random place, and flip horizontally half of the time.

    Draws from the global random state of the images' device.

    Args:
        images: (B, C, H, W).
        padding: pixels on each side; at most H - 1 and W - 1 for `reflect`.
        flip: whether to flip.
        mode: `reflect` (the border pixel is not repeated) or `zeros`.

    Raises:
        ValueError: if `padding` is larger than reflection allows.
    """
    batch, device = len(images), images.device
    if mode == "reflect" and padding >= min(images.shape[2:]):
        raise ValueError(
            f"crop_padding={padding} must be smaller than the image, {images.shape[2]} x {images.shape[3]}, to reflect."
        )
    rows = torch.randint(-padding, padding + 1, (batch,), device=device)
    columns = torch.randint(-padding, padding + 1, (batch,), device=device)
    flipped = torch.rand(batch, device=device) < 0.5 if flip else torch.zeros(batch, dtype=torch.bool, device=device)
    return crop_flip(images, rows, columns, flipped, padding, mode=mode)


def crop_flip(
    images: UInt8[Tensor, "b c h w"],
    rows: Int[Tensor, " b"],
    columns: Int[Tensor, " b"],
    flipped: Bool[Tensor, " b"],
    padding: int,
    *,
    mode: str = "reflect",
) -> UInt8[Tensor, "b c h w"]:
    """Shift every image by its own offset, filling by reflection or zeros, then flip where asked.

    `out[b, :, y, x] = images[b, :, y + rows[b], x' + columns[b]]` with `x' = W - 1 - x` where flipped.

    Args:
        images: (B, C, H, W).
        rows: vertical offset of each sample, in pixels, from -padding to padding.
        columns: horizontal offset of each sample, in pixels, from -padding to padding.
        flipped: whether each sample is mirrored.
        padding: largest offset, smaller than H and W to reflect.
        mode: `reflect` or `zeros`.
    """
    batch, channels, height, width = images.shape
    # A row of the result is `width` pixels in a row of the padded image: copying rows is much faster than a gather
    # of pixels. Mirroring comes before the crop, so offsets change their sign.
    both = torch.stack([images, images.flip(3)]).flatten(0, 1)
    sample = torch.arange(batch, device=images.device)
    chosen = both.index_select(0, sample + batch * flipped)
    y = torch.arange(height, device=images.device) + rows[:, None]  # (B, H)
    if mode == "reflect":
        mirrored = both.index_select(0, sample + batch * ~flipped)
        left, right = mirrored[..., width - 1 - padding : width - 1], mirrored[..., 1 : 1 + padding]
        padded = torch.cat([left, chosen, right], dim=3)
        y = _reflect(y, height)
    else:
        padded = F.pad(chosen, [padding] * 4)
        y = y + padding
    step = padded.shape[3]
    plane = torch.arange(batch * channels, device=images.device).view(batch, channels, 1) * padded[0, 0].numel()
    x = torch.where(flipped, -columns, columns) + padding
    start = plane + (y * step + x[:, None])[:, None]  # (B, C, H), of each row in the padded images
    windows = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    return windows.index_select(0, start.view(-1)).view(images.shape)


def _reflect(index: Int[Tensor, "b n"], size: int) -> Int[Tensor, "b n"]:
    """Reflect indices at both borders without repeating the border: -1 -> 1, size -> size - 2."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
