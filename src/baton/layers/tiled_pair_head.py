"""A head that compares one vector per image with every cell of a map, as if the vector were tiled over the map."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.layers.conv_relu import ConvReLU


class TiledPairHead(nn.Module):
    """1×1 convolutions over a map of patch embeddings, concatenated with an image embedding tiled over the map.

    The first convolution of a concatenation is the sum of two, W [p, e] = W_p p + W_e e, so that the image's part is
    computed once an image instead of once a cell, and the patches' part once for all images they are paired with.
    Source: Pereyra and Szegedy, "Deep autoresolution networks" (2016), section 2: five convolutional layers, ReLU after
    all but the last.

    Args:
        patch_features: channels of the map.
        image_features: length of the image embedding.
        outputs: channels of the result.
        width: channels between the convolutions.
        depth: number of convolutions, at least 2.
        norm: BatchNorm before every ReLU.
    """

    def __init__(
        self,
        patch_features: int,
        image_features: int,
        outputs: int,
        width: int = 128,
        depth: int = 5,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.patch_features = patch_features
        self.first = nn.Conv2d(patch_features + image_features, width, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.middle = nn.Sequential(*(ConvReLU(width, width, 1, norm=norm) for _ in range(depth - 2)))
        self.last = nn.Conv2d(width, outputs, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.last.weight, std=0.01)

    def forward(
        self,
        patches: Float[Tensor, "b p gh gw"],
        images: Float[Tensor, "b e"],
        shifts: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "sb outputs gh gw"]:
        """Compare every image with its own patches, or with those of the images after it in the batch.

        Args:
            patches: patch embeddings, one for each cell.
            images: image embeddings.
            shifts: for each entry s, image i is paired with the patches of image (i + s) mod B.

        Returns:
            The pairs of the first shift, then those of the second, …
        """
        weight = self.first.weight  # (width, p + e, 1, 1)
        of_patches = F.conv2d(patches, weight[:, : self.patch_features], self.first.bias)
        of_images = F.linear(images, weight[:, self.patch_features :, 0, 0])[..., None, None]
        pairs = [(of_patches.roll(-shift, 0) if shift else of_patches) + of_images for shift in shifts]
        return self.last(self.middle(F.relu(self.norm(torch.cat(pairs) if len(pairs) > 1 else pairs[0]))))
