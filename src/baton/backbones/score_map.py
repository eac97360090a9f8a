"""Score maps: a classifier that was trained on square crops, applied as a convolution to images of any shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vgg import ConvMlp
from torch import Tensor, nn

from baton.backbones.headed import MapPool


class AveragedScoreMap:
    """Class scores of whole images: the network's classifier slides over the last map, and its scores are averaged.

    The first layer behind the last map looks at a window of it. As a convolution with stride 1 it gives an image that
    is larger than a crop a map of scores, one for each place of the window. Which window depends on the network:

        timm's VGGs             7 × 7 cells: their first fully connected layer is such a convolution already
        global average pooling  one cell, seen by the linear classifier: average of the scores = scores of the average
        `global_pool: map6`     the S × S cells of a crop's map, each of the 6 × 6 inputs of the linear classifier being
                                an average over k × k of them, k = S / 6

    In the last case the scores at (y, x) are `bias + Σ_ij weight_ij · A[y + i k, x + j k]`, where A holds the averages
    over k × k cells at stride 1: a convolution of A with dilation k. Linear as they are in A, their average over all
    places is the classifier applied to averages of A, and is computed in this way.

    An image of exactly a crop's size gets the scores that the network itself gives it. Networks are looked at, not
    changed, and run in the mode in which they are: for scores that do not depend on chance, in evaluation mode.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015),
    section 3.2; "Convolution" in the slides of Zhang, Lee, Lee (ICML 2016).

    Args:
        network: a timm model with a linear classifier, that takes images of any shape.
        side: of the crops, in pixels.

    Raises:
        ValueError: the network has another classifier, takes one size alone, pools in another way, or its map of a
            crop is not made of the windows above.
    """

    def __init__(self, network: Any, side: int) -> None:
        self.network, self.side = network, side
        classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
        if not isinstance(classifier, nn.Linear):
            found = "none" if classifier is None else type(classifier).__name__
            raise ValueError(f"Expected a backbone with a linear classifier, but {self._name} has {found}.")
        self.classifier = classifier
        if (getattr(network, "pretrained_cfg", None) or {}).get("fixed_input_size"):
            raise self._unfit("one fixed size")
        with torch.no_grad(), _evaluating(network):
            height, width, channels = self._measure()
            if isinstance(self._pool, MapPool):
                self._cells = self._window(height)
            else:
                self._check_average(height, width, channels)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Average the score maps of normalised images, which have at least a crop's size.

        Raises:
            ValueError: the images are smaller than a crop.
        """
        if min(images.shape[2:]) < self.side:
            raise ValueError(
                f"Expected images of at least {self.side} x {self.side} pixels, the crops' size, but got "
                f"{images.shape[2]} x {images.shape[3]}: resize them to a larger shorter side."
            )
        features = self._features(images)
        if not isinstance(self._pool, MapPool):
            return self.network.forward_head(features)  # (b, f, gh, gw) of any size
        height, width = (side - self._pool.grid * self._cells + 1 for side in features.shape[2:])  # places
        averages = F.avg_pool2d(features, self._cells, stride=1)
        inputs = F.avg_pool2d(averages, (height, width), stride=self._cells)  # (b, f, grid, grid)
        return self.classifier(inputs.flatten(1))

    @property
    def _name(self) -> str:
        config = getattr(self.network, "pretrained_cfg", None) or {}
        return config.get("architecture") or type(self.network).__name__

    @property
    def _pool(self) -> Any:
        return getattr(self.network, "global_pool", None)

    def _features(self, images: Tensor) -> Tensor:
        # A network that `torch.compile` made fast for one size would be compiled again for each of the others.
        return type(self.network).forward_features(self.network, images)

    def _measure(self) -> tuple[int, int, int]:
        """Height, width and channels of the map of an image that is a crop in height and one pixel wider."""
        weight = next(self.network.parameters())
        images = torch.zeros(1, 3, self.side, self.side + 1, device=weight.device, dtype=weight.dtype)
        try:
            features = self._features(images)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise self._unfit(f"refused {self.side} x {self.side + 1} pixels ({reason})") from error
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise self._unfit("other features than a map")
        return features.shape[2], features.shape[3], features.shape[1]

    def _window(self, height: int) -> int:
        """Cells of a crop's map, a side, that one input of the classifier is the average of."""
        grid = self._pool.grid
        if height % grid:
            raise ValueError(
                f"Expected crops whose map has a multiple of {grid} cells a side, because {self._name} pools it to "
                f"{grid} x {grid}, but crops of {self.side} pixels give {height}: use another size."
            )
        return height // grid

    def _check_average(self, height: int, width: int, channels: int) -> None:
        """Try on random numbers that the classifier sees a mean over the map: pooling has many names."""
        before = getattr(self.network, "pre_logits", None)
        if isinstance(before, ConvMlp) and height < before.input_kernel_size:  # which would silently enlarge the map
            raise ValueError(
                f"Expected crops whose map has at least {before.input_kernel_size} cells a side, the kernel of "
                f"{self._name}'s first fully connected layer, but crops of {self.side} pixels give {height}: use "
                "larger ones."
            )
        weight = self.classifier.weight
        draw = torch.rand(1, channels, max(height, 2), max(width, 2), generator=torch.Generator().manual_seed(0))
        features = draw.to(weight.device, weight.dtype)  # several cells: of one, any pooling is the mean
        try:
            pooled = self.network.forward_head(features, pre_logits=True).float()
        except RuntimeError as error:
            raise self._unfit("another head") from error
        expected = (before(features) if isinstance(before, ConvMlp) else features).float().mean((2, 3))
        if pooled.shape != expected.shape or not torch.allclose(pooled, expected, rtol=1e-2, atol=1e-3):
            raise self._unfit("another head")

    def _unfit(self, found: str) -> ValueError:
        return ValueError(
            f"Expected a backbone that takes images of any shape and whose linear classifier sees their last map or "
            f"its average, but {self._name} has {found}: choose another, or measure crops alone."
        )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
