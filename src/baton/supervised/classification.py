"""Classification: scratch, fine-tuning, linear probe, or the head alone for the first steps."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics import MetricCollection

from baton.data.images import Batch
from baton.labels import find_classes, top_accuracies, with_errors
from baton.task import Task


class Classification(Task):
    """Classify images with the backbone and timm's own classifier on top.

    Args:
        num_classes: number of classes; `None` asks the data.
        protocol: `finetune` trains everything; `linear_probe` trains the classifier on the frozen backbone (evaluation
            mode, bit-identical afterwards).
        head_only_steps: train the classifier alone for so many steps, then everything (Autoresolution's CIFAR-10
            protocol uses 10,000). The backbone stays in evaluation mode meanwhile.
        label_smoothing: of the cross-entropy.
        head_drop_rate: dropout before the classifier.
        kwargs: see `Task`.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        protocol: Literal["finetune", "linear_probe"] = "finetune",
        head_only_steps: int = 0,
        label_smoothing: float = 0.0,
        head_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol == "linear_probe" and head_only_steps:
            raise ValueError("head_only_steps trains the backbone afterwards, linear_probe never does: choose one.")
        self.num_classes, self.protocol, self.head_only_steps = num_classes, protocol, head_only_steps
        self.label_smoothing, self.head_drop_rate = label_smoothing, head_drop_rate

    def build(self) -> None:
        """Give the backbone a fresh classifier of the right size."""
        classes, names = find_classes(self, self.num_classes)
        if self.head_only_steps and self._trainer is not None:
            self._check_strategy()
        self.num_classes = self.hparams["num_classes"] = classes
        self.classes = names
        self.need_classifier(classes)
        if self.protocol == "linear_probe":
            self.freeze_modules(self.backbone)
            self.backbone.get_classifier().requires_grad_(True)
        self.metrics = MetricCollection({**top_accuracies(classes)})

    def _check_strategy(self) -> None:
        """DDP must know that the backbone's parameters are not used at first."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "model.head_only_steps leaves the backbone without gradients at first, for which DDP would wait: use "
                "--trainer.strategy=ddp_find_unused_parameters_true."
            )

    def logits(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Return class scores of images in [0, 1]."""
        images = self.normalize(images)
        head_only = self.training and self.global_step < self.head_only_steps
        if self.head_only_steps:
            self.backbone.train(self.training and not head_only)
            for module in self._frozen:
                module.eval()
        if not head_only and not self.head_drop_rate:
            return self.backbone(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
            features = self.backbone.forward_features(images)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        return self.backbone.get_classifier()(F.dropout(pooled, self.head_drop_rate, self.training))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and training error."""
        images, targets = batch
        logits = self.logits(images)
        error = (logits.detach().argmax(1) != targets).float().mean()
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing), "error": error}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy without smoothing; top-1 and (above five classes) top-5 are counted by torchmetrics."""
        images, targets = batch
        logits = self.logits(images)
        assert self.metrics is not None
        self.metrics.update(logits, targets)
        return {"loss": F.cross_entropy(logits, targets)}

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the errors to the accuracies."""
        return with_errors(values)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the predicted class, its probability, and the target (-1 where unknown)."""
        images, targets = batch
        probability, prediction = self.logits(images).softmax(1).max(1)
        return {"prediction": prediction, "probability": probability, "target": targets}
