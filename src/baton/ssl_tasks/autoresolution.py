"""Autoresolution: does this high-resolution patch belong to this low-resolution image, and where?"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from baton.backbones import create_backbone
from baton.data.images import Batch
from baton.layers.tiled_pair_head import TiledPairHead
from baton.ssl_tasks import autoresolution_pictures
from baton.ssl_tasks.autoresolution_tiling import Tiling
from baton.task import Task

#: Thirds of the way from the image's centre to the outermost place where a patch can be.
ZONES = ("centre", "middle", "edge")


class Autoresolution(Task):
    """Match high-resolution patches with low-resolution images; the low-resolution image's tower is the backbone.

    Every image is averaged down to a low-resolution image, and a random super patch is cut out of it. The patch tower,
    unrolled over the super patch, embeds a grid of overlapping patches; the image embedding is tiled over the grid, and
    a head of five 1×1 convolutions answers for every cell: one prediction a patch, thousands an image. The patch tower
    and the head are thrown away afterwards.

    Source: Pereyra and Szegedy, "Deep autoresolution networks" (2016). There is no code of theirs. The paper is silent
    on BatchNorm (here: `norm`), on the image embedding's pooling (here: `embedding_grid`), on the head's widths, and on
    the regression's loss (here: mean squared error over both coordinates).

    Args:
        objective: `classification`: one positive (the image's own patch) and one negative (the patch of the next image
            in the batch; with DDP in the process's part of it) for each image and cell, two-way softmax. Evaluation
            keeps the order of the data: where files are sorted by class, its negatives are harder than training's.
            `regression`: the centre (x, y) of every cell's patch in the image, each in [-1, 1].
        super_patch: side of the super patch in pixels; `(super_patch - receptive field)` must be a multiple of the
            patch tower's stride.
        low_resolution_factor: squares of this side are averaged into one pixel of the low-resolution image.
        patch_backbone: a network without padding: `autoresolution_patch` or one of its variants.
        patch_backbone_kwargs: further arguments of the patch tower.
        embedding_grid: the backbone's last map is averaged to so many cells a side before it is tiled; 1 is the global
            mean, more keeps where things are.
        head_width: channels between the head's convolutions.
        norm: BatchNorm in the head; of the towers, see their own `norm`.
        grey: show grey images (the mean over the channels), so that colours alone give no match.
        kwargs: see `Task`. Any backbone with a spatial map will do; the paper's is `autoresolution_image`.
    """

    def __init__(
        self,
        objective: Literal["classification", "regression"] = "classification",
        super_patch: int = 127,
        low_resolution_factor: int = 8,
        patch_backbone: str = "autoresolution_patch",
        patch_backbone_kwargs: dict[str, Any] | None = None,
        embedding_grid: int = 1,
        head_width: int = 128,
        norm: bool = True,
        grey: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if embedding_grid < 1:
            raise ValueError(f"model.embedding_grid must be at least 1, got {embedding_grid}.")
        if not hasattr(self.backbone, "forward_intermediates"):
            raise ValueError(
                f"Autoresolution needs a backbone with a spatial map, {self.hparams['backbone']} has none."
            )
        self.objective, self.embedding_grid, self.grey = objective, embedding_grid, grey
        tower: Any = create_backbone(patch_backbone, **{**(patch_backbone_kwargs or {}), "num_classes": 0})
        if not hasattr(tower, "receptive_field"):
            raise ValueError(
                f"model.patch_backbone={patch_backbone!r} pads its input, so that its cells are not patches: use "
                "autoresolution_patch or one of its variants."
            )
        self.patch_tower = tower
        self.tiling = Tiling(super_patch, tower.receptive_field, tower.stride, low_resolution_factor)
        features = self.backbone.feature_info[-1]["num_chs"] * embedding_grid**2
        self.head = TiledPairHead(tower.num_features, features, 2, head_width, norm=norm)
        measure = "accuracy" if objective == "classification" else "error_px"
        self.metrics = MetricCollection(
            {f"{measure}_{zone}": MeanMetric("ignore") for zone in ZONES}, compute_groups=False
        )

    def networks(self) -> list[nn.Module]:
        """Both towers."""
        return [self.backbone, self.patch_tower]

    def build(self) -> None:
        """Refuse before the first step a batch of one that would only come at the end of an epoch."""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if data is None or self.objective != "classification" or self.trainer.state.fn != "fit":
            return
        share = -(-len(data.train_set) // self.trainer.world_size)
        if data.batch_size == 1 or (share % data.batch_size == 1 and not data.drop_last):
            raise ValueError(
                f"A negative is a patch of another image in the batch, but {share} images (of one process) in batches "
                f"of {data.batch_size} leave a batch of one: set data.drop_last=true or another data.batch_size."
            )
        for split, dataset in (("validation", data.val_set), ("test", data.test_set)):
            if dataset and min(map(len, data.evaluation_batches(dataset))) == 1:
                raise ValueError(
                    f"A negative is a patch of another image in the batch, but {len(dataset)} {split} images in "
                    f"batches of {data.batch_size} leave a batch of one: use a data.batch_size of at least 3, or more "
                    "images."
                )

    # The two towers and the head

    def low_resolution(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 lh lw"]:
        """Average squares of `low_resolution_factor` pixels."""
        return F.avg_pool2d(images, self.tiling.factor)

    def embed_images(self, low: Float[Tensor, "b 3 lh lw"]) -> Float[Tensor, "b e"]:
        """Embed low-resolution images in [0, 1]."""
        return F.adaptive_avg_pool2d(self.feature_map(low), self.embedding_grid).flatten(1)

    def embed_patches(self, patches: Float[Tensor, "b 3 ph pw"]) -> Float[Tensor, "b p gh gw"]:
        """Embed super patches in [0, 1], or patches as large as the receptive field (a grid of one cell).

        They are brought to the backbone's mean and standard deviation, so that both towers see one scale of pixels.
        """
        return self.patch_tower.forward_features(self.normalize(patches))

    def forward(
        self,
        low: Float[Tensor, "b 3 lh lw"],
        super_patches: Float[Tensor, "b 3 s s"],
        shifts: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "sb 2 gh gw"]:
        """Answer for every pair and cell: two logits (other, own), or the coordinates (x, y).

        Args:
            low: low-resolution images in [0, 1].
            super_patches: super patches in [0, 1].
            shifts: image i meets the super patch of image i + shift, for each shift; 0 is its own.
        """
        return self.head(self.embed_patches(super_patches), self.embed_images(low), shifts)

    # What a recipe says

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with the accuracy over all cells, or the mean squared error of the coordinates."""
        images = self._seen(batch[0])
        places = self.tiling.draw(images)
        output = self._predict(images, places)
        if self.objective == "regression":
            return {"loss": F.mse_loss(output.float(), self.tiling.centres(*places, *images.shape[2:]))}
        loss, right = _classify(output)
        return {"loss": loss, "accuracy": right.float().mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The loss at fixed places, and by the distance from the centre the accuracy, or the error in pixels.

        `accuracy_own` and `accuracy_other` are those of positives and negatives; `chance_error_px` is the error of
        always answering the image's centre.
        """
        images = self._seen(batch[0])
        height, width = images.shape[2:]
        places = self.tiling.fixed(images)
        output = self._predict(images, places).float()
        centres = self.tiling.centres(*places, height, width)
        if self.objective == "classification":
            loss, right = _classify(output)
            both = torch.cat([centres, centres.roll(-1, 0)])
            self._count("accuracy", right.float(), both, height, width)
            own, other = right.float().chunk(2)
            return {
                "loss": loss,
                "accuracy": right.float().mean(),
                "accuracy_own": own.mean(),
                "accuracy_other": other.mean(),
            }
        half = torch.tensor([width / 2, height / 2], device=images.device).view(1, 2, 1, 1)
        error = ((output - centres) * half).norm(dim=1)
        self._count("error_px", error, centres, height, width)
        chance = (centres * half).norm(dim=1)
        return {"loss": F.mse_loss(output, centres), "error_px": error.mean(), "chance_error_px": chance.mean()}

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out zones in which no patch lay."""
        return {name: value for name, value in values.items() if torch.isfinite(value)}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return for an image's own super patch the probability of every cell, or its coordinates, and the truth."""
        images = self._seen(batch[0], alone=True)
        places = self.tiling.fixed(images)
        output = self(self.low_resolution(images), self.tiling.crop(images, *places)).float()
        result = {"top": places[0], "left": places[1]}
        if self.objective == "classification":
            probability = output.softmax(1)[:, 1]
            return {**result, "probability": probability.mean((1, 2)), "probability_of_cells": probability}
        return {**result, "centres": output, "true_centres": self.tiling.centres(*places, *images.shape[2:])}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Draw the pairs the network sees, and heat maps or predicted positions."""
        images = self._seen(batch[0])[:4]
        places = self.tiling.fixed(images)
        low, patches = self.low_resolution(images), self.tiling.crop(images, *places)
        views = autoresolution_pictures.Views(self.tiling, images, low, patches, *places)
        pictures = {"pairs": autoresolution_pictures.draw_pairs(views)}
        if self.objective == "regression":
            pictures["positions"] = autoresolution_pictures.draw_positions(views, self(low, patches).float())
        elif len(images) > 1:
            own, other = self(low, patches, (0, 1)).float().softmax(1)[:, 1].chunk(2)
            pictures["heat_maps"] = autoresolution_pictures.draw_heat_maps(views, own, other)
        return pictures

    # Inside

    def _seen(self, images: Float[Tensor, "b c h w"], alone: bool = False) -> Float[Tensor, "b c h w"]:
        """Refuse what does not fit, and take the colour away where it shall not be seen."""
        self.tiling.check(*images.shape[2:])
        if len(images) == 1 and self.objective == "classification" and not alone:
            raise ValueError(
                "A negative is a patch of another image in the batch, and there is a batch of one: use a data."
                "batch_size of at least 3."
            )
        return images.mean(1, keepdim=True).expand_as(images) if self.grey else images

    def _predict(self, images: Float[Tensor, "b 3 h w"], places: tuple[Tensor, Tensor]) -> Float[Tensor, "sb 2 gh gw"]:
        shifts = (0, 1) if self.objective == "classification" else (0,)
        return self(self.low_resolution(images), self.tiling.crop(images, *places), shifts)

    def _count(
        self, name: str, values: Float[Tensor, "n gh gw"], centres: Float[Tensor, "n 2 gh gw"], height: int, width: int
    ) -> None:
        """Add a measurement of every cell to the zone its patch lies in."""
        assert self.metrics is not None
        field = self.tiling.receptive_field
        reach = torch.tensor([1 - field / width, 1 - field / height], device=centres.device).clamp_min(1e-6)
        distance = (centres.abs() / reach.view(1, 2, 1, 1)).amax(1)
        zone = (distance * len(ZONES) + 1e-4).long().clamp_max(len(ZONES) - 1)  # a third is a third, rounding or not
        for index, label in enumerate(ZONES):
            self.metrics[f"{name}_{label}"].update(values, (zone == index).to(values.dtype))


def _classify(logits: Float[Tensor, "b2 2 gh gw"]) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all cells, and which are right: the first half of the batch are positives."""
    labels = torch.zeros_like(logits[:, 0], dtype=torch.long)
    labels[: len(labels) // 2] = 1
    return F.cross_entropy(logits, labels), logits.detach().argmax(1) == labels
