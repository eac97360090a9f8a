"""Building blocks of the procedural `Shapes` images: counter-based randomness, texture tiles, outlines.

Everything a pixel goes through is built from operations that IEEE 754 rounds correctly (+ − × ÷ √ floor min max) and
from table look-ups. Such operations give the same bits in the body and in the tail of a vectorised loop, whereas
`sin`, `exp`, matrix products and fused multiply-adds may not. So a sample cannot depend on the batch it is drawn in.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CLASS_NAMES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "hexagon", "arrow")
TILE_NAMES = ("cloud", "grass", "leaves", "sand", "water", "stone", "wood", "stripes", "speckle")

_TILE_SIDE = 512  # texels of the finest texture level, a power of two
_IMAGE_SPAN = 128  # texels of the finest level that one image spans at scale 1
_ANGLES = 4096
_COSINES = torch.tensor([round(math.cos(2 * math.pi * k / _ANGLES), 6) for k in range(_ANGLES)], dtype=torch.float32)

Plane = Float[Tensor, "_ _ _"]
"""(batch, height, width): a value per pixel, or an axis of length 1 where it does not vary."""


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Hash unsigned 64-bit integers (Steele, Lea & Flood 2014, the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashed_uniforms(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Give `count` uniforms in [0, 1) for each index; entry (i, k) depends on (seed, indices[i], k) alone.

    Args:
        seed: Any integer; its low 64 bits count.
        indices: Integers (batch,).
        count: Numbers per index.

    Returns:
        float64 array (batch, count).
    """
    start = splitmix64(np.array([seed & (2**64 - 1)], dtype=np.uint64))
    keys = splitmix64(start ^ splitmix64(indices.astype(np.uint64)))
    bits = splitmix64(keys[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    return (bits >> np.uint64(40)).astype(np.float64) * 2.0**-24  # 24 bits: exact in float32 too


class Draws:
    """A stream of random parameters, one per sample and call, that no other sample of the batch can influence.

    Each call takes the next column of a table of hashed uniforms, so the order of the calls is part of the picture.

    Args:
        seed: Seed of the data set.
        indices: Sample numbers (batch,).
        count: How many columns can be drawn at most.
    """

    def __init__(self, seed: int, indices: np.ndarray, count: int = 160) -> None:
        self._table = torch.from_numpy(hashed_uniforms(seed, indices, count)).float()
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Plane:
        """Draw uniformly from [low, high)."""
        column = self._table[:, self._next, None, None]
        self._next += 1
        return low + (high - low) * column

    def bell(self, centre: float, reach: float) -> Plane:
        """Draw from the triangular distribution on centre ± reach."""
        return centre + reach * (self.uniform() - self.uniform())

    def integer(self, count: int) -> Int[Tensor, "batch 1 1"]:
        """Draw uniformly from 0 … count − 1."""
        return self.uniform(0.0, float(count)).floor().long().clamp(max=count - 1)

    def chance(self, probability: float) -> Plane:
        """Draw 1 with the given probability, else 0."""
        return (self.uniform() < probability).float()

    def direction(self, low: float = 0.0, high: float = 360.0) -> tuple[Plane, Plane]:
        """Draw a unit vector (x, y) whose angle is uniform in [low, high) degrees."""
        steps = (self.uniform(low, high) * (_ANGLES / 360.0)).floor().long()
        return _COSINES[steps % _ANGLES], _COSINES[(steps - _ANGLES // 4) % _ANGLES]


# --- texture tiles ----------------------------------------------------------------------------------------------------


def _spectral(key: int, exponent: float, low: float, stretch_x: float = 1.0, stretch_y: float = 1.0) -> np.ndarray:
    """Periodic noise with amplitude ∝ frequency^−exponent above `low` cycles a tile, drawn out along x or y."""
    side = _TILE_SIDE
    white = hashed_uniforms(key, np.arange(side), side) - 0.5
    fy = np.fft.fftfreq(side)[:, None] * side * stretch_y
    fx = np.fft.rfftfreq(side)[None] * side * stretch_x
    frequency = np.hypot(fx, fy)
    amplitude = np.where(frequency >= low, np.maximum(frequency, 1.0) ** -exponent, 0.0)
    return _standardise(np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(side, side)))


def _cells(key: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest and second nearest of count² jittered points, periodic, in cell widths (Worley 1996)."""
    jitter = hashed_uniforms(key, np.arange(count * count), 2).reshape(count, count, 2)
    position = (np.arange(_TILE_SIDE) + 0.5) * count / _TILE_SIDE
    cell = np.floor(position).astype(np.int64)
    first = np.full((_TILE_SIDE, _TILE_SIDE), 9.0)
    second = first.copy()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            point = jitter[np.ix_((cell + dy) % count, (cell + dx) % count)]
            x = (cell + dx)[None] + point[..., 0] - position[None]
            y = (cell + dy)[:, None] + point[..., 1] - position[:, None]
            distance = np.hypot(x, y)
            second = np.minimum(second, np.maximum(first, distance))
            first = np.minimum(first, distance)
    return first, second


def _standardise(tile: np.ndarray) -> np.ndarray:
    return (tile - tile.mean()) / tile.std()


def _waves(cycles: int, warp: np.ndarray) -> np.ndarray:
    phase = np.arange(_TILE_SIDE)[None] * (cycles / _TILE_SIDE) + warp
    return np.sin(2 * np.pi * phase)


@lru_cache(maxsize=1)
def _tiles() -> np.ndarray:
    """Draw the finest level of every texture, in the order of TILE_NAMES."""
    cloud = _spectral(1, 1.7, 3.0)
    fine = _spectral(2, 0.6, 24.0)
    leaf_near, _ = _cells(3, 26)
    leaf_small, _ = _cells(4, 47)
    stone_near, stone_next = _cells(5, 20)
    dots, _ = _cells(6, 34)
    leaves = -_standardise(leaf_near) - 0.6 * _standardise(leaf_small) + 0.9 * _spectral(7, 1.3, 4.0)
    cracks = -np.clip(1.0 - (stone_next - stone_near) / 0.16, 0.0, 1.0)
    stone = 2.2 * cracks + _spectral(8, 1.2, 6.0) + 0.35 * fine
    tiles = [
        cloud,
        _spectral(9, 0.9, 10.0, stretch_y=0.25) + 0.6 * _spectral(10, 1.5, 4.0) + 0.25 * fine,
        leaves,
        _waves(22, 0.8 * _spectral(11, 1.9, 2.0)).T + 0.9 * fine + 0.5 * cloud,
        -np.abs(_spectral(12, 1.3, 9.0, stretch_x=2.6, stretch_y=0.8)) + 0.3 * _spectral(13, 1.4, 5.0),
        stone,
        _spectral(14, 1.0, 7.0, stretch_y=7.0) + 0.4 * _spectral(15, 1.5, 4.0),
        _waves(30, 0.25 * _spectral(16, 1.8, 2.0)) + 0.25 * cloud,
        3.0 * np.clip(1.0 - dots / 0.42, 0.0, 0.35) + 0.25 * cloud,
    ]
    return np.stack([np.clip(0.5 + 0.22 * _standardise(tile), 0.0, 1.0) for tile in tiles])


class TextureBank:
    """Periodic texture tiles in [0, 1], at one level of their pyramid.

    Args:
        level: How often the finest tiles are halved.
    """

    def __init__(self, level: int) -> None:
        stack = _tiles()
        for _ in range(level):
            stack = (stack[:, ::2, ::2] + stack[:, 1::2, ::2] + stack[:, ::2, 1::2] + stack[:, 1::2, 1::2]) / 4
        self.side = stack.shape[-1]
        self.texels_per_unit = _IMAGE_SPAN / 2 * self.side / _TILE_SIDE  # an image is two units wide
        stack = np.round(stack * 4096) / 4096
        right, lower = np.roll(stack, -1, axis=2), np.roll(stack, -1, axis=1)
        bend = np.roll(right, -1, axis=1) - right - lower + stack
        patches = np.stack([stack, right - stack, lower - stack, bend], axis=-1).astype(np.float32)
        # The four numbers of a bilinear patch travel as one complex128: one look-up instead of four.
        self._patches = torch.from_numpy(patches).flatten().view(torch.complex128)
        rows = np.arange(_TILE_SIDE)
        grain = hashed_uniforms(17, rows, _TILE_SIDE) + hashed_uniforms(18, rows, _TILE_SIDE) - 1.0
        self._grain = torch.from_numpy(grain).float().flatten()

    def sample(self, tile: Int[Tensor, "batch _ _"], x: Plane, y: Plane) -> Plane:
        """Look tiles up bilinearly at (x, y), in units of half an image; values in [0, 1]."""
        x, y = x * self.texels_per_unit, y * self.texels_per_unit
        left, top = x.floor(), y.floor()
        mask = self.side - 1
        index = (tile.int() * self.side + (top.int() & mask)) * self.side + (left.int() & mask)
        patch = self._patches.take(index.long()).view(torch.float32).unflatten(-1, (-1, 4))
        corner, rightwards, downwards, bend = patch.unbind(-1)
        across, down = x - left, y - top
        return corner + rightwards * across + (downwards + bend * across) * down

    def grain(self, draws: Draws, size: int) -> Plane:
        """Cut a piece of white noise (mean 0, triangular on ±1) at a random place for each sample."""
        rows = (torch.arange(size)[:, None] + draws.integer(_TILE_SIDE)) % _TILE_SIDE
        columns = (torch.arange(size) + draws.integer(_TILE_SIDE)) % _TILE_SIDE
        return self._grain.take(rows * _TILE_SIDE + columns)


_bank = lru_cache(maxsize=4)(TextureBank)


def texture_bank(size: int) -> TextureBank:
    """Give the textures at the level where a pixel of an image of this size steps about one texel.

    Built once per process, in about half a second.
    """
    return _bank(max(0, round(math.log2(_IMAGE_SPAN / size))))


# --- outlines ---------------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    x: Tensor
    y: Tensor

    def length(self) -> Tensor:
        return (self.x * self.x + self.y * self.y).sqrt()


def _disc(p: _Point) -> Tensor:
    return p.length() - 0.88


def _ring(p: _Point) -> Tensor:
    return (p.length() - 0.68).abs() - 0.24


def _square(p: _Point) -> Tensor:
    return torch.maximum(p.x.abs(), p.y.abs()) - 0.76


def _triangle(p: _Point) -> Tensor:
    return torch.maximum(p.x.abs() * 0.8660254 - p.y * 0.5, p.y) - 0.5


def _star(p: _Point) -> Tensor:
    # Five-fold symmetry by reflection in two axes, then the one remaining edge (after I. Quilez's sdStar5).
    x, y = p.x.abs(), -p.y
    fold = 2.0 * (0.809017 * x - 0.587785 * y).clamp(min=0.0)
    x, y = x - fold * 0.809017, y + fold * 0.587785
    fold = 2.0 * (-0.809017 * x - 0.587785 * y).clamp(min=0.0)
    x, y = (x + fold * 0.809017).abs(), y + fold * 0.587785
    return x * 0.923 + (y - 1.0) * 0.384


def _cross(p: _Point) -> Tensor:
    x, y = p.x.abs(), p.y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 0.92)


def _crescent(p: _Point) -> Tensor:
    bite = _Point(p.x - 0.45, p.y).length() - 0.72
    return torch.maximum(p.length() - 0.95, -bite)


def _heart(p: _Point) -> Tensor:
    x, y = p.x.abs() / 1.3, 0.5 - p.y / 1.3  # the tip at the bottom, y upwards
    lobe = _Point(x - 0.25, y - 0.75).length() - 0.3535534
    along = 0.5 * (x + y).clamp(min=0.0)
    body = torch.minimum(_Point(x, y - 1.0).length(), _Point(x - along, y - along).length())
    body = torch.copysign(body, x - y)
    upper = (x + y > 1.0).float()
    return 1.3 * (upper * lobe + (1.0 - upper) * body)


def _hexagon(p: _Point) -> Tensor:
    x, y = p.x.abs(), p.y.abs()
    return torch.maximum(x * 0.8660254 + y * 0.5, y) - 0.8


def _arrow(p: _Point) -> Tensor:
    y = p.y.abs()
    head = torch.maximum(0.7071068 * (p.x + y) - 0.67, 0.05 - p.x)
    shaft = torch.maximum(y - 0.26, (p.x + 0.35).abs() - 0.55)
    return torch.minimum(head, shaft)


_OUTLINES: tuple[Callable[[_Point], Tensor], ...] = (
    _disc, _ring, _square, _triangle, _star, _cross, _crescent, _heart, _hexagon, _arrow,
)  # fmt: skip


def signed_distance(labels: Int[Tensor, " batch"], x: Plane, y: Plane) -> Plane:
    """Signed distance to the outline of each sample's class: negative inside, exact along straight edges.

    Args:
        labels: Class numbers, positions in CLASS_NAMES.
        x: Horizontal coordinates in which every outline fits into about the unit disc.
        y: Vertical coordinates, downwards.

    Returns:
        Distances in the units of the coordinates.
    """
    distance = torch.empty_like(x)
    for number, outline in enumerate(_OUTLINES):
        chosen = (labels == number).nonzero().flatten()
        if len(chosen):
            distance[chosen] = outline(_Point(x[chosen], y[chosen]))
    return distance


# --- paint and light --------------------------------------------------------------------------------------------------


class Canvas(NamedTuple):
    """Pixel coordinates of a chunk of images and the random parameters of its scenes."""

    size: int
    x: Float[Tensor, "1 1 width"]  # −1 … 1 from left to right
    y: Float[Tensor, "1 height 1"]  # −1 … 1 from top to bottom
    draws: Draws

    def coverage(self, distance: Plane, softness: float | Tensor = 1.0) -> Plane:
        """Share of a pixel inside an outline, from its signed distance in half images; softness in pixels."""
        return (0.5 - distance * (self.size / 2) / softness).clamp(0.0, 1.0)


def blend(image: Tensor, paint: Tensor, cover: Plane) -> Tensor:
    """Lay paint (batch, 3, height, width) over an image where it covers it."""
    return image + (paint - image) * cover[:, None]


def rgb(hue: Plane, saturation: Plane, value: Plane) -> Tensor:
    """Convert HSV (hue in degrees, any sign) to RGB, shape (batch, 3, 1, 1)."""
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = hue / 60.0 + offset
        k = k - 6.0 * (k / 6.0).floor()
        channels.append(value - value * saturation * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.cat(channels, dim=1)[..., None]


def clutter(image: Tensor, canvas: Canvas, light: tuple[Plane, Plane]) -> Tensor:
    """Lay small pebbles and sticks about, lit like the object."""
    draws = canvas.draws
    for _ in range(2):
        x, y = canvas.x - draws.uniform(-1.0, 1.0), canvas.y - draws.uniform(-0.6, 1.0)
        cos, sin = draws.direction()
        long, short = draws.uniform(0.06, 0.22), draws.uniform(0.03, 0.10)
        u, v = (x * cos + y * sin).abs(), (y * cos - x * sin).abs()
        corner = short * draws.uniform(0.3, 1.0)
        u, v = (u - long + corner).clamp(min=0.0), (v - short + corner).clamp(min=0.0)
        cover = canvas.coverage((u * u + v * v).sqrt() - corner) * draws.chance(0.45)
        colour = rgb(draws.bell(45.0, 60.0), draws.uniform(0.05, 0.45), draws.uniform(0.25, 0.75))
        shade = 0.9 + (x * light[0] + y * light[1]) * 2.5
        image = blend(image, colour * shade[:, None], cover)
    return image


def shading(
    canvas: Canvas, distance: Plane, radius: Plane, x: Plane, y: Plane, light: tuple[Plane, Plane]
) -> tuple[Plane, Plane]:
    """Shade a pillow-shaped surface: diffuse factor and a highlight to add."""
    draws = canvas.draws
    slope_x, slope_y = torch.zeros_like(distance), torch.zeros_like(distance)
    half = canvas.size / 4  # central differences step two pixels of 2/size
    slope_x[..., 1:-1] = (distance[..., 2:] - distance[..., :-2]) * half
    slope_y[:, 1:-1] = (distance[:, 2:] - distance[:, :-2]) * half
    bevel = draws.uniform(0.15, 0.5) * radius
    steepness = (1.0 + distance / bevel).clamp(0.0, 1.0)  # 1 at the outline, 0 on the plateau
    facing = slope_x * light[0] + slope_y * light[1]  # slopes point outwards, like the surface's normal
    round_ = (x * light[0] + y * light[1]) / radius
    shade = 0.92 + draws.uniform(0.2, 0.5) * facing * steepness + draws.uniform(0.05, 0.22) * round_
    dx, dy = x - light[0] * radius * 0.4, y - light[1] * radius * 0.4
    spot = (1.0 - (dx * dx + dy * dy) / (radius * radius * draws.uniform(0.1, 0.4))).clamp(min=0.0)
    return shade, spot * spot * draws.uniform(-0.2, 0.3).clamp(min=0.0)


def occluder(image: Tensor, visible: Plane, canvas: Canvas) -> tuple[Tensor, Plane]:
    """Let a blade or a twig cross some images in front of the object."""
    draws = canvas.draws
    cos, sin = draws.direction(60.0, 120.0)
    x, y = canvas.x - draws.uniform(-0.8, 0.8), canvas.y - 1.0
    across, along = x * sin - y * cos, -(x * cos + y * sin)
    across = across + along * along * draws.bell(0.0, 0.25)  # bent
    width = draws.uniform(0.03, 0.10) * (1.0 - along * draws.uniform(0.2, 0.5)).clamp(min=0.0)
    cover = canvas.coverage(across.abs() - width) * draws.chance(0.3)
    stalk = rgb(draws.bell(60.0, 40.0), draws.uniform(0.25, 0.6), draws.uniform(0.12, 0.5))
    paint = stalk * (1.1 + across / width.clamp(min=0.01) * 0.3)[:, None]
    return blend(image, paint, cover), visible * (1.0 - cover)


def exposure(image: Tensor, canvas: Canvas, light: tuple[Plane, Plane]) -> Tensor:
    """Apply the light's fall-off and tint, the lens's vignette and the sensor's grain."""
    draws = canvas.draws
    fall = draws.uniform(0.0, 0.18)
    radius = canvas.x * canvas.x + canvas.y * canvas.y
    gain = draws.uniform(0.82, 1.12) + fall * (canvas.x * light[0] + canvas.y * light[1])
    gain = gain - draws.uniform(0.0, 0.12) * radius
    warmth = draws.bell(0.0, 0.07)
    tint = torch.cat([1.0 + warmth, torch.ones_like(warmth), 1.0 - warmth], dim=1)[..., None]
    grain = texture_bank(canvas.size).grain(draws, canvas.size) * draws.uniform(0.005, 0.03)
    return image * (tint * gain[:, None]) + grain[:, None]
