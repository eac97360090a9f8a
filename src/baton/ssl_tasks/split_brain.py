"""Split-brain autoencoders: each half of the network predicts the colour channels that only the other one sees."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchvision.utils import make_grid

from baton.backbones.fully_convolutional import PREDICTORS
from baton.data.images import Batch
from baton.layers.color_space import from_rgb
from baton.ssl_tasks.color_quantizer import ColorQuantizer, QuantizedSpace
from baton.task import Task, is_first_process

#: An image whose channels differ by no more than this anywhere is grey: there is no colour to predict.
GREY = 2.5 / 255
#: Training images that are looked at before the first step.
LOOKED_AT = 1000


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
        kwargs: see `Task`. The backbone is `split_brain`; its colour space and outputs follow from the targets.
    """

    mean_color: Tensor

    def __init__(
        self,
        space: QuantizedSpace = "lab_rescaled",
        bins: Sequence[int] = (100, 10),
        size: int = 12,
        **kwargs: Any,
    ) -> None:
        if len(bins) != 2:
            raise ValueError(f"model.bins must be two numbers, of the first channel and of the others, got {bins}.")
        quantizer = ColorQuantizer(space, (bins[0], bins[1]), size)
        classes = quantizer.num_classes
        given = kwargs.get("backbone_kwargs") or {}
        if kwargs.get("backbone") == "split_brain" and not kwargs.get("init_from"):
            fitting: dict[str, Any] = {"space": quantizer.color_space}
            if given.get("base", "fc_resnet18") in PREDICTORS:
                fitting["out_chans"] = [classes[1], classes[0]]
            kwargs["backbone_kwargs"] = {**fitting, **given}
        super().__init__(**kwargs)
        if not hasattr(self.backbone, "half_features"):
            name = self.hparams["backbone"]
            raise ValueError(
                f"SplitBrain needs the backbone split_brain, two halves of any network, but got {name}: use "
                f"--model.backbone split_brain --model.backbone_kwargs '{{base: {name}}}'."
            )
        if self.backbone.space != quantizer.color_space:
            raise ValueError(
                f"The targets are in {quantizer.color_space}, but the backbone sees {self.backbone.space}: use another "
                "model.space, or another backbone."
            )
        self.quantizer = quantizer
        built = self.hparams["backbone_kwargs"] or {}
        own = built.get("base", "fc_resnet18") in PREDICTORS
        channels = self.backbone.half_features
        if own and channels != (classes[1], classes[0]):
            raise ValueError(
                f"The backbone predicts {channels[0]} and {channels[1]} classes, but space, bins and size ask for "
                f"{classes[1]} and {classes[0]}: set model.bins, or out_chans in model.backbone_kwargs."
            )
        wanted = ((channels[0], classes[1]), (channels[1], classes[0]))
        self.predictors = nn.ModuleList(nn.Identity() if own else nn.Conv2d(i, o, 1) for i, o in wanted)
        #: of the training images: what always answering the same colour would say
        self.register_buffer("mean_color", torch.zeros(2))
        self.metrics = MetricCollection(
            {name: MeanMetric("ignore") for name in ("loss", "loss_first", "loss_rest", "accuracy_first",
             "accuracy_rest", "delta_e", "delta_e_mean")}, compute_groups=False,
        )  # fmt: skip

    def build(self) -> None:
        """Look at training images: is there any colour, and which is its mean?"""
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        if data is None or self.trainer.state.fn != "fit":
            return
        count = min(len(data.train_set), LOOKED_AT)
        places = [index * len(data.train_set) // count for index in range(count)]
        sums, colored = torch.zeros(2), 0
        for begin in range(0, count, 100):
            images = data.to_float(data.train_set.__getitems__(places[begin : begin + 100])[0])
            images = images[_colored(images)].to(self.device)
            if len(images):
                sums += self.quantizer.channels(images)[:, 1:].mean((2, 3)).sum(0).cpu()
            colored += len(images)
        if not colored:
            raise ValueError(
                f"All of {count} training images looked at are grey, so there is no colour to predict: use colour "
                "images."
            )
        if colored < count and is_first_process():
            print(f"{count - colored} of {count} training images looked at are grey; they are skipped.", flush=True)
        self.mean_color.copy_(sums / colored)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b n s s"], Float[Tensor, "b m s s"]]:
        """Logits of the first channel's classes and of the other two's, for images in [0, 1]."""
        features = self.backbone.forward_features(self.normalize(images))
        seen_first, seen_rest = features.split(list(self.backbone.half_features), dim=1)
        to_rest, to_first = self.predictors
        return self._resize(to_first(seen_rest)), self._resize(to_rest(seen_first))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropies and accuracies of the halves, named after what they predict, and the share of grey images."""
        measured, colored = self._measure(batch[0])
        means = {name: (values * colored).mean() for name, values in measured.items()}
        return {**means, "grey": 1 - colored.mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """As `losses`, over coloured images, and the colour error in CIE76.

        `delta_e` is that of the colour predicted from the first channel (the mean colour of the predicted
        distribution) beside the true first channel; `delta_e_mean` that of the training images' mean colour.
        """
        images = batch[0]
        measured, colored = self._measure(images)
        assert self.metrics is not None
        small = self.quantizer.channels(images)
        decoded = self._colors(images, small)
        constant = torch.cat([small[:, :1], self.mean_color.to(small).view(1, 2, 1, 1).expand_as(small[:, 1:])], 1)
        for name, guess in (("delta_e", decoded), ("delta_e_mean", constant)):
            measured[name] = (self._lab(guess) - self._lab(small)).norm(dim=1).mean((1, 2))
        for name, values in measured.items():
            self.metrics[name].update(values, colored)
        return {"grey": 1 - colored.mean()}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the small images (B, 3, S, S) with colours predicted from their first channel, and their errors."""
        small = self.quantizer.channels(batch[0])
        decoded = self._colors(batch[0], small)
        error = (self._lab(decoded) - self._lab(small)).norm(dim=1).mean((1, 2))
        return {"delta_e": error, "colors": self.quantizer.to_rgb(decoded).float()}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Rows: the image, the small image, its classes decoded, both predictions, colours from the first channel."""
        images = batch[0][:8]
        small = self.quantizer.channels(images)
        first, rest = (logits.float().softmax(1) for logits in self(images))
        rows = [
            small,
            self.quantizer.decode(*self.quantizer.quantize(small), small),
            self.quantizer.decode(first, rest, small),
            self._colors(images, small),
        ]
        large = [F.interpolate(self.quantizer.to_rgb(row), images.shape[2:], mode="nearest") for row in rows]
        grid = torch.cat([images, *large]).clamp(0, 1).float()
        return {"colors": make_grid(grid, nrow=len(images), padding=2, pad_value=1.0)}

    # Inside

    def _measure(self, images: Float[Tensor, "b 3 h w"]) -> tuple[dict[str, Tensor], Float[Tensor, " b"]]:
        """Losses and accuracies of every image, and 1 for coloured ones, 0 for grey ones."""
        small = self.quantizer.channels(images)
        first, rest = self.quantizer.quantize(small)
        to_first, to_rest = (logits.float() for logits in self(images))
        loss_first, loss_rest = _cross_entropy(to_first, first), _cross_entropy(to_rest, rest)
        if self.quantizer.space == "lab_gamut":
            weights, classes = self.quantizer.soft(small)
            loss_rest = -(to_rest.log_softmax(1).gather(1, classes) * weights).sum(1).mean((1, 2))
        return {
            "loss": loss_first + loss_rest,
            "loss_first": loss_first,
            "loss_rest": loss_rest,
            "accuracy_first": (to_first.detach().argmax(1) == first).float().mean((1, 2)),
            "accuracy_rest": (to_rest.detach().argmax(1) == rest).float().mean((1, 2)),
        }, _colored(images).to(to_first.dtype)

    def _colors(self, images: Float[Tensor, "b 3 h w"], small: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """The true first channel beside the mean of the predicted distribution of the other two."""
        first, rest = self(images)
        decoded = self.quantizer.decode(first.float().softmax(1), rest.float().softmax(1), small)
        return torch.cat([small[:, :1], decoded[:, 1:]], dim=1)

    def _lab(self, channels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        return channels if self.quantizer.color_space == "lab" else from_rgb(channels.clamp(0, 1), "lab")

    def _resize(self, logits: Float[Tensor, "b n gh gw"]) -> Float[Tensor, "b n s s"]:
        size = self.quantizer.size
        if min(logits.shape[2:]) >= size:
            return F.adaptive_avg_pool2d(logits, size)
        return F.interpolate(logits, (size, size), mode="bilinear")


def _colored(images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, " b"]:
    return (images.amax(1) - images.amin(1)).amax((1, 2)) > GREY


def _cross_entropy(logits: Float[Tensor, "b n s s"], classes: Int[Tensor, "b s s"]) -> Float[Tensor, " b"]:
    """Mean over the cells of every image."""
    return F.cross_entropy(logits, classes, reduction="none").mean((1, 2))
