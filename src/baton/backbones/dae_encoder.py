"""The encoder of the split-brain poster's baseline, a denoising autoencoder: `dae_encoder`.

Iyengar, Casabuena, Budhkar, "Split-Brain Autoencoders" (poster), in the layout of its public code: four convolutions of
4 x 4, stride 2 and padding 1 to 12, 24, 48 and 96 channels, a ReLU after each, no norm, PyTorch's initialisation. An
image of 96 pixels becomes a map of 6 x 6 cells. The decoder belongs to the task (`Denoising`, `decoder: transposed`).
"""

from typing import Any

import torch
from jaxtyping import Float
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from baton.backbones.staged import StagedNetwork, check_options, scaled_width

WIDTHS = (12, 24, 48, 96)


class DAEEncoder(StagedNetwork):
    """Convolutions that halve the image (odd sides are rounded down): (B, C, H, W) to (B, 96, H // 16, W // 16).

    Args:
        width: multiplier of all widths.
        drop_rate: dropout before the classifier.
        num_classes: size of the classifier's output; 0 leaves the classifier out.
        in_chans: image channels.
        global_pool: timm's pooling type, or `map6`; `""` keeps the map and needs `num_classes=0`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: for a width, drop rate or pooling that cannot be built, and for images that are too small.
    """

    def __init__(
        self,
        width: float = 1.0,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(width, drop_rate)
        channels, names = in_chans, []
        self.feature_info = []
        for number, unscaled in enumerate(WIDTHS, start=1):
            out, name = scaled_width(unscaled, width), f"conv{number}"
            conv = nn.Conv2d(channels, out, 4, 2, 1, device=device, dtype=dtype)
            self.add_module(name, nn.Sequential(conv, nn.ReLU()))
            self.feature_info.append({"num_chs": out, "reduction": 2**number, "module": name})
            names.append(name)
            channels = out
        self.stage_names = tuple(names)
        self._finish(channels, num_classes, global_pool, drop_rate)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights afresh, as PyTorch does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()

    @torch.jit.ignore
    def init_classifier(self, linear: nn.Linear) -> None:
        """Draw the classifier as PyTorch does."""
        linear.reset_parameters()

    def begin(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Refuse images of which the halvings leave nothing."""
        needed = self.feature_info[-1]["reduction"]
        if min(x.shape[2:]) < needed:
            raise ValueError(
                f"Expected images of at least {needed} pixels a side, but got {x.shape[2]} x {x.shape[3]}; use larger "
                "ones."
            )
        return x


default_cfgs = generate_default_cfgs(
    {
        "dae_encoder": {
            "num_classes": 1000,
            "input_size": (3, 96, 96),
            "pool_size": (6, 6),
            "fixed_input_size": False,
            "min_input_size": (3, 16, 16),
            "crop_pct": 1.0,
            "mean": (0.0, 0.0, 0.0),  # pixels in [0, 1], as the code has them
            "std": (1.0, 1.0, 1.0),
            "first_conv": "conv1.0",
            "classifier": "fc",
            "paper_name": "Split-Brain Autoencoders (poster)",
        }
    }
)


@register_model
def dae_encoder(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The poster's four convolutions: 97,524 parameters without a classifier."""
    indices = tuple(range(len(WIDTHS)))
    return build_model_with_cfg(DAEEncoder, "dae_encoder", pretrained, feature_cfg={"out_indices": indices}, **kwargs)
