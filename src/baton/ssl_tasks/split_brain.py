"""Split-brain autoencoders: each half of the network predicts the colour channels that only the other one sees."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchvision.utils import make_grid

from baton.backbones.split_brain import DEFAULT_BASE, PREDICTORS
from baton.data.images import Batch
from baton.layers.color_space import from_rgb
from baton.ssl_tasks.color_prior import ColorPrior
from baton.ssl_tasks.color_quantizer import ColorQuantizer, QuantizedSpace
from baton.task import Task, is_first_process

#: An image whose channels differ by no more than this anywhere is grey: there is no colour to predict.
GREY = 2.5 / 255
#: Training images that are looked at before the first step.
LOOKED_AT = 1000
METRICS = (
    *("loss", "loss_first", "loss_rest", "loss_prior", "accuracy_first", "accuracy_rest"),
    *("delta_e", "delta_e_mean", "delta_e_prior", "delta_e_first", "delta_e_first_mean"),
)


class SplitBrain(Task):
    """Predict the classes of colour that the other half sees; the pair is the backbone.

    For every cell of the small image, cross-entropy of both halves' predictions, averaged over cells and batch and
    summed over the halves. (The poster's code sums over the batch, which Adam undoes.) A half's logits are its last
    map, or a 1 × 1 convolution of it where the base does not predict cells itself; that one is thrown away afterwards.
    Grey images contribute nothing, and are counted as `grey`.

    Source: Zhang, Isola, Efros, "Split-Brain Autoencoders" (CVPR 2017); Iyengar, Casabuena, Budhkar, the poster of the
    same name, whose own contribution is `lab_rescaled`.

    Args:
        space: of the targets, see `ColorQuantizer`: `rgb`, `lab`, `lab_rescaled` or `lab_gamut` (soft targets).
        bins: of the first channel, and of each of the other two.
        size: side of the small image, in cells; logits are averaged or interpolated to it.
        rebalance: share of equal frequencies, γ of `ColorPrior.rebalancing`, by which rare colours weigh more in the
            first half's loss (0.5 in the code of "Colorful image colorization"); None: all weigh the same.
        temperature: decode colours from the predicted distribution after its logits were divided by this; below 1
            gives fewer mean and more vivid colours (0.38 in that paper). It changes no loss.
        kwargs: see `Task`. The backbone is `split_brain`; its colour space and outputs follow from the targets.
    """

    def __init__(
        self,
        space: QuantizedSpace = "lab_rescaled",
        bins: Sequence[int] = (100, 10),
        size: int = 12,
        rebalance: float | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if len(bins) != 2:
            raise ValueError(f"model.bins must be two numbers, of the first channel and of the others, got {bins}.")
        if rebalance is not None and not 0 < rebalance <= 1:
            raise ValueError(f"model.rebalance must be above 0 and at most 1, or null for none, got {rebalance:g}.")
        if temperature <= 0:
            raise ValueError(f"model.temperature must be above 0, got {temperature:g}.")
        quantizer = ColorQuantizer(space, (bins[0], bins[1]), size)
        if kwargs.get("backbone") == "split_brain" and not kwargs.get("init_from"):
            given = kwargs.get("backbone_kwargs") or {}
            outputs = {"out_chans": [*reversed(quantizer.num_classes)]}
            fitting = outputs if given.get("base", DEFAULT_BASE) in PREDICTORS else {}
            kwargs["backbone_kwargs"] = {"space": quantizer.color_space, **fitting, **given}
        super().__init__(**kwargs)
        self.quantizer, self.rebalance, self.temperature = quantizer, rebalance, temperature
        self.predictors = self._make_predictors()
        self.prior = ColorPrior(quantizer)
        self.metrics = MetricCollection({name: MeanMetric("ignore") for name in METRICS}, compute_groups=False)

    def _make_predictors(self) -> nn.ModuleList:
        """What turns the halves' last maps into logits, once it is sure that the backbone fits the targets."""
        backbone, quantizer, name = self.backbone, self.quantizer, self.hparams["backbone"]
        if not hasattr(backbone, "half_features"):
            raise ValueError(
                f"SplitBrain needs the backbone split_brain, two halves of any network, but got {name}: use "
                f"--model.backbone split_brain --model.backbone_kwargs '{{base: {name}}}'."
            )
        if backbone.space != quantizer.color_space:
            raise ValueError(
                f"The targets are in {quantizer.color_space}, but the backbone sees {backbone.space}: use another "
                "model.space, or another backbone."
            )
        (to_rest, to_first), (first, rest) = backbone.half_features, quantizer.num_classes
        if not backbone.predicts_cells:
            return nn.ModuleList([nn.Conv2d(to_rest, rest, 1), nn.Conv2d(to_first, first, 1)])
        if (to_rest, to_first) != (rest, first):
            raise ValueError(
                f"The backbone predicts {to_rest} and {to_first} classes, but model.space and model.bins ask for "
                f"{rest} and {first}: change these, or out_chans in model.backbone_kwargs."
            )
        return nn.ModuleList([nn.Identity(), nn.Identity()])

    def build(self) -> None:
        """Look at training images: is there any colour, and which colours are frequent?"""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if data is None or self.trainer.state.fn != "fit":
            return
        count = min(len(data.train_set), LOOKED_AT)
        places = [index * len(data.train_set) // count for index in range(count)]
        batches = (
            data.to_float(data.train_set.__getitems__(places[begin : begin + 100])[0]) for begin in range(0, count, 100)
        )
        colored = [images[_colored(images)] for images in batches]
        found = sum(map(len, colored))
        if not found:
            raise ValueError(
                f"All of {count} training images looked at are grey, so there is no colour to predict: use colour "
                "images."
            )
        if found < count and is_first_process():
            print(f"{count - found} of {count} training images looked at are grey; they are skipped.", flush=True)
        self.prior.learn(self.quantizer, (images.to(self.device) for images in colored if len(images)))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b n s s"], Float[Tensor, "b m s s"]]:
        """Logits of the first channel's classes and of the other two's, for images in [0, 1]."""
        features = self.backbone.forward_features(self.normalize(images))
        seen_first, seen_rest = features.split(list(self.backbone.half_features), dim=1)
        to_rest, to_first = self.predictors
        return self._resize(to_first(seen_rest)), self._resize(to_rest(seen_first))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropies and accuracies of the halves, named after what they predict, and the share of grey images."""
        images = batch[0]
        measured, colored = self._measure(images, self.quantizer.channels(images), self(images))
        means = {name: (values * colored).mean() for name, values in measured.items()}
        return {**means, "grey": 1 - colored.mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """As `losses`, over coloured images, and colour errors in CIE76 beside those of who sees nothing.

        `delta_e` is that of the colour predicted from the first channel (the mean colour of the predicted
        distribution) beside the true first channel; `delta_e_mean` and `delta_e_prior` are those of the training
        images' mean colour, and of the mean of their classes' frequencies; `loss_prior` is those frequencies' loss.
        `delta_e_first` and `delta_e_first_mean` are the same for the first channel predicted from the other two. In
        `lab_rescaled` all of them know the range of the image's own colours: compare within a space only.
        """
        images = batch[0]
        small, logits = self.quantizer.channels(images), self(images)
        measured, colored = self._measure(images, small, logits)
        mean, prior = self.prior.answer(self.quantizer, small)
        decoded, frequent = self._decode(logits, small), self._decode(prior, small)
        measured["loss_prior"] = self._measure(images, small, prior)[0]["loss"]
        for name, guess in (("", decoded), ("_mean", mean), ("_prior", frequent)):
            measured[f"delta_e{name}"] = self._error(torch.cat([small[:, :1], guess[:, 1:]], 1), small)
        for name, guess in (("", decoded), ("_mean", mean)):
            measured[f"delta_e_first{name}"] = self._error(torch.cat([guess[:, :1], small[:, 1:]], 1), small)
        assert self.metrics is not None
        for name, values in measured.items():
            self.metrics[name].update(values, colored)
        return {"grey": 1 - colored.mean()}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the small images (B, 3, S, S) with colours predicted from their first channel, and their errors."""
        small = self.quantizer.channels(batch[0])
        colors = torch.cat([small[:, :1], self._decode(self(batch[0]), small)[:, 1:]], 1)
        return {"delta_e": self._error(colors, small), "colors": self.quantizer.to_rgb(colors).float()}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Rows: the image, the small image, its classes decoded, both predictions, colours from the first channel."""
        images = batch[0][:8]
        small = self.quantizer.channels(images)
        decoded = self._decode(self(images), small)
        rows = [
            small,
            self.quantizer.decode(*self.quantizer.quantize(small), small),
            decoded,
            torch.cat([small[:, :1], decoded[:, 1:]], 1),
        ]
        large = [F.interpolate(self.quantizer.to_rgb(row), images.shape[2:], mode="nearest") for row in rows]
        grid = torch.cat([images, *large]).clamp(0, 1).float()
        return {"colors": make_grid(grid, nrow=len(images), padding=2, pad_value=1.0)}

    # Inside

    def _measure(
        self, images: Float[Tensor, "b 3 h w"], small: Float[Tensor, "b 3 s s"], logits: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], Float[Tensor, " b"]]:
        """Losses and accuracies of every image, and 1 for coloured ones, 0 for grey ones."""
        first, rest = self.quantizer.quantize(small)
        to_first, to_rest = (part.float() for part in logits)
        if self.quantizer.space == "lab_gamut":
            soft, classes = self.quantizer.soft(small)
            cells = -(to_rest.log_softmax(1).gather(1, classes) * soft).sum(1)
        else:
            cells = F.cross_entropy(to_rest, rest, reduction="none")
        if self.rebalance is not None:
            cells = cells * self.prior.rebalancing(self.rebalance)[rest]
        loss_first, loss_rest = F.cross_entropy(to_first, first, reduction="none").mean((1, 2)), cells.mean((1, 2))
        return {
            "loss": loss_first + loss_rest,
            "loss_first": loss_first,
            "loss_rest": loss_rest,
            "accuracy_first": (to_first.detach().argmax(1) == first).float().mean((1, 2)),
            "accuracy_rest": (to_rest.detach().argmax(1) == rest).float().mean((1, 2)),
        }, _colored(images).to(to_first.dtype)

    def _decode(self, logits: tuple[Tensor, Tensor], small: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """The mean colours of the predicted distributions."""
        first, rest = ((part.float() / self.temperature).softmax(1) for part in logits)
        return self.quantizer.decode(first, rest, small)

    def _error(self, guess: Float[Tensor, "b 3 s s"], small: Float[Tensor, "b 3 s s"]) -> Float[Tensor, " b"]:
        """CIE76, the distance in Lab, averaged over the cells of every image."""
        guess, small = (
            channels if self.quantizer.color_space == "lab" else from_rgb(channels.clamp(0, 1), "lab")
            for channels in (guess, small)
        )
        return (guess - small).norm(dim=1).mean((1, 2))

    def _resize(self, logits: Float[Tensor, "b n gh gw"]) -> Float[Tensor, "b n s s"]:
        size = self.quantizer.size
        if min(logits.shape[2:]) >= size:
            return F.adaptive_avg_pool2d(logits, size)
        return F.interpolate(logits, (size, size), mode="bilinear")


def _colored(images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, " b"]:
    return (images.amax(1) - images.amin(1)).amax((1, 2)) > GREY
