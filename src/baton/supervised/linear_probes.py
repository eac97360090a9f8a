"""Linear probes of every stage of a frozen backbone: which of its maps makes the classes easiest to tell apart?"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from baton.data.images import Batch
from baton.labels import data_of, find_classes, top_accuracies, with_errors
from baton.task import Task

#: Training images, spread evenly over the data, of which the probes' means and variances are taken.
LOOKED_AT = 5000
#: Beside the variance, as in BatchNorm.
EPSILON = 1e-5


class LinearProbes(Task):
    """Train one linear classifier on the map of every stage of a frozen backbone, all at once.

    Each map is averaged to a square grid and standardised channel by channel, and a linear layer (zero at first) gives
    the class scores; the loss is the sum of the stages' cross-entropies. Probes share nothing, so each learns as if
    alone (unless gradients are clipped by their common norm). The backbone stays in evaluation mode and bit-identical.

    Stages are numbered from 1 in the order of the backbone's `feature_info`, and metrics end with the stage:
    `val/error_stage1`. There is none of the best stage: to choose it on the test split is to train on it. Unlike
    `Classification`'s `linear_probe`, which trains the backbone's own classifier, the probes are not handed over.

    Source: Zhang, Isola, Efros, "Split-Brain Autoencoders" (CVPR 2017), section 4.1, and its code (in "colorization",
    `feature_learning_tests/linear`): 96 x 10 x 10, 256 x 6 x 6 or 384 x 5 x 5 features of AlexNet, BatchNorm without
    scale and shift, one linear layer. They resize maps where we average, and their BatchNorm takes its statistics from
    the batch. The backbone being frozen, ours are measured once, over 5,000 training images (all, where there are
    fewer) without the device's augmentation, so that batch size and number of processes change nothing.

    Args:
        num_classes: number of classes; `None` asks the data.
        max_features: largest number of inputs of a probe: the grid is the largest for which channels * cells stays
            within it, but never larger than the map and never smaller than one cell.
        kwargs: see `Task`.

    Raises:
        ValueError: for a backbone without maps, fewer than two classes, or samples without a class.
    """

    def __init__(self, num_classes: int | None = None, max_features: int = 10_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_features < 1:
            raise ValueError(f"model.max_features must be at least 1, got {max_features}.")
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(
                f"LinearProbes needs a backbone that gives the maps of its stages (forward_intermediates), but "
                f"{self.hparams['backbone']} does not: choose another."
            )
        self.num_classes, self.max_features = num_classes, max_features
        self.freeze_modules(self.backbone)
        self.probes = nn.ModuleList()

    def build(self) -> None:
        """Make a probe for every map of a training image; before training, measure the maps."""
        classes, self.classes = find_classes(self, self.num_classes)
        self.num_classes = self.hparams["num_classes"] = classes
        data = data_of(self)
        if data is None:
            return  # the checkpoint knows, see `on_load_checkpoint`
        self.to(self.trainer.strategy.root_device)  # Lightning moves it there soon, but there are images to look at
        self._make_probes([self._size(maps) for maps in self.maps(_training_images(data, [0]).to(self.device))])
        if self.trainer.state.fn == "fit":
            self._measure(data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the probes that the checkpoint holds: other images than then would have led to other grids."""
        super().on_load_checkpoint(checkpoint)
        tensors = checkpoint["state_dict"]
        sizes: list[tuple[int, int]] = []
        while (weight := tensors.get(f"probes.{len(sizes)}.linear.weight")) is not None:
            channels = len(tensors[f"probes.{len(sizes)}.mean"])
            sizes.append((channels, math.isqrt(weight.shape[1] // channels)))
        if sizes != [probe.size for probe in self.probes]:
            self._make_probes(sizes)

    def maps(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Return the maps of all stages for images in [0, 1], the backbone's final norm applied to the last."""
        with torch.no_grad():
            return self.backbone.forward_intermediates(
                self.normalize(images), indices=None, norm=True, intermediates_only=True, output_fmt="NCHW"
            )

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b classes"]]:
        """Return the class scores of every stage's probe for images in [0, 1].

        Raises:
            ValueError: where neither data nor a checkpoint have said how large the probes are.
        """
        if not len(self.probes):
            raise ValueError("The sizes of the probes follow from the data or a checkpoint: fit first, or load one.")
        return [probe(maps) for probe, maps in zip(self.probes, self.maps(images), strict=True)]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of all cross-entropies, and each stage's cross-entropy and training error."""
        images, targets = batch
        scores = self(images)
        errors = {
            f"error_stage{stage}": (logits.detach().argmax(1) != targets).float().mean()
            for stage, logits in enumerate(scores, start=1)
        }
        return {**_cross_entropies(scores, targets), **errors}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropies; top-1 and (above five classes) top-5 of every stage are counted by torchmetrics."""
        images, targets = batch
        scores = self(images)
        assert self.metrics is not None
        for name, metric in self.metrics.items():
            metric.update(scores[int(name.rpartition("_stage")[2]) - 1], targets)
        return _cross_entropies(scores, targets)

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the errors to the accuracies."""
        return with_errors(values)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the last stage's class, its probability, the target (-1 where unknown), and every stage's class."""
        images, targets = batch
        scores = self(images)
        probability, prediction = scores[-1].softmax(1).max(1)
        stages = {f"prediction_stage{stage}": logits.argmax(1) for stage, logits in enumerate(scores, start=1)}
        return {"prediction": prediction, "probability": probability, "target": targets, **stages}

    # Inside

    def _size(self, maps: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Channels of a map, and cells a side of the grid it is averaged to."""
        channels, side = maps.shape[1], min(maps.shape[2:])
        return channels, max(1, min(side, math.isqrt(self.max_features // channels)))

    def _make_probes(self, sizes: list[tuple[int, int]]) -> None:
        assert self.num_classes is not None
        probes = [_Probe(channels, grid, self.num_classes) for channels, grid in sizes]
        self.probes = nn.ModuleList(probes).to(self.device)
        metrics: dict[str, Metric | MetricCollection] = {}
        for stage in range(1, len(sizes) + 1):
            metrics |= top_accuracies(self.num_classes, f"_stage{stage}")
        self.metrics = MetricCollection(metrics, compute_groups=False)  # each sees scores of its own

    def _measure(self, data: Any) -> None:
        """Give the probes the statistics of training images; every process looks at the same ones."""
        count = min(len(data.train_set), LOOKED_AT)
        places = [index * len(data.train_set) // count for index in range(count)]
        probes: list[Any] = list(self.probes)
        parts: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in probes]
        for begin in range(0, count, 100):
            images = _training_images(data, places[begin : begin + 100]).to(self.device)
            for probe, part, maps in zip(probes, parts, self.maps(images), strict=True):
                moments = torch.var_mean(probe.pool(maps).float(), dim=(0, 2, 3), correction=0)
                variance, mean = (value.cpu().double() for value in moments)  # Apple's GPUs have no double
                part.append((len(images), mean, variance))
        for probe, part in zip(probes, parts, strict=True):
            mean, variance = _join(part)
            probe.mean.copy_(mean)
            probe.variance.copy_(variance)


class _Probe(nn.Module):
    """A map's averages over a grid, standardised, and a linear classifier of them.

    Args:
        channels: of the map.
        grid: cells a side.
        classes: scores.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, grid: int, classes: int) -> None:
        super().__init__()
        self.size, self.grid = (channels, grid), grid
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.linear = nn.Linear(channels * grid**2, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def pool(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c grid grid"]:
        return F.adaptive_avg_pool2d(maps, self.grid)

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        mean, variance = self.mean[:, None, None], self.variance[:, None, None]
        return self.linear(((self.pool(maps) - mean) / (variance + EPSILON).sqrt()).flatten(1))


def _training_images(data: Any, places: list[int]) -> Float[Tensor, "b c h w"]:
    return data.to_float(data.train_set.__getitems__(places)[0])


def _cross_entropies(scores: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    losses = [F.cross_entropy(logits, targets) for logits in scores]
    stages = {f"loss_stage{stage}": value for stage, value in enumerate(losses, start=1)}
    return {"loss": torch.stack(losses).sum(), **stages}


def _join(
    parts: list[tuple[int, Float[Tensor, " c"], Float[Tensor, " c"]]],
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and variance of all from (count, mean, variance) of parts."""
    counts = torch.tensor([count for count, *_ in parts]).double()
    weights = (counts / counts.sum())[:, None]
    means = torch.stack([mean for _, mean, _ in parts])
    variances = torch.stack([variance for *_, variance in parts])
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0)
