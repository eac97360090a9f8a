"""Max-pooling that tells where its maxima were, and its approximate inverse: the layers of SAE and SWWAE."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

Size = int | tuple[int, int]


class Switches(NamedTuple):
    """What a max-pooling must tell its inverse. Nothing in it has a gradient.

    The indices are the tensor that the pooling keeps for its own backward: while a graph lives, they cost nothing more.
    """

    #: Flat position (row · width + column) of each maximum in its channel, as `F.max_pool2d` gives it.
    indices: Int64[Tensor, "b c oh ow"]
    #: Size of the map that was pooled.
    height: int
    width: int
    #: Windows, (vertical, horizontal).
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


class SwitchedMaxPool2d(nn.Module):
    """`F.max_pool2d`, bit for bit, together with its switches.

    Of equal values the first of the window in reading order is the maximum; padding never is one.

    Args:
        kernel_size: size of a window, one number or (vertical, horizontal), like the next two.
        stride: from window to window; `None`: as `kernel_size`.
        padding: of minus infinity around the map, at most half the kernel.
        ceil_mode: whether a window may hang over the right and lower edge, so that no pixel is left out.
    """

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
    ) -> None:
        super().__init__()
        self.kernel = _pair(kernel_size)
        self.stride = self.kernel if stride is None else _pair(stride)
        self.padding = _pair(padding)
        self.ceil_mode = ceil_mode

    @classmethod
    def like(cls, pool: nn.MaxPool2d) -> "SwitchedMaxPool2d":
        """Pool as a module of an encoder does, so that the encoder need not be changed for its switches to be had.

        `return_indices` is ignored: the indices are always returned.

        Raises:
            ValueError: `pool` is dilated, or computes something else than `nn.MaxPool2d` (a subclass).
        """
        if type(pool).forward is not nn.MaxPool2d.forward:
            raise ValueError(
                f"Expected an nn.MaxPool2d, but {type(pool).__name__} computes its own forward: "
                "replace it with an nn.MaxPool2d in the encoder."
            )
        if _pair(pool.dilation) != (1, 1):
            raise ValueError(
                f"Expected a max-pooling of dilation 1, but got dilation={pool.dilation}: "
                "the pixels of a dilated window do not lie together; use an encoder without one."
            )
        return cls(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c oh ow"], Switches]:
        """Pool, and say where the maxima were."""
        pooled, indices = F.max_pool2d(
            x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode, return_indices=True
        )
        return pooled, Switches(indices, x.shape[-2], x.shape[-1], self.kernel, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Describe the windows."""
        return f"kernel={self.kernel}, stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"


class SwitchedUnpool2d(nn.Module):
    """Put every pooled value back at one pixel of its window; all other pixels are zero.

    `known` takes the pixel where the maximum was (SWWAE: Zhao et al., "Stacked what-where auto-encoders", 2015, after
    Zeiler and Fergus, 2014). `fixed` takes pixel kernel // 2 of the window in both axes, counted from 0: of a 2×2
    window the lower right one, as the code published with the SAE and SWWAE of Zhang et al. (2016) does.

    The fixed pixel of a window that hangs over an edge may lie outside the map: it is moved to the nearest pixel
    inside, because dropping it would lose what that window saw (the last row and column of an odd map, in ceil mode).
    Where n values meet at one pixel (the windows overlap, or such a move) their mean is written, as in the published
    code: their sum over n. Half precision is summed in float32.

    On a GPU the means of three and more values may differ in the last bit from run to run, unless
    `torch.use_deterministic_algorithms` is on; everything else is the same in every run.

    Args:
        mode: `"known"` or `"fixed"`.

    Raises:
        ValueError: there is no such mode.
    """

    def __init__(self, mode: str = "known") -> None:
        super().__init__()
        if mode not in ("known", "fixed"):
            raise ValueError(f"Expected mode 'known' or 'fixed', but got {mode!r}.")
        self.mode = mode

    def forward(self, pooled: Float[Tensor, "b c oh ow"], switches: Switches) -> Float[Tensor, "b c h w"]:
        """Give a map of the size that was pooled, in the type and memory format of `pooled`.

        Args:
            pooled: a map of the pooled size, not necessarily of the pooled values.
            switches: of the pooling to invert. Where they are of one image or of one channel, they serve all of
                `pooled`.

        Raises:
            ValueError: `pooled` is not of the size that `switches` are of.
        """
        indices, height, width, *_ = switches
        if not _serves(indices.shape, pooled.shape):
            raise ValueError(
                f"Expected a map of {_times(indices.shape)}, the size of the switches (batch, channels, height, "
                f"width), but got {_times(pooled.shape)}: unpool a map as large as the pooled one, or with switches "
                "of one image or channel, which serve all."
            )
        if self.mode == "known":
            meet = any(kernel > stride for kernel, stride in zip(switches.kernel, switches.stride, strict=True))
            places = indices.flatten(2)
        else:
            meet = _fixed_places_meet(switches)
            places = _fixed_places(switches)
        values = pooled.flatten(2)  # (b, c, oh·ow)
        if meet:
            return _write_means(values, places, height * width).unflatten(2, (height, width))
        return _write(values, places, height * width).unflatten(2, (height, width))

    def extra_repr(self) -> str:
        """Name the mode."""
        return f"mode={self.mode!r}"


def _pair(size: Size) -> tuple[int, int]:
    """Read one number for both axes, or one for each."""
    if isinstance(size, int):
        return size, size
    vertical, horizontal = size
    return vertical, horizontal


def _times(shape: torch.Size) -> str:
    return "×".join(str(size) for size in shape)


def _serves(switches: torch.Size, pooled: torch.Size) -> bool:
    """Whether every value has a switch: the same map, and batch and channels that are the same or one."""
    of_all = zip(switches[:-2], pooled[:-2], strict=False)
    return len(switches) == len(pooled) and switches[-2:] == pooled[-2:] and all(s in (1, p) for s, p in of_all)


def _fixed_places(switches: Switches) -> Int64[Tensor, "1 1 places"]:
    """Flat position of pixel kernel // 2 of each window, moved into the map.

    A padding is at most half a kernel, so that only the right and lower edges can be passed.
    """
    axes = []
    sizes = (switches.height, switches.width)
    for axis, size in enumerate(sizes):
        windows = switches.indices.shape[2 + axis]
        first = switches.kernel[axis] // 2 - switches.padding[axis]
        place = torch.arange(windows, device=switches.indices.device) * switches.stride[axis] + first
        axes.append(place.clamp(max=size - 1))
    rows, columns = axes
    return (rows[:, None] * switches.width + columns).view(1, 1, -1)


def _fixed_places_meet(switches: Switches) -> bool:
    """Whether the last window but one already has its place at the edge, where the last one's is."""
    for axis, size in enumerate((switches.height, switches.width)):
        windows = switches.indices.shape[2 + axis]
        first = switches.kernel[axis] // 2 - switches.padding[axis]
        if windows > 1 and first + (windows - 2) * switches.stride[axis] >= size - 1:
            return True
    return False


def _zeros(values: Float[Tensor, "b c places"], pixels: int, dtype: torch.dtype) -> Float[Tensor, "b c pixels"]:
    """Make the map to write in, channels last in memory if the values are.

    Not a view of anything: autograd would copy the gradient of what is written into a view.
    """
    batch, channels, _ = values.shape
    last = values.stride(1) == 1 and values.stride(2) == channels > 1
    strides = (pixels * channels, 1, channels) if last else (pixels * channels, pixels, 1)
    return torch.empty_strided((batch, channels, pixels), strides, dtype=dtype, device=values.device).zero_()


def _write(
    values: Float[Tensor, "b c places"], places: Int64[Tensor, "_b _c places"], pixels: int
) -> Float[Tensor, "b c pixels"]:
    """Write each value at its place, where no two have the same.

    About as fast as `F.max_unpool2d` (forward and backward, on a CPU), which refuses deterministic algorithms.
    """
    return _zeros(values, pixels, values.dtype).scatter_(2, places.expand_as(values), values)


def _write_means(
    values: Float[Tensor, "b c places"], places: Int64[Tensor, "_b _c places"], pixels: int
) -> Float[Tensor, "b c pixels"]:
    """Write at each place the mean of its values."""
    summed = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    ones = summed.new_ones(()).expand(places.shape)
    writers = summed.new_zeros((*places.shape[:2], pixels)).scatter_add_(2, places, ones)
    # each value is divided before the sum, so that backward keeps a number a value, not one a pixel
    shares = summed / writers.gather(2, places)
    means = _zeros(values, pixels, shares.dtype).scatter_add_(2, places.expand_as(shares), shares)
    return means.to(values.dtype)
