"""Image files to uint8 RGB: every usual format, orientation and bit depth; then cropping to a size."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files that count as images, in any case."""

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


class UnreadableImageError(ValueError):
    """A file that cannot be decoded; the sentence names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader's worker raises it again with its whole traceback as the message: keep the sentence.
        super().__init__(
            message.strip().splitlines()[-1].removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")
        )


def decode(path: str | Path) -> UInt8[Tensor, "3 height width"]:
    """Decode an image file to RGB, upright as its EXIF orientation says.

    Greyscale is repeated, palettes are looked up, CMYK is converted; transparent pixels are composited over white;
    of 16 bits the upper eight are kept. The first frame of an animation counts.

    Args:
        path: a JPEG, PNG, WebP, BMP or TIFF file; its content decides, not its suffix.

    Raises:
        UnreadableImageError: (a `ValueError`) if the file is truncated, no image, or has no 8-bit meaning (floats).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content.startswith(b"\xff\xd8\xff"):  # JPEG: torchvision is faster than PIL, and right in every mode
            data = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
            return decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise UnreadableImageError(f"Cannot read the image {path}: its content is no known image format.") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"Cannot read the image {path}: {reason[:200].rstrip('.')}.") from None


def random_resized_crop(
    image: UInt8[Tensor, "3 height width"],
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> UInt8[Tensor, "3 size size"]:
    """Cut out a random area of random shape and resize it to a square (Szegedy et al., 2015).

    Args:
        image: (3, H, W).
        size: side of the result, in pixels.
        scale: range of the area, as a fraction of the image.
        ratio: range of width / height, drawn uniformly in its logarithm.
        generator: source of the draws.
    """
    height, width = image.shape[1:]
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        shape = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < h <= height and 0 < w <= width:
            break
    else:  # as in torchvision: the largest centred area whose shape is allowed
        w = max(1, min(width, round(height * ratio[1])))
        h = max(1, min(height, round(width / ratio[0])))
        top, left = (height - h) // 2, (width - w) // 2
        return squash(image[:, top : top + h, left : left + w], size)
    top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
    return squash(image[:, top : top + h, left : left + w], size)


def resize_shorter(image: UInt8[Tensor, "3 height width"], side: int) -> UInt8[Tensor, "3 _ _"]:
    """Resize so that the shorter side has `side` pixels and the shape stays.

    Args:
        image: (3, H, W).
        side: length of the shorter side of the result, in pixels.
    """
    height, width = image.shape[1:]
    shorter = min(height, width)
    target = [max(side, round(length * side / shorter)) for length in (height, width)]
    return functional.resize(image, target, antialias=True)


def centre_crop(image: UInt8[Tensor, "3 height width"], size: int, resize: int) -> UInt8[Tensor, "3 size size"]:
    """Resize the shorter side to `resize` pixels, then cut `size` x `size` pixels out of the centre.

    Args:
        image: (3, H, W).
        size: side of the result, in pixels; at most `resize`.
        resize: length of the shorter side before the crop, in pixels.
    """
    return functional.center_crop(resize_shorter(image, resize), [size, size])


def squash(image: UInt8[Tensor, "3 height width"], size: int) -> UInt8[Tensor, "3 size size"]:
    """Resize to a square, whatever happens to the shape.

    Args:
        image: (3, H, W).
        size: side of the result, in pixels.
    """
    return functional.resize(image, [size, size], antialias=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:  # PIL would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no defined range; store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
