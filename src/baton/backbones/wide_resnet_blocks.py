"""The residual blocks of Wide ResNets, B(M) for a list M of kernel sizes, and how they make up a depth.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv:1605.07146); chapter 5.2.1 of Zagoruyko's thesis.
With Dirac parameterisation: chapter 5.3.3.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.layers.dirac import DiracConv2d

#: Weights of convolutions: I + W (the thesis's initialisation study), diag(a) I + W (eq. 5.4), or with W / ||W|| scaled
#: by b (eq. 5.5).
DiracForm = Literal["identity", "scaled", "normalized"]


def parse_block(block: str | Sequence[int]) -> tuple[int, ...]:
    """Kernel sizes of the convolutions in a residual block, the thesis's B(M).

    Args:
        block: kernel sizes such as `(3, 1, 3)`, or a text such as `"3,1,3"` or `"B(3,1,3)"`.

    Raises:
        ValueError: if it is not a non-empty list of the kernel sizes 1 and 3.
    """
    if isinstance(block, str):
        text = re.fullmatch(r"\s*(?:B?\s*\(([^()]*)\)|([^()]*))\s*", block)
        words = (text[1] or text[2] or "").split(",") if text else []
        sizes = tuple(int(word) if word.strip().isdecimal() else 0 for word in words if word.strip())
    else:
        sizes = tuple(block)
    if not sizes or any(size not in (1, 3) for size in sizes):
        raise ValueError(
            f"Expected block as a list of kernel sizes 1 and 3, such as (3, 3) or 'B(3,1,3)', but got {block!r}."
        )
    return sizes


def blocks_per_group(depth: int, block: Sequence[int], depth_rule: Literal["paper", "convolutions"] = "paper") -> int:
    """Number n of residual blocks in each of the three groups, from depth = 3 n c + 4.

    c is the number of convolutions that a block counts for. `"convolutions"` counts them all, as the text of the thesis
    defines depth. The tables of the thesis do not: table 5.3 (uniform blocks (3,)*l, all of 2.2M parameters) has c = l,
    but the parameter counts of table 5.2 hold only if every block that mixes kernel sizes counts as two, that is
    n = (depth - 4) / 6. `"paper"` follows the tables. The rules differ for B(1,3,1), B(3,1,1) and B(3,1,3) alone; for
    width 2 and 10 classes:

        block     depth   table   "paper"            "convolutions"
        B(1,3,1)  40      1.4M    n = 6, 1,429,082   n = 4,   953,306
        B(3,1,1)  40      1.3M    n = 6, 1,343,066   n = 4,   867,290
        B(3,1,3)  22      1.1M    n = 3, 1,145,498   n = 2,   735,578

    Args:
        depth: the first number of a name WRN-depth-width.
        block: kernel sizes of the convolutions in one block.
        depth_rule: how a block of mixed kernel sizes counts.

    Raises:
        ValueError: if no whole number of blocks gives this depth; names the nearest depths that work.
    """
    if depth_rule not in ("paper", "convolutions"):
        raise ValueError(f"Expected depth_rule 'paper' or 'convolutions', but got {depth_rule!r}.")
    mixed = len(set(block)) > 1
    counted = 2 if mixed and depth_rule == "paper" else len(block)
    step = 3 * counted
    n, remainder = divmod(depth - 4, step)
    if n >= 1 and remainder == 0:
        return n
    below = 4 + step * max(n, 1)
    nearest = f"{below} and {below + step}" if n >= 1 else f"{below}"
    raise ValueError(
        f"Expected a depth of {step}n + 4 (3 groups of n blocks B({','.join(map(str, block))}) that count for "
        f"{counted} convolution{'s' if counted > 1 else ''} each, plus 4; depth_rule={depth_rule!r}), but got {depth}; "
        f"the nearest valid depth{'s are' if n >= 1 else ' is'} {nearest}."
    )


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dirac: DiracForm | None = None,
    init_std: float | None = None,
    **placed: Any,
) -> nn.Conv2d:
    """A convolution without bias that keeps the side at stride 1.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        kernel_size: 1 or 3.
        stride: step in pixels.
        dirac: form of a Dirac convolution's weight; None for an ordinary one.
        init_std: of a Dirac convolution, see `DiracConv2d`.
        **placed: `device` and `dtype` of the parameters.

    Raises:
        ValueError: for another form.
    """
    padding = kernel_size // 2
    if dirac is None:
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False, **placed)
    if dirac not in ("identity", "scaled", "normalized"):
        raise ValueError(f"Expected dirac None, 'identity', 'scaled' or 'normalized', but got {dirac!r}.")
    normalize, scaled = dirac == "normalized", dirac != "identity"
    return DiracConv2d(
        in_channels, out_channels, kernel_size, stride, padding, normalize, scaled, init_std=init_std, **placed
    )


class WideBlock(nn.Module):
    """Pre-activation residual block of constant width: BatchNorm, ReLU, convolution, repeated for each kernel size.

    With dropout, every convolution but the first sees its input through it (after BatchNorm and ReLU). Where the number
    of channels changes, the shortcut is a bare 1×1 convolution that shares the first BatchNorm and ReLU with the
    residual branch; elsewhere the raw input is added.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave, and the width of every convolution.
        kernel_sizes: 1 or 3 for each convolution.
        stride: of the first convolution and of the projection.
        drop_rate: dropout probability between convolutions.
        dirac: form of the weights of all convolutions, see `convolution`.
        init_std: of Dirac convolutions.
        device: where the parameters are made.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (3, 3),
        stride: int = 1,
        drop_rate: float = 0.0,
        dirac: DiracForm | None = None,
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        made: dict[str, Any] = {"dirac": dirac, "init_std": init_std, "device": device, "dtype": dtype}
        widths = (in_channels, *(out_channels for _ in kernel_sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(w, device=device, dtype=dtype) for w in widths[:-1])
        self.convs = nn.ModuleList(
            convolution(a, b, k, stride if i == 0 else 1, **made)
            for i, (k, (a, b)) in enumerate(zip(kernel_sizes, pairwise(widths), strict=True))
        )
        self.projection: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.projection = convolution(in_channels, out_channels, 1, stride, **made)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Residual branch plus shortcut; the input is left unchanged, so that it can serve as a feature."""
        shortcut = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = F.relu(norm(x))
            if i == 0 and self.projection is not None:
                shortcut = self.projection(x)
            if i > 0 and self.drop_rate > 0:
                x = F.dropout(x, self.drop_rate, self.training)
            x = conv(x)
        return x + shortcut
