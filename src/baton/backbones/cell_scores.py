"""Scores of every cell: a network's head, which sees the last map pooled, applied to each of the map's cells alone."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from baton.backbones.headed import HeadedNetwork, MapPool


def check_scores_cells(network: Any) -> None:
    """Refuse a network whose classifier cannot be applied to one cell.

    Args:
        network: a timm model with a classifier.

    Raises:
        ValueError: its classifier is not one linear layer (or a convolution of one pixel), sees where in the map
            features are, or it has no map at all.
    """
    name = _name(network)
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
    if not isinstance(classifier, nn.Linear) and not (
        isinstance(classifier, nn.Conv2d) and set(classifier.kernel_size) == {1}
    ):
        raise ValueError(
            f"Expected a backbone with a linear classifier, but {name} has {type(classifier).__name__}: choose another."
        )
    pool = getattr(network, "global_pool", None)
    if isinstance(pool, MapPool):
        raise ValueError(
            f"Expected a backbone whose classifier can score one cell of the last map, but that of {name} sees "
            f"{pool.grid} x {pool.grid} cells at once (global_pool={pool.pool_type!r}): leave global_pool out."
        )
    if not isinstance(network, HeadedNetwork) and not hasattr(network, "forward_intermediates"):
        raise ValueError(f"Expected a backbone with a spatial map, but {name} gives none: choose another.")


def cell_scores(
    network: Any, images: Float[Tensor, "b channels height width"]
) -> Float[Tensor, "b classes map_height map_width"]:
    """Class scores of every cell of the last map: what the head makes of a map that is this cell alone.

    For a head of global average pooling and a linear classifier it is the classifier as a 1 x 1 convolution, and the
    average of the scores over the cells is what the network itself answers. The rest of a head is applied as well:
    dropout, the norm of ConvNeXts, the hidden layer of MobileNetV3. Networks whose features are tokens (ViT) are
    asked for their last map by `forward_intermediates`, behind their final norm, and each of its cells goes through
    `fc_norm`, where there is one, and the classifier.

    Networks without padding have maps that lack the image's border.

    Args:
        network: a timm model that passed `check_scores_cells`.
        images: normalised.

    Raises:
        ValueError: the last map has other channels than the classifier.
    """
    classifier = network.get_classifier()
    if isinstance(network, HeadedNetwork):
        features = network.forward_features(images)
        if isinstance(classifier, nn.Linear) and classifier.in_features == features.shape[1]:
            return F.conv2d(network.head_drop(features), classifier.weight[:, :, None, None], classifier.bias)
        return _head_of_cells(network, features)
    try:
        features, maps = network.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW")
    except AssertionError as error:  # how timm refuses an option
        raise ValueError(f"The backbone {_name(network)} gives no last map ({error}): choose another.") from error
    if features.ndim == 4 and network.num_features in (features.shape[1], features.shape[3]):
        return _head_of_cells(network, features)
    cells = maps[-1].permute(0, 2, 3, 1)  # (b, map_height, map_width, channels)
    if not isinstance(classifier, nn.Linear) or classifier.in_features != cells.shape[3]:
        raise ValueError(
            f"Expected a backbone whose classifier sees the channels of its last map, but the map of {_name(network)} "
            f"has {cells.shape[3]} and its classifier is {classifier}: choose another."
        )
    for part in ("fc_norm", "head_drop"):
        cells = getattr(network, part, nn.Identity())(cells)
    return classifier(cells).permute(0, 3, 1, 2)


def _head_of_cells(network: Any, features: Tensor) -> Tensor:
    channels_last = features.shape[1] != network.num_features
    cells = features if channels_last else features.permute(0, 2, 3, 1)
    batch, height, width, channels = cells.shape
    one = (1, 1, channels) if channels_last else (channels, 1, 1)
    return network.forward_head(cells.reshape(-1, *one)).view(batch, height, width, -1).permute(0, 3, 1, 2)


def _name(network: Any) -> str:
    config = getattr(network, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(network).__name__
