"""The encoder of the split-brain poster's baseline, a denoising autoencoder: `dae_encoder`.

Iyengar, Casabuena, Budhkar, "Split-Brain Autoencoders" (poster), in the layout of its public code: four convolutions of
4 x 4, stride 2 and padding 1 to 12, 24, 48 and 96 channels, a ReLU after each, no norm, PyTorch's initialisation. An
image of 96 pixels becomes a map of 6 x 6 cells. The decoder belongs to the task (`Denoising`, `decoder: transposed`).
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from baton.backbones.plain import Conv, PlainNetwork
from baton.backbones.staged import check_options

WIDTHS = (12, 24, 48, 96)


class DAEEncoder(PlainNetwork):
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
        stages = {f"conv{number}": [Conv(out, 4, 2, 1)] for number, out in enumerate(WIDTHS, start=1)}
        channels = self._add_stages(stages, in_chans, width, norm=False, device=device, dtype=dtype)
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
