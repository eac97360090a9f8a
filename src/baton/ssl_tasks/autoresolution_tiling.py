"""The geometry of autoresolution: which super patch of an image is cut out, and where its cells lie in the image."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A super patch, and the grid of overlapping patches in it that a network without padding sees.

    Args:
        super_patch: side of the super patch, in pixels of the high-resolution image.
        receptive_field: side of the patch that a cell sees, in pixels.
        stride: pixels between neighbouring cells.
        factor: side of the squares that are averaged into one pixel of the low-resolution image.

    Raises:
        ValueError: if the super patch is not covered by whole steps; shows the arithmetic.
    """

    super_patch: int
    receptive_field: int
    stride: int
    factor: int

    def __post_init__(self) -> None:
        size, field, stride = self.super_patch, self.receptive_field, self.stride
        if self.factor < 1:
            raise ValueError(f"model.low_resolution_factor must be at least 1, got {self.factor}.")
        if size < field:
            raise ValueError(
                f"model.super_patch={size} is smaller than the patch tower's receptive field of {field} pixels: use at "
                f"least {field}, or a tower with a smaller one."
            )
        rest = (size - field) % stride
        if rest:
            raise ValueError(
                f"model.super_patch={size} leaves {rest} of its pixels unseen: ({size} - {field}) / {stride} + 1 = "
                f"{(size - field) / stride + 1:g} cells; use {size - rest} ({(size - rest - field) // stride + 1} "
                f"cells) or {size - rest + stride} ({(size - rest + stride - field) // stride + 1} cells)."
            )

    @property
    def cells(self) -> int:
        """Cells along each axis of the grid."""
        return (self.super_patch - self.receptive_field) // self.stride + 1

    def check(self, height: int, width: int) -> None:
        """Refuse images that this tiling does not fit.

        Raises:
            ValueError: with the arithmetic.
        """
        if self.super_patch > min(height, width):
            raise ValueError(
                f"model.super_patch={self.super_patch} does not fit into images of {height} x {width} pixels: make it "
                f"at most {self.largest(min(height, width))}, or use larger images."
            )
        for side in (height, width):
            if side % self.factor:
                raise ValueError(
                    f"Images of {height} x {width} pixels cannot be averaged in squares of "
                    f"{self.factor}: {side} / {self.factor} = {side / self.factor:g}; use "
                    f"another model.low_resolution_factor, or images of {side // self.factor * self.factor} or "
                    f"{-(-side // self.factor) * self.factor} pixels."
                )

    def largest(self, side: int) -> int | str:
        """Side of the largest super patch in an image of this side; a text where none fits."""
        if side < self.receptive_field:
            return f"{side} with a tower of a receptive field below {self.receptive_field}"
        return side - (side - self.receptive_field) % self.stride

    def draw(self, images: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Draw the top and left pixel of every image's super patch, each place equally likely."""
        rows, columns = (side - self.super_patch + 1 for side in images.shape[2:])
        tops = torch.randint(rows, (len(images),), device=images.device)
        return tops, torch.randint(columns, (len(images),), device=images.device)

    def fixed(self, images: Float[Tensor, "b c h w"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Top and left pixel that depend on the image's own pixels alone, for evaluation: as good as drawn, but the
        same in every epoch, however images are batched or spread over processes.

        Args:
            images: in [0, 1], from 8 bits.
        """
        pixels = (images * 255).round().long().flatten(1)
        places = torch.arange(1, pixels.shape[1] + 1, device=images.device)
        number = (pixels * (places * 40503 % 65521)).sum(1) % 2**31 * 2654435761 % 2**32  # Knuth's hash
        rows, columns = (side - self.super_patch + 1 for side in images.shape[2:])
        return (number >> 16) * rows >> 16, (number & 0xFFFF) * columns >> 16

    def crop(
        self, images: Float[Tensor, "b c h w"], tops: Int[Tensor, " b"], lefts: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c s s"]:
        """Cut the super patches out."""
        span = torch.arange(self.super_patch, device=images.device)
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        rows, columns = (tops[:, None] + span)[:, :, None], (lefts[:, None] + span)[:, None, :]
        return images[sample, :, rows, columns].permute(0, 3, 1, 2)

    def centres(
        self, tops: Int[Tensor, " b"], lefts: Int[Tensor, " b"], height: int, width: int
    ) -> Float[Tensor, "b 2 gh gw"]:
        """Centres (x, y) of every cell's patch in the image; -1 and 1 are the image's borders.

        A patch that covers pixels l to r (counted from 0, both included) has its centre at (l + r + 1) / 2 pixels from
        the left border; x = (l + r + 1) / width - 1. This is the convention of `grid_sample(align_corners=False)`.

        Args:
            tops: first row of every super patch.
            lefts: first column of every super patch.
            height: of the images, in pixels.
            width: of the images, in pixels.
        """
        steps = torch.arange(self.cells, device=tops.device) * self.stride
        y = (2 * (tops[:, None] + steps) + self.receptive_field) / height - 1  # (B, G)
        x = (2 * (lefts[:, None] + steps) + self.receptive_field) / width - 1
        cells = self.cells
        return torch.stack([x[:, None, :].expand(-1, cells, -1), y[:, :, None].expand(-1, -1, cells)], dim=1)
