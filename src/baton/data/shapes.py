"""`Shapes`, the embedded data source: ten classes of textured objects on lit, natural-looking backgrounds.

Images are drawn, not stored: sample i of a seed is the same picture in every batch, order, process and split length.
What the pictures teach is deliberate. The class is the outline; hue and material lean towards a class but do not give
it away. Backgrounds come in families whose texture, hue and height in the image go together (sky above, ground below,
haze at the horizon), and one light shades the object, casts its shadow and tints the scene. So colour can be guessed
from grey, a patch's place from its look, and a clean image from a noisy one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from baton.data.images import ImageData
from baton.data.shapes_rendering import (
    CLASS_NAMES,
    TILE_NAMES,
    Canvas,
    Draws,
    Plane,
    blend,
    clutter,
    exposure,
    hashed_uniforms,
    occluder,
    rgb,
    shading,
    signed_distance,
    texture_bank,
)

SPLITS = ("train", "val", "test", "unlabeled")

_MIN_SIZE = 16
_SPLIT_STRIDE = 10**9  # samples a split can have; a multiple of ten keeps the classes of every split balanced
_CHUNK = 64  # images drawn at once: their planes stay in the processor's cache

Colour = Float[Tensor, "batch 3 height width"]


class ShapesBatch(NamedTuple):
    """Rendered samples.

    Attributes:
        images: RGB, uint8 (batch, 3, size, size).
        labels: Class numbers, int64 (batch,).
        boxes: (left, top, right, bottom) of the visible part of the object in pixels, float32 (batch, 4); a box that
            covers one pixel at column 3 has left 3 and right 4.
        masks: True where the object is visible, bool (batch, size, size).
    """

    images: UInt8[Tensor, "batch 3 size size"]
    labels: Int64[Tensor, " batch"]
    boxes: Float[Tensor, "batch 4"]
    masks: Bool[Tensor, "batch size size"]


class _Family(NamedTuple):
    """A kind of background: dark and light colour and texture of the part above the horizon and of the ground."""

    above: tuple[str, tuple[float, float, float], tuple[float, float, float]]
    below: tuple[str, tuple[float, float, float], tuple[float, float, float]]
    horizon: tuple[float, float]  # range of its height, −1 top … 1 bottom
    softness: float  # width of the transition
    perspective: float  # how fast the ground's texture shrinks towards the horizon
    contrast: tuple[float, float]  # texture amplitude above and below


_FAMILIES = (
    _Family(  # meadow
        ("cloud", (0.36, 0.55, 0.80), (0.88, 0.92, 0.95)), ("grass", (0.13, 0.22, 0.07), (0.56, 0.64, 0.30)),
        (-0.7, 0.1), 0.05, 0.9, (0.8, 1.0),
    ),
    _Family(  # desert
        ("cloud", (0.47, 0.62, 0.78), (0.93, 0.89, 0.82)), ("sand", (0.50, 0.36, 0.22), (0.92, 0.79, 0.58)),
        (-0.8, -0.1), 0.05, 1.2, (0.5, 0.8),
    ),
    _Family(  # lake
        ("cloud", (0.50, 0.56, 0.66), (0.93, 0.86, 0.80)), ("water", (0.05, 0.19, 0.28), (0.50, 0.68, 0.72)),
        (-0.9, -0.2), 0.03, 1.6, (0.7, 0.9),
    ),
    _Family(  # forest
        ("leaves", (0.22, 0.34, 0.10), (0.80, 0.84, 0.46)), ("leaves", (0.05, 0.10, 0.05), (0.34, 0.42, 0.16)),
        (-0.6, 0.4), 0.7, 0.0, (1.0, 1.0),
    ),
    _Family(  # rock face
        ("stone", (0.38, 0.35, 0.33), (0.80, 0.77, 0.72)), ("stone", (0.20, 0.19, 0.19), (0.60, 0.57, 0.52)),
        (-0.4, 0.6), 0.9, 0.0, (1.0, 1.0),
    ),
    _Family(  # autumn wood
        ("wood", (0.20, 0.14, 0.10), (0.60, 0.50, 0.40)), ("leaves", (0.24, 0.11, 0.04), (0.80, 0.50, 0.20)),
        (-0.3, 0.5), 0.08, 0.3, (1.0, 1.1),
    ),
    _Family(  # snow
        ("cloud", (0.44, 0.52, 0.66), (0.84, 0.84, 0.86)), ("cloud", (0.58, 0.66, 0.80), (0.96, 0.96, 0.97)),
        (-0.6, 0.0), 0.05, 0.5, (0.7, 0.8),
    ),
)  # fmt: skip

# The hue (degrees) and the material each class leans to. Neighbours overlap, so neither names the class.
_CLASS_HUES = torch.tensor([14.0, 44.0, 22.0, 105.0, 52.0, 212.0, 268.0, 350.0, 176.0, 226.0])
_CLASS_MATERIALS = ("cloud", "stripes", "stone", "grass", "speckle", "wood", "cloud", "speckle", "stone", "stripes")
_CLASS_TILES = torch.tensor([TILE_NAMES.index(name) for name in _CLASS_MATERIALS])
_MATERIALS = torch.tensor([k for k, name in enumerate(TILE_NAMES) if name not in ("sand", "water")])
_HUE_LEANING = 0.5
_MATERIAL_LEANING = 0.6


def labels_of(indices: np.ndarray, seed: int) -> Int64[Tensor, " batch"]:
    """Give the class of each sample: every run of ten indices that starts at a multiple of ten has each class once."""
    classes = len(CLASS_NAMES)
    order = hashed_uniforms(seed ^ 0x5BD1E995, indices // classes, classes).argsort(axis=1, kind="stable")
    return torch.from_numpy(order[np.arange(len(indices)), indices % classes].astype(np.int64))


def render_shapes(indices: Sequence[int] | np.ndarray | Tensor, *, size: int = 48, seed: int = 0) -> ShapesBatch:
    """Draw samples; sample i depends on (seed, i, size) alone, never on the rest of the batch.

    Args:
        indices: Sample numbers ≥ 0 (batch,), in any order, repeats allowed.
        size: Image side in pixels, at least 16.
        seed: Seed of the whole data set.

    Returns:
        The rendered batch, on the CPU.

    Raises:
        ValueError: The size is below 16 or an index is negative.
    """
    _check_size(size)
    numbers = np.asarray(indices).reshape(-1)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0):
        raise ValueError(f"Expected whole sample indices of 0 or more, got {numbers.min()}; count samples from 0.")
    numbers = numbers.astype(np.int64)
    images = torch.empty((len(numbers), 3, size, size), dtype=torch.uint8)
    masks = torch.empty((len(numbers), size, size), dtype=torch.bool)
    for start in range(0, len(numbers), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part], masks[part] = _render_chunk(numbers[part], size, seed)
    return ShapesBatch(images, labels_of(numbers, seed), _tight_boxes(masks), masks)


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < _MIN_SIZE:
        raise ValueError(f"Expected an image size of at least {_MIN_SIZE} pixels, got {size!r}; choose a larger size.")


def _render_chunk(numbers: np.ndarray, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Paint one scene per sample, back to front."""
    draws = Draws(seed, numbers)
    axis = (torch.arange(size) + 0.5) * (2.0 / size) - 1.0
    canvas = Canvas(size, axis[None, None], axis[None, :, None], draws)
    light = draws.direction(200.0, 340.0)  # where the light comes from: above, y pointing down
    image = _background(canvas)
    image = clutter(image, canvas, light)
    image, visible = _object(image, canvas, labels_of(numbers, seed), light)
    image, visible = occluder(image, visible, canvas)
    image = exposure(image, canvas, light)
    threshold = visible.amax(dim=(1, 2), keepdim=True).clamp(max=0.5)  # even a sliver has a mask
    pixels = (image * 255.0 + 0.5).clamp(0.0, 255.0).to(torch.uint8)
    return pixels, visible >= threshold


def _palette(part: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = [(family.above, family.below)[part] for family in _FAMILIES]
    tiles = torch.tensor([TILE_NAMES.index(row[0]) for row in rows])
    return tiles, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])


_ABOVE, _BELOW = _palette(0), _palette(1)
_LAYOUT = torch.tensor([(*f.horizon, f.softness, f.perspective, *f.contrast) for f in _FAMILIES])


def _background(canvas: Canvas) -> Tensor:
    """Paint sky (or canopy, or wall) and ground, (batch, 3, size, size)."""
    draws, bank = canvas.draws, texture_bank(canvas.size)
    family = draws.integer(len(_FAMILIES)).flatten()
    low, high, softness, perspective, contrast_above, contrast_below = _LAYOUT[family][..., None, None].unbind(1)
    horizon = low + (high - low) * draws.uniform()
    scale, shift_x, shift_y = draws.uniform(0.7, 1.3), draws.uniform(0.0, 8.0), draws.uniform(0.0, 8.0)
    broad = bank.sample(torch.zeros_like(family)[:, None, None], canvas.x * 0.6 + shift_y, canvas.y * 0.6 + shift_x)
    broad = broad - 0.5
    depth = canvas.y - horizon  # (batch, size, 1), positive on the ground
    wobble = depth + broad * (0.10 + 0.5 * softness)
    ground = (wobble / softness + 0.5).clamp(0.0, 1.0)
    # Ground texture coordinates: a plane seen in perspective where the family has one, else a wall.
    nearness = 1.0 / (0.35 + depth.clamp(min=0.0))
    stretch = 1.0 + perspective * (nearness * 0.5 - 0.4)
    is_ground = (ground > 0.5).int()
    tile = _ABOVE[0][family][:, None, None].int() * (1 - is_ground) + _BELOW[0][family][:, None, None].int() * is_ground
    row_scale = scale * stretch.clamp(min=0.5)
    texture = bank.sample(tile, canvas.x * row_scale + shift_x, depth * row_scale * (1 + 0.6 * perspective) + shift_y)
    texture = texture - 0.5
    haze = (-depth.abs() * draws.uniform(0.5, 1.0)).clamp(min=-0.8)  # lighter towards the horizon
    contrast = contrast_above + (contrast_below - contrast_above) * ground
    level = (0.75 + 0.5 * haze + texture * contrast + 0.35 * broad).clamp(0.0, 1.0)[:, None]
    jitter = 1.0 + torch.cat([draws.bell(0.0, 0.10) for _ in range(3)], dim=1)[..., None]
    above_dark, above_light = (colour[family][..., None, None] * jitter for colour in _ABOVE[1:])
    below_dark, below_light = (colour[family][..., None, None] * jitter for colour in _BELOW[1:])
    sky = above_dark + (above_light - above_dark) * level
    soil = below_dark + (below_light - below_dark) * level
    return blend(sky, soil, ground)


def _object(image: Tensor, canvas: Canvas, labels: Tensor, light: tuple[Plane, Plane]) -> tuple[Tensor, Plane]:
    """Paint the object and its shadow; returns the image and how much of each pixel the object covers."""
    draws = canvas.draws
    radius = draws.uniform(0.48, 0.78)
    room = 0.95 - 0.85 * radius
    x, y = canvas.x - room * draws.bell(0.0, 0.8), canvas.y - room * draws.bell(0.0, 0.8)
    cos, sin = draws.direction(-25.0, 25.0)  # things stand more or less upright
    aspect, shear = 1.0 + draws.bell(0.0, 0.15), draws.bell(0.0, 0.18)

    def local(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        u, v = (x * cos + y * sin) / (radius * aspect), (y * cos - x * sin) * aspect / radius
        return u + shear * v, v

    reach = radius * draws.uniform(0.10, 0.30)
    shadow = signed_distance(labels, *local(x + light[0] * reach, y + light[1] * reach)) * radius
    blur = draws.uniform(0.08, 0.2) * canvas.size
    strength = draws.uniform(0.25, 0.6)
    image = image * (1.0 - strength * canvas.coverage(shadow, blur))[:, None]
    u, v = local(x, y)
    distance = signed_distance(labels, u, v) * radius
    cover = canvas.coverage(distance)
    paint = _material(canvas, labels, u, v)
    shade, gloss = shading(canvas, distance, radius, x, y, light)
    return blend(image, paint * shade[:, None] + gloss[:, None], cover), cover


def _material(canvas: Canvas, labels: Tensor, u: Plane, v: Plane) -> Tensor:
    """Colour the object's surface: hue and texture lean to the class."""
    draws = canvas.draws
    leaning = draws.chance(_HUE_LEANING)
    hue = leaning * (_CLASS_HUES[labels][:, None, None] + draws.bell(0.0, 18.0)) + (1 - leaning) * draws.uniform(
        0.0, 360.0
    )
    saturation, value = draws.bell(0.48, 0.24), draws.bell(0.70, 0.22)
    base = rgb(hue, saturation, value)
    dark = rgb(hue + draws.bell(0.0, 40.0), saturation * 1.1, value * draws.uniform(0.35, 0.75))
    leaning_tile = draws.chance(_MATERIAL_LEANING).long()
    tile = (
        leaning_tile * _CLASS_TILES[labels][:, None, None]
        + (1 - leaning_tile) * _MATERIALS[draws.integer(len(_MATERIALS))]
    )
    scale = draws.uniform(0.35, 0.7)
    texture = texture_bank(canvas.size).sample(
        tile, u * scale + draws.uniform(0.0, 8.0), v * scale + draws.uniform(0.0, 8.0)
    )
    return dark + (base - dark) * (texture * 1.4 - 0.1).clamp(0.0, 1.0)[:, None]


def _tight_boxes(masks: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch 4"]:
    columns, rows = masks.any(dim=1), masks.any(dim=2)
    edges = []
    for line in (columns, rows):
        numbers = torch.arange(line.shape[1])
        first = torch.where(line, numbers, line.shape[1]).amin(dim=1)
        last = torch.where(line, numbers, -1).amax(dim=1) + 1
        edges.append((first, last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


class ShapesDataset(Dataset[tuple[Tensor, int]]):
    """A split of the procedural images, drawn when first asked for and kept in memory as uint8.

    Splits of one seed share no sample, a longer split begins with the shorter one, and every split has each class
    equally often (to within one sample).

    Args:
        size: Image side in pixels, at least 16.
        length: Number of samples, 1 to 10^9.
        seed: Seed of the pictures.
        split: "train", "val", "test" or "unlabeled". The last has labels too: a task that needs none ignores them.
        cache: Keep drawn images in memory, 3 · size² bytes each (6.9 kB at 48 pixels); otherwise each access draws.

    Attributes:
        classes: The ten class names.
        targets: Class numbers, int64 (length,), known without drawing.

    Raises:
        ValueError: Unknown split, a length outside 1 … 10^9 or a size below 16.
    """

    def __init__(
        self, size: int = 48, length: int = 10_000, seed: int = 0, split: str = "train", cache: bool = True
    ) -> None:
        _check_size(size)
        if split not in SPLITS:
            raise ValueError(f"Expected a split out of {', '.join(SPLITS)}, got {split!r}; choose one of these.")
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= _SPLIT_STRIDE:
            raise ValueError(f"Expected a length of 1 to {_SPLIT_STRIDE} samples, got {length!r}; choose another one.")
        self.size, self.seed, self.split = size, seed, split
        self.classes = list(CLASS_NAMES)
        self._first = SPLITS.index(split) * _SPLIT_STRIDE
        self.targets = labels_of(np.arange(self._first, self._first + length), seed)
        self._drawn = torch.zeros(length if cache else 0, dtype=torch.bool)
        self._images = torch.empty((len(self._drawn), 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Give one image, uint8 (3, size, size), and its class number."""
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give a batch at once: images, uint8 (batch, 3, size, size), and class numbers, int64 (batch,).

        Raises:
            IndexError: An index is outside 0 … length − 1.
        """
        chosen = self._checked(indices)
        if not len(self._drawn):
            return self.render(chosen).images, self.targets[chosen]
        missing = chosen[~self._drawn[chosen]].unique()
        if len(missing):
            self._images[missing] = self.render(missing).images
            self._drawn[missing] = True
        return self._images[chosen], self.targets[chosen]

    def render(self, indices: Sequence[int] | Tensor | None = None) -> ShapesBatch:
        """Draw samples of this split (all of them by default) with their boxes and masks, past the cache."""
        chosen = self._checked(range(len(self)) if indices is None else indices)
        return render_shapes(chosen + self._first, size=self.size, seed=self.seed)

    def boxes(self, indices: Sequence[int] | Tensor | None = None) -> Float[Tensor, "batch 4"]:
        """Draw samples and give their objects' boxes, see `ShapesBatch`."""
        return self.render(indices).boxes

    def masks(self, indices: Sequence[int] | Tensor | None = None) -> Bool[Tensor, "batch size size"]:
        """Draw samples and give their objects' masks, see `ShapesBatch`."""
        return self.render(indices).masks

    def _checked(self, indices: Sequence[int] | Tensor) -> Int64[Tensor, " batch"]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= len(self)):
            raise IndexError(f"Expected indices from 0 to {len(self) - 1}, got {chosen.min()} to {chosen.max()}.")
        return chosen


class Shapes(ImageData):
    """The embedded data: procedural images of ten classes of objects, the same everywhere from the same seed.

    Args:
        size: image side in pixels.
        length: training images (of which `labels_per_class` or `subset` may keep a part; only those are drawn).
        val_length: validation images, 0 for none.
        test_length: test images.
        unlabeled: train on the unlabelled split: targets are -1.
        picture_seed: seed of the pictures; `seed` draws the splits and the order, as everywhere.
        crop_padding: random crop after padding by this many pixels.
        flip: random horizontal flip.
        kwargs: see `ImageData`.
    """

    classes = list(CLASS_NAMES)

    def __init__(
        self,
        size: int = 48,
        length: int = 10_000,
        val_length: int = 1_000,
        test_length: int = 2_000,
        unlabeled: bool = False,
        picture_seed: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_padding=crop_padding, flip=flip, **kwargs)
        self.size, self.picture_seed, self.unlabeled = size, picture_seed, unlabeled
        self.lengths = {"train": length, "val": val_length, "test": test_length}
        _check_size(size)

    def sources(self) -> tuple[ShapesDataset, ShapesDataset | None, ShapesDataset]:
        """Return the three splits; nothing is drawn yet."""
        train = self._split("unlabeled" if self.unlabeled else "train", self.lengths["train"])
        if self.unlabeled:
            train.targets = torch.full_like(train.targets, -1)
        val = self._split("val", self.lengths["val"]) if self.lengths["val"] else None
        return train, val, self._split("test", self.lengths["test"])

    def _split(self, split: str, length: int) -> ShapesDataset:
        return ShapesDataset(self.size, length, self.picture_seed, split)
