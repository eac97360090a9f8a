"""Convolutions whose weight is a scaled identity plus a filter: the Dirac parameterisation.

Zagoruyko and Komodakis, "DiracNets: Training Very Deep Neural Networks Without Skip-Connections" (arXiv:1706.00388,
version 2); Zagoruyko's thesis, section 5.3.1. Folded into a plain convolution by `baton.layers.fold`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

#: What a filter's length is at least, so that a filter of zeros can be divided by it.
EPS = 1e-12


class DiracConv2d(nn.Conv2d):
    """Convolution with the weight diag(a) I + diag(b) W / ||W||, without bias: (B, in, H, W) to (B, out, H', W').

    I is the Dirac delta: one at the centre tap from channel i to channel i, for the first min(in, out) channels, else
    zero (eq. 5.2), so that I * x = x for as many outputs as inputs; further outputs have no identity. ||W|| is the
    Euclidean length of each filter, over all input channels and taps, and at least 1e-12. a and b have one entry an
    output channel; they start at 1.0 and 0.1 (eq. 5.5 and the text below it) and must not decay towards zero: exclude
    what `scale_names` names.

    Where paper and published code disagree, the code is followed, with which the published numbers were made: W is
    Kaiming normal over the fan-in, standard deviation sqrt(2 / fan-in), while the paper says N(0, 1). As W is
    normalised, only its direction and its effective learning rate depend on this; `init_std=1.0` is the paper's.

    Args:
        in_channels: channels that enter.
        out_channels: channels that leave.
        kernel_size: odd, so that there is a centre.
        stride: step in pixels; the identity then takes every stride-th pixel.
        padding: zeros at each border; half the kernel keeps the side at stride 1.
        normalize: divide W by its length and scale it by b (eq. 5.5); without it the weight is diag(a) I + W (eq. 5.4).
        scaled: learn a; without it the weight is I + W, of the initialisation study (section 5.3.3).
        init_std: standard deviation of W's normal distribution, whatever the filter's shape; None is the code's.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for an even kernel, and for an `init_std` that W cannot start from.
    """

    a: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        normalize: bool = True,
        scaled: bool = True,
        init_std: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False, **placed)
        if not all(size % 2 for size in self.kernel_size):
            raise ValueError(f"Expected an odd kernel_size, which has a centre, but got {kernel_size}.")
        if init_std is not None and (init_std < 0 or (normalize and init_std == 0)):
            allowed = "above 0, because filters of zeros have no direction" if normalize else "of 0 or more"
            raise ValueError(f"Expected init_std {allowed}, but got {init_std}.")
        self.init_std = init_std
        self.register_parameter("a", nn.Parameter(torch.empty(out_channels, **placed)) if scaled else None)
        self.register_parameter("b", nn.Parameter(torch.empty(out_channels, **placed)) if normalize else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W afresh and set a to 1.0 and b to 0.1."""
        if "b" not in self._parameters:
            return  # the parent's constructor asks before there are scales
        if self.init_std is None:
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        else:
            nn.init.normal_(self.weight, std=self.init_std)
        for scale, value in ((self.a, 1.0), (self.b, 0.1)):
            if scale is not None:
                nn.init.constant_(scale, value)

    def effective_weight(self) -> Float[Tensor, "out_channels in_channels kernel_height kernel_width"]:
        """The weight that the input is convolved with."""
        if torch.compiler.is_exporting():
            return _compose_densely(self.weight, self.a, self.b)
        return _Compose.apply(self.weight, self.a, self.b)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Convolve with the effective weight."""
        return self._conv_forward(x, self.effective_weight(), None)

    def extra_repr(self) -> str:
        """Say which terms there are."""
        return f"{super().extra_repr()}, normalize={self.b is not None}, scaled={self.a is not None}"


def scale_names(model: nn.Module) -> set[str]:
    """Names of all a and b in a network, which weight decay must spare."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DiracConv2d)]
    return {
        f"{name}.{scale}".removeprefix(".")
        for name, layer in layers
        for scale in ("a", "b")
        if getattr(layer, scale) is not None
    }


class _Compose(torch.autograd.Function):
    """diag(a) I + diag(b) W / ||W|| and its gradient, in as few passes over W as there can be.

    With u = W / ||W|| and G the gradient of the result: b's gradient is <G, u> for each filter, W's is
    b / ||W|| (G - <G, u> u), a's the diagonal of G's centre tap.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        if b is None:
            length, result = None, weight.clone()
        else:
            length = _length(weight)
            result = weight * _filters(b / length)
        ctx.save_for_backward(weight, b, length)
        diagonal = _diagonal(result)
        diagonal += 1 if a is None else a[: len(diagonal)]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, b, length = ctx.saved_tensors
        of_weight = of_a = of_b = None
        if ctx.needs_input_grad[1]:
            diagonal = _diagonal(grad)
            of_a = F.pad(diagonal, (0, len(grad) - len(diagonal)))
        if b is None:
            return grad, of_a, None
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which must know where the length is from
            length = _length(weight)
        of_b = (grad * weight).sum((1, 2, 3)) / length
        if ctx.needs_input_grad[0]:
            scale = b / length
            of_weight = grad * _filters(scale)
            of_weight.addcmul_(weight, _filters(scale * of_b / length), value=-1)
        return of_weight, of_a, of_b


def _compose_densely(weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The same with a dense delta and nothing in place, which exported graphs cannot have."""
    delta = torch.eye(*weight.shape[:2], dtype=weight.dtype, device=weight.device)
    delta = delta if a is None else a[:, None] * delta
    height, width = (size // 2 for size in weight.shape[2:])
    filters = weight if b is None else weight * _filters(b / _length(weight))
    return F.pad(delta[:, :, None, None], (width, width, height, height)) + filters


def _length(weight: Tensor) -> Tensor:
    """Euclidean length of each filter."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3)).clamp_min(EPS)


def _filters(vector: Tensor) -> Tensor:
    """One value a filter, to be multiplied with the weight."""
    return vector.view(-1, 1, 1, 1)


def _diagonal(weight: Tensor) -> Tensor:
    """View of the centre tap from channel i to channel i, (min(in, out),)."""
    return weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2].diagonal()
