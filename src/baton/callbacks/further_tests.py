"""Further tests: a run that is tested is measured a second time, on whole images or on its training images."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MetricCollection

from baton.backbones.score_map import AveragedScoreMap
from baton.data.images import Batch
from baton.labels import top_accuracies, with_errors
from baton.random_state import fixed_randomness
from baton.task import Task

Classifier = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) to class scores (B, classes)."""


class FurtherTest(Callback):
    """Base: whenever a run is tested, classify further images with the backbone and record how well.

    Records `test/<prefix>_error` and `test/<prefix>_accuracy` and, above five classes, those of the five best classes,
    `test/<prefix>_error_top5` and `test/<prefix>_accuracy_top5`. Without gradients, in evaluation mode and in the
    precision of the test; random state and weights are left as they are. What cannot be measured is refused before
    training starts.
    """

    prefix: str

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse images that are not there: a mistake must not show after training."""
        if stage in ("fit", "test"):
            self.loader(trainer.datamodule)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a task that does not classify: its classifier, if there is one, has been built by now."""
        self._classifier(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a task that does not classify."""
        self._classifier(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and record; Lightning has put the task into evaluation mode, and gradients are off."""
        assert isinstance(pl_module, Task)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        metrics = MetricCollection({**top_accuracies(pl_module.backbone.get_classifier().out_features)})
        metrics.to(pl_module.device)
        with fixed_randomness(0):
            classifier, loader = self._classifier(trainer, pl_module), self.loader(data)
            for loaded in islice(loader, _limit(len(loader), trainer.limit_test_batches)):
                batch = data.transfer_batch_to_device(loaded, pl_module.device, 0)
                for images, targets in self.batches(batch, data):
                    with trainer.precision_plugin.test_step_context():
                        scores = classifier(pl_module.normalize(data.to_float(images)))
                    metrics.update(scores, targets)
        values = with_errors(metrics.compute())  # over all processes
        pl_module.record({f"test/{self.prefix}_{name}": value.item() for name, value in values.items()})

    def _classifier(self, trainer: Trainer, task: LightningModule) -> Classifier:
        backbone: Any = task.backbone
        found = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
        if not isinstance(found, nn.Linear):
            raise ValueError(
                f"{type(self).__name__} measures the backbone's linear classifier, and {type(task).__name__} trains "
                "none here: use it with a task that does, or leave it out."
            )
        return self.classifier(backbone, trainer.datamodule)  # type: ignore[attr-defined]

    @abstractmethod
    def loader(self, data: Any) -> Any:
        """Return a loader of what is measured, each image once over all processes; a ValueError where there is none."""

    @abstractmethod
    def classifier(self, backbone: Any, data: Any) -> Classifier:
        """Return what classifies; a ValueError where the backbone cannot."""

    def batches(self, loaded: Any, data: Any) -> Iterable[Batch]:
        """Turn what the loader gave into batches of uint8 images of one shape, (B, 3, H, W), and targets (B,)."""
        return [loaded]


class TestOnWholeImages(FurtherTest):
    """Test on whole images: the network becomes one convolution, whose scores are averaged over the image.

    Records `test/convolution_error` and others (see `FurtherTest`), beside `test/error` on the crop in the centre.
    Images keep their shape; the crops' size is the data's `image_size`. Which networks can do it, and how, is said by
    `baton.backbones.score_map`; vision transformers cannot. Needs images in files: `ImageFolder` or `ImageNet`.

    Source: the testing protocol "convolution" in the slides of Zhang, Lee, Lee, "Augmenting supervised neural networks
    with unsupervised objectives for large-scale image classification" (ICML 2016).

    Args:
        shorter_side: of the images, which are resized to it, in pixels.
    """

    prefix = "convolution"

    def __init__(self, shorter_side: int = 256) -> None:
        self.shorter_side = shorter_side

    def loader(self, data: Any) -> Any:
        """Return a loader of lists of images."""
        return data.whole_images(self.shorter_side)

    def classifier(self, backbone: Any, data: Any) -> Classifier:
        """Return the averaged score map."""
        return AveragedScoreMap(backbone, data.image_size)

    def batches(self, loaded: tuple[list[UInt8[Tensor, "3 _ _"]], Tensor], data: Any) -> Iterator[Batch]:
        """Put images of the same shape together, at most as many pixels as a batch of crops has."""
        images, targets = loaded
        same: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            same.setdefault(tuple(image.shape[1:]), []).append(index)
        for (height, width), indices in same.items():
            most = max(1, data.batch_size * data.image_size**2 // (height * width))
            for start in range(0, len(indices), most):
                chosen = indices[start : start + most]
                yield torch.stack([images[index] for index in chosen]), targets[chosen]


class TestOnTrainingImages(FurtherTest):
    """Test on the training images, cut as test images are and without augmentation.

    Records `test/training_error` and others (see `FurtherTest`). Unlike `train/error` it is measured with the final
    weights, in evaluation mode, as `test/error` is: the difference between the two is overfitting.

    Source: the training errors in the slides of Zhang, Lee, Lee (ICML 2016).

    Args:
        limit: take at most this many images, spread evenly over the data; None takes all of them.
    """

    prefix = "training"

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"TestOnTrainingImages.limit must be at least 1, or null for all images, got {limit}.")
        self.limit = limit

    def loader(self, data: Any) -> Any:
        """Return a loader of training images."""
        return data.training_images(self.limit)

    def classifier(self, backbone: Any, data: Any) -> Classifier:
        """Return the network as it is."""
        return backbone


def _limit(batches: int, limit: float) -> int:
    """Batches that `trainer.limit_test_batches` leaves: a number, or a fraction."""
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))
