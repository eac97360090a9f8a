"""Segmentation: the class of every pixel, from the backbone's classifier at every cell of its last map."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.utils import make_grid

from baton import handover
from baton.backbones.cell_scores import cell_scores, check_scores_cells
from baton.data.images import Batch
from baton.data.masks import IGNORE, MaskData
from baton.labels import data_of, find_classes
from baton.supervised.mask_pictures import paint, palette
from baton.task import Task, is_first_process

ClassWeights = Literal["none", "inverse_frequency"]


class Segmentation(Task):
    """Classify every pixel: the backbone's classifier scores every cell of its last map, enlarged to the image.

    Scores are interpolated bilinearly (corners not aligned) to the size of the mask. Any backbone with a spatial map
    will do, see `baton.backbones.cell_scores`; that of `unet` has the image's size.

    The loss of image i with mask m is, over its N_i pixels that are not ignored (value 255),

        loss_i = 1 / N_i Σ_p w[m_p] (-log softmax(scores_p)[m_p])          0 where all pixels are ignored

    and that of a batch is the mean over its images. A weighted cross-entropy over a batch would divide by the sum of
    the weights of its pixels instead, which depends on who is in the batch: means over processes would differ from
    one process. It also makes a batch of one image, the paper's, blind to how rare its classes are; here an image of
    rare classes moves the network more. With weights of 1 both are the mean over pixels, if images have equally many.

    With `inverse_frequency` class c has the weight w[c] = 1 / (K f_c), where f_c is its share of the training split's
    pixels that are not ignored and K the number of classes that occur: the mean over those pixels, Σ f_c w[c], is 1, so
    that the learning rate keeps its meaning. A class without any pixel gets 0: validation losses leave it out, too.

    Metrics are computed once over the whole split and all processes, from the matrix of true and predicted classes:
    `pixel_accuracy`, `mean_iou` (intersection over union, mean over the classes that occur in masks or predictions)
    and, where the first class is called background, `mean_iou_objects`, the mean over the others. (torchmetrics' own
    `MeanIoU` averages over images and cannot ignore pixels.) To keep the best weights by one of these, set `run.mode`
    to `max`.

    Source of loss and weights: Pintea et al., "Resolution learning in deep convolutional networks using scale-space
    theory" (IEEE TIP 2021), section IV-B, which does not say how a batch is normalised.

    Args:
        num_classes: number of classes, the background included; `None` asks the data.
        class_weights: `none`, `inverse_frequency`, or one number a class.
        per_class: log the intersection over union of every class as well, `iou_NAME`.
        trunk_from: where the weights of the backbone's `trunk` come from (`deeplab` has one): what `init_from` takes,
            such as `timm:resnet101.a1_in1k` or a run of the same network. Their mean and standard deviation come along.
        kwargs: see `Task`.

    Raises:
        ValueError: for data without masks, weights that do not fit the classes, or a backbone that cannot score cells.
    """

    weights: Tensor

    def __init__(
        self,
        num_classes: int | None = None,
        class_weights: ClassWeights | list[float] = "none",
        per_class: bool = False,
        trunk_from: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.class_weights, self.per_class = num_classes, class_weights, per_class
        if trunk_from is not None:
            self._take_trunk(trunk_from)

    def build(self) -> None:
        """Give the backbone a classifier of the right size, and the classes their weights."""
        data = data_of(self)
        predicting = self._trainer is not None and self.trainer.state.fn == "predict"
        if data is not None and not isinstance(data, MaskData) and not predicting:
            raise ValueError(
                f"Segmentation needs a mask for every image, and {type(data).__name__} has none: use data with masks, "
                "such as ShapesMasks or MaskFolder."
            )
        classes, self.classes = find_classes(self, self.num_classes, of_samples=False)
        if classes > IGNORE:
            raise ValueError(f"Masks can hold at most {IGNORE} classes, but there are {classes}.")
        self.num_classes = self.hparams["num_classes"] = classes
        self.need_classifier(classes)
        check_scores_cells(self.backbone)
        self.register_buffer("weights", self._weigh(classes, None if predicting else data).to(self.device))
        confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE, validate_args=False)
        self.metrics = MetricCollection({"confusion": confusion})

    def scores(
        self, images: Float[Tensor, "b 3 h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b classes height width"]:
        """Return class scores of every pixel of images in [0, 1].

        Args:
            images: any size that the backbone takes.
            size: height and width of the scores; None: the images'.
        """
        scores = cell_scores(self.backbone, self.normalize(images))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        size = size or (images.shape[2], images.shape[3])
        return scores if scores.shape[2:] == size else F.interpolate(scores, size, mode="bilinear")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, and the share of pixels that are wrong, as a mean over images."""
        images, masks = batch
        scores = self.scores(images, (masks.shape[1], masks.shape[2]))
        wrong = ((scores.detach().argmax(1) != masks) & (masks != IGNORE)).flatten(1).float().sum(1)
        return {"loss": self._loss(scores, masks), "pixel_error": (wrong / _counted(masks)).mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The loss; true and predicted classes are counted by torchmetrics."""
        images, masks = batch
        scores = self.scores(images, (masks.shape[1], masks.shape[2]))
        assert self.metrics is not None
        self.metrics.update(scores.argmax(1), masks)
        return {"loss": self._loss(scores, masks)}

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the matrix of true and predicted classes into metrics."""
        matrix = values["confusion"].cpu().double()
        ratios = intersection_over_union(matrix)
        names = self.classes or [f"class {number}" for number in range(len(matrix))]
        found = {"pixel_accuracy": matrix.trace() / matrix.sum(), "mean_iou": ratios.nanmean()}
        if self._has_background:
            found["mean_iou_objects"] = ratios[1:].nanmean()
        if self.per_class:
            found |= {f"iou_{name}": ratio for name, ratio in zip(names, ratios, strict=True)}
        return found

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the class of every pixel, (B, H, W); where there are masks also these, and accuracy and mean IoU.

        The latter are of each image alone, over the classes that occur in its mask or prediction.
        """
        images, masks = batch
        if masks.ndim == 1:  # data without masks
            return {"prediction": self._predict(images, (images.shape[2], images.shape[3]))}
        assert self.num_classes is not None
        prediction = self._predict(images, (masks.shape[1], masks.shape[2]))
        seen = masks != IGNORE
        pairs = masks.where(seen, 0) * self.num_classes + prediction
        sizes = (self.num_classes, self.num_classes)
        matrices = [
            pair[mask].bincount(minlength=sizes[0] * sizes[1]).view(sizes).double().cpu()
            for pair, mask in zip(pairs, seen, strict=True)
        ]
        return {
            "pixel_accuracy": torch.stack([matrix.trace() / matrix.sum() for matrix in matrices]),
            "mean_iou": torch.stack([intersection_over_union(matrix).nanmean() for matrix in matrices]),
            "prediction": prediction,
            "target": masks.to(torch.uint8),
        }

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Three rows: the images, their masks (grey is ignored), the predicted masks."""
        images, masks = batch[0][:8], batch[1][:8]
        assert self.num_classes is not None
        colours = palette(self.num_classes, self._has_background)
        prediction = self._predict(images, (masks.shape[1], masks.shape[2]))
        rows = torch.cat([images, paint(masks, colours), paint(prediction, colours)])
        return {"segmentation": make_grid(rows, nrow=len(images), padding=2, pad_value=1.0)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds its trunk: it does not say where that once came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["trunk_from"] = None

    # Inside

    @property
    def _has_background(self) -> bool:
        return bool(self.classes) and self.classes[0].lower() == "background"  # type: ignore[index]

    def _loss(self, scores: Float[Tensor, "b classes h w"], masks: Int[Tensor, "b h w"]) -> Float[Tensor, ""]:
        weights = self.weights.to(scores.dtype)
        pixels = F.cross_entropy(scores, masks, weights, ignore_index=IGNORE, reduction="none")
        return (pixels.flatten(1).sum(1) / _counted(masks)).mean()

    def _predict(self, images: Float[Tensor, "b 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "b height width"]:
        return self.scores(images, size).argmax(1).to(torch.uint8)

    def _weigh(self, classes: int, data: Any) -> Float[Tensor, " classes"]:
        """Weights of the classes."""
        if isinstance(self.class_weights, list):
            weights = self.class_weights
            if len(weights) != classes or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
                raise ValueError(
                    f"model.class_weights must be {classes} numbers of at least 0 (one a class), not all 0, but got "
                    f"{weights}."
                )
            return torch.tensor(weights, dtype=torch.float32)
        if self.class_weights == "none" or not isinstance(data, MaskData):
            return torch.ones(classes)  # or what the checkpoint that is about to be loaded says
        counts = data.class_counts()
        if not counts.any():
            raise ValueError("model.class_weights=inverse_frequency needs masks, but all training pixels are ignored.")
        if absent := [data.classes[number] for number in (counts == 0).nonzero().flatten().tolist()]:
            rank_zero_warn(
                f"No training pixel is of {len(absent)} of {len(counts)} classes ({', '.join(absent[:5])}"
                f"{', ...' if len(absent) > 5 else ''}): their weight is 0."
            )
        return F.pad(inverse_frequencies(counts), (0, classes - len(counts)))

    def _take_trunk(self, location: str) -> None:
        """Load the trunk of the backbone from a source of weights, strictly."""
        trunk = getattr(self.backbone, "trunk", None)
        if trunk is None or self.parent is not None:
            raise ValueError(
                f"model.trunk_from starts the trunk of a fresh backbone, but {self.hparams['backbone']} "
                f"{'has none' if trunk is None else 'comes from model.init_from as a whole'}: leave one of them out."
            )
        source = handover.read_source(location)
        report = handover.load_weights(trunk, source, classifier=False)
        for name, buffer in (("mean", self.mean), ("std", self.std)):
            if name in source.pretrained_cfg:
                values = source.pretrained_cfg[name]
                buffer.copy_(torch.tensor(values).view(-1, 1, 1))
                self.backbone.pretrained_cfg = {**self.backbone.pretrained_cfg, name: values}
        self.parent = source.lineage()
        if is_first_process():
            print(f"{location}: {source.architecture}, {report}", flush=True)


def inverse_frequencies(counts: Int[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """Weights in inverse proportion to the counts, whose mean over all that was counted is 1; 0 where nothing was.

    Args:
        counts: pixels of each class, at least one in all.
    """
    shares = counts.double() / counts.sum()
    return torch.where(counts > 0, 1 / (shares * (counts > 0).sum()), 0.0).float()


def intersection_over_union(matrix: Float[Tensor, "classes classes"]) -> Float[Tensor, " classes"]:
    """Intersection over union of each class; NaN where it occurs neither in masks nor in predictions.

    Args:
        matrix: numbers of pixels, the true class by row, the predicted one by column.
    """
    both = matrix.diagonal()
    return both / (matrix.sum(0) + matrix.sum(1) - both)


def _counted(masks: Int[Tensor, "b h w"]) -> Int[Tensor, " b"]:
    """Pixels of each image that are not ignored, and 1 where there are none, so that their sum over none is 0."""
    return (masks != IGNORE).flatten(1).sum(1).clamp(min=1)
