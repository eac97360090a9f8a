"""What somebody knows about colours who has seen training images but not the one in question."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from baton.ssl_tasks.color_quantizer import ColorQuantizer


class ColorPrior(nn.Module):
    """The mean colour and the frequencies of a quantizer's classes over training images: answers to compare with.

    Until `learn` was called the mean is the middle of the bins and all classes are equally frequent.

    Args:
        quantizer: whose classes are counted.

    Attributes:
        mean: (3,) per channel, as a place between the outer edges of an image's bins: 0 is the lower, 1 the upper one.
        first: (n,) frequencies of the first channel's classes; they sum to one.
        rest: (m,) frequencies of the other two channels' joint classes.
    """

    mean: Tensor
    first: Tensor
    rest: Tensor

    def __init__(self, quantizer: ColorQuantizer) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), 0.5))
        for name, count in zip(("first", "rest"), quantizer.num_classes, strict=True):
            self.register_buffer(name, torch.full((count,), 1 / count))

    def learn(self, quantizer: ColorQuantizer, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> None:
        """Take mean and frequencies from images in [0, 1], every class once more than it was seen.

        In `lab_gamut` a cell counts for several classes, by its soft target.

        Args:
            quantizer: the one of the constructor.
            batches: of images; none leaves everything as it is.
        """
        places, images = self.mean.new_zeros(3, dtype=torch.float64), 0
        counts = [torch.ones_like(part, dtype=torch.float64) for part in (self.first, self.rest)]
        for batch in batches:
            small = quantizer.channels(batch)
            low, high = quantizer.bounds(small)
            places += ((small.mean((2, 3)) - low) / (high - low)).double().sum(0)
            images += len(batch)
            for count, classes in zip(counts, quantizer.quantize(small), strict=True):
                weights = torch.ones_like(classes, dtype=torch.float64)
                if quantizer.space == "lab_gamut" and count is counts[1]:
                    soft, classes = quantizer.soft(small)
                    weights = soft.double()
                count.index_add_(0, classes.flatten(), weights.flatten())
        if images:
            self.mean.copy_(places / images)
            for part, count in zip((self.first, self.rest), counts, strict=True):
                part.copy_(count / count.sum())

    def answer(
        self, quantizer: ColorQuantizer, small: Float[Tensor, "b 3 s s"]
    ) -> tuple[Float[Tensor, "b 3 s s"], tuple[Float[Tensor, "b n s s"], Float[Tensor, "b m s s"]]]:
        """The mean colour, and the frequencies' logarithms as logits of every cell.

        Args:
            quantizer: the one of the constructor.
            small: images from `quantizer.channels`, whose ranges `lab_rescaled` takes.
        """
        low, high = (bound[:, :, None, None] for bound in quantizer.bounds(small))
        mean = low + self.mean.to(small).view(1, 3, 1, 1) * (high - low)
        first, rest = (part.log().view(1, -1, 1, 1).expand(len(small), -1, *small.shape[2:]) for part in
                       (self.first, self.rest))  # fmt: skip
        return mean.expand_as(small), (first, rest)

    def rebalancing(self, uniform: float) -> Float[Tensor, " m"]:
        """Weights of the joint classes that let rare colours count: 1 / ((1 - γ) frequency + γ / m), of mean one.

        The mean is over the training images' cells. Source: Zhang, Isola, Efros, "Colorful image colorization" (2016),
        section 2.2; their code has γ = 0.5.

        Args:
            uniform: γ, between 0 and 1; with 1 all classes weigh the same.
        """
        weights = 1 / ((1 - uniform) * self.rest + uniform / len(self.rest))
        return weights / (weights * self.rest).sum()
