"""Random crops and flips of a whole uint8 batch in one gather, each sample with its own draw."""

import torch
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
    return crop_flip(images, rows, columns, flipped, mode=mode)


def crop_flip(
    images: UInt8[Tensor, "b c h w"],
    rows: Int[Tensor, " b"],
    columns: Int[Tensor, " b"],
    flipped: Bool[Tensor, " b"],
    *,
    mode: str = "reflect",
) -> UInt8[Tensor, "b c h w"]:
    """Shift every image by its own offset, filling by reflection or zeros, then flip where asked.

    `out[b, :, y, x] = images[b, :, y + rows[b], x' + columns[b]]` with `x' = W - 1 - x` where flipped.

    Args:
        images: (B, C, H, W).
        rows: vertical offset of each sample, in pixels; smaller than H in size to reflect.
        columns: horizontal offset of each sample, in pixels; smaller than W in size to reflect.
        flipped: whether each sample is mirrored.
        mode: `reflect` or `zeros`.
    """
    batch, channels, height, width = images.shape
    y = torch.arange(height, device=images.device) + rows[:, None]  # (B, H)
    x = torch.arange(width, device=images.device).expand(batch, -1)
    x = torch.where(flipped[:, None], width - 1 - x, x) + columns[:, None]  # (B, W)
    outside = None
    if mode == "zeros":
        outside = ((y < 0) | (y >= height))[:, :, None] | ((x < 0) | (x >= width))[:, None, :]
        y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    else:
        y, x = _reflect(y, height), _reflect(x, width)
    index = (y[:, :, None] * width + x[:, None, :]).flatten(1)  # (B, H * W)
    out = images.reshape(batch, channels, -1).gather(2, index[:, None].expand(-1, channels, -1)).view(images.shape)
    return out if outside is None else out.masked_fill_(outside[:, None], 0)


def _reflect(index: Int[Tensor, "b n"], size: int) -> Int[Tensor, "b n"]:
    """Reflect indices at both borders without repeating the border: -1 -> 1, size -> size - 2."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
