"""SAE and SWWAE: a decoder that mirrors a plain network reconstructs the image from what the network keeps of it."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio
from torchvision.utils import make_grid

from baton import handover
from baton.data.images import Batch
from baton.labels import find_classes, top_accuracies, with_errors
from baton.layers.mirrored_decoder import MirroredDecoder, PlainRow, Tap
from baton.losses.reconstruction import euclidean, relative
from baton.task import Task, is_first_process

#: Of the image and of the maps after the first four poolings, for activations of images of 0 to 255: the paper's code.
PUBLISHED_WEIGHTS = (1e-4, 1e-12, 1e-12, 1e-12, 1e-10)


class Reconstruction(Task):
    """Reconstruct images, and the maps on the way to them, from the maps of a plain network; the decoder stays behind.

    `swwae` unpools to where the maxima were, `sae` to a fixed pixel. Variants: `first` compares the image alone,
    decoded from the last map all the way down; `all` compares every stage's output on that way as well, with the map
    that the encoder had there; `layerwise` decodes every map of the encoder by one stage. Without labels this is
    pretraining; with `classification_weight` the same network classifies (the paper's augmented networks), and with
    `frozen` only the decoder learns (its steps 2 and 3, and its study of what networks keep).

    The image is compared as it is normalised but for the division by the standard deviation, in units of [0, 1].

    Source: Zhang, Lee, Lee, "Augmenting supervised neural networks with unsupervised objectives for large-scale image
    classification" (ICML 2016), its slides and public code; Zhao et al., "Stacked what-where auto-encoders" (2015).

    Args:
        autoencoder: `sae` or `swwae`.
        variant: `first`, `all` or `layerwise`.
        depth: decode from this pooling, counted from 1, and leave the rest of the network out; None: from the last map.
            Only with `frozen`, because what is left out learns nothing.
        frozen: the backbone stays bit-identical, in evaluation mode.
        classification_weight: of the cross-entropy; 0: no labels are looked at.
        num_classes: number of classes; None asks the data.
        loss: `relative` to the target's energy, the same for every network, or `euclidean` as in the paper's code.
        weights: of the losses, the image's first; None: one each (`relative`), or those of the paper's code.
        detach_targets: let no gradient flow into the encoder's maps as targets. The paper's code lets it.
        decoder_from: a run of this task, or a checkpoint of one, whose decoder is taken. Its encoder must be the one
            that `init_from` gives, so name the same run in both.
        kwargs: see `Task`. The backbone must be a plain row of layers, such as `vgg16_bn`, `vgg16_small` or `njet_nin`.
            Where it has no max-pooling, `swwae` has no switches and decodes as `sae` does, which a warning says.
    """

    def __init__(
        self,
        autoencoder: Literal["sae", "swwae"] = "swwae",
        variant: Literal["first", "all", "layerwise"] = "all",
        depth: int | None = None,
        frozen: bool = False,
        classification_weight: float = 0.0,
        num_classes: int | None = None,
        loss: Literal["relative", "euclidean"] = "relative",
        weights: list[float] | None = None,
        detach_targets: bool = True,
        decoder_from: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if frozen and classification_weight:
            raise ValueError("model.frozen leaves the classifier as it is, so model.classification_weight must be 0.")
        if depth is not None and not frozen:
            raise ValueError("model.depth leaves a part of the network out, which learns nothing: set model.frozen.")
        self.variant, self.frozen, self.loss = variant, frozen, loss
        self.classification_weight, self.detach_targets = classification_weight, detach_targets
        self.num_classes = num_classes
        side = self.backbone.pretrained_cfg["input_size"][-1]
        self.row = PlainRow(self.backbone, side)
        self.decoder = MirroredDecoder(self.row, "known" if autoencoder == "swwae" else "fixed", depth)
        if autoencoder == "swwae" and not self.row.has_switches:
            rank_zero_warn(
                f"The backbone {self.hparams['backbone']} has no max-pooling whose switches swwae could use: it "
                "decodes as model.autoencoder=sae does."
            )
        self.weights = self._make_weights(weights)
        if frozen:
            self.freeze_modules(self.backbone)
        if decoder_from is not None:
            self._take_decoder(decoder_from)
        self.metrics = MetricCollection({"psnr": PeakSignalNoiseRatio(data_range=1.0)})

    def build(self) -> None:
        """Give the backbone a fresh classifier, where it is to classify and has kept none."""
        if self.classification_weight:
            classes, self.classes = find_classes(self, self.num_classes)
            self.num_classes = self.hparams["num_classes"] = classes
            self.need_classifier(classes)
            assert self.metrics is not None
            self.metrics.add_metrics({**top_accuracies(classes)})
        if self.compile_backbone:
            self._run = torch.compile(self._run)  # type: ignore[method-assign]

    def networks(self) -> list[Any]:
        """The decoder is run in the backbone's memory format."""
        return [self.backbone, self.decoder]

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Reconstruct images in [0, 1], decoding from the last map (or `depth`) all the way down."""
        taps = self.row(self.normalize(images), len(self.decoder.stages))
        return self.decoder.top_down(taps)[0] + self.mean

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum, every reconstruction's loss without its weight, and the classification's."""
        return self._losses(batch)[0]

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """As `losses`; the peak signal-to-noise ratio of the image, and accuracies, over the whole split."""
        losses, image, logits = self._losses(batch)
        assert self.metrics is not None
        for name, metric in self.metrics.items():
            if name == "psnr":
                metric.update((image + self.mean).clamp(0, 1).float(), batch[0])
            else:
                metric.update(logits, batch[1])
        losses.pop("error", None)  # counted by torchmetrics
        return losses

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the errors to the accuracies."""
        return with_errors(values)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the reconstruction (B, 3, H, W) in [0, 1] and its mean squared error (B,)."""
        pixels = self(batch[0]).clamp(0, 1).float()
        return {"mse": (pixels - batch[0]).square().flatten(1).mean(1), "reconstruction": pixels}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """The images, what is made of their last map and, where stages learn one by one, of their first map."""
        images = batch[0][:8]
        rows = [images, self(images)]
        if self.variant == "layerwise":
            taps = self.row(self.normalize(images), len(self.decoder.stages))
            rows.append(self.decoder.layerwise(taps)[0] + self.mean)
        grid = torch.cat([row.clamp(0, 1).float() for row in rows])
        return {"reconstruction": make_grid(grid, nrow=len(images), padding=2, pad_value=1.0)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds its decoder: it does not say where that once came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["decoder_from"] = None

    # Inside

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        images, labels = batch
        taps, outputs = self._run(self.normalize(images))
        compare = relative if self.loss == "relative" else euclidean
        targets = [images - self.mean, *(tap.map for tap in taps)]
        losses: dict[str, Tensor] = {}
        for index, (output, target) in enumerate(zip(outputs, targets, strict=False)):
            target = target.detach() if self.detach_targets else target
            losses["loss_image" if index == 0 else f"loss_map{index}"] = compare(output.float(), target.float())
        total = sum(weight * loss for weight, loss in zip(self.weights, losses.values(), strict=True))
        logits = None
        if self.classification_weight:
            logits = self.backbone.forward_head(taps[-1].map)
            losses["loss_class"] = F.cross_entropy(logits, labels)
            losses["error"] = (logits.detach().argmax(1) != labels).float().mean()
            total = total + self.classification_weight * losses["loss_class"]
        return {"loss": torch.as_tensor(total), **losses}, outputs[0], logits

    def _run(self, normalized: Float[Tensor, "b 3 h w"]) -> tuple[list[Tap], list[Tensor]]:
        """Taps of the encoder, and what the decoder makes of them: the image, and for `all` and others the maps."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            taps = self.row(normalized, len(self.decoder.stages))
        if self.variant == "layerwise":
            return taps, self.decoder.layerwise(taps)
        outputs = self.decoder.top_down(taps)
        return taps, outputs[:1] if self.variant == "first" else outputs

    def _make_weights(self, given: list[float] | None) -> list[float]:
        """One weight for every output that is compared."""
        count = 1 if self.variant == "first" else len(self.decoder.stages)
        if given is None:
            given = [1.0] * count if self.loss == "relative" else [*PUBLISHED_WEIGHTS[:count]]
        if len(given) != count or min(given) < 0 or not any(given):
            numbers = "number" if count == 1 else "numbers"
            raise ValueError(
                f"model.weights must be {count} {numbers} of at least 0 (the image's first; variant {self.variant}, "
                f"{len(self.decoder.stages)} poolings), not all 0, but got {given}."
            )
        return list(given)

    def _take_decoder(self, source: str) -> None:
        """Load the decoder of another run, every tensor of it."""
        path = Path(source)
        file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"model.decoder_from: there is no checkpoint {str(file)!r}; name a run of Reconstruction.")
        state = handover.load_checkpoint(file)["state_dict"]
        given = {name.removeprefix("decoder."): t for name, t in state.items() if name.startswith("decoder.")}
        own = self.decoder.state_dict()
        unfit = [name for name in given.keys() | own.keys() if name not in given or name not in own
                 or given[name].shape != own[name].shape]  # fmt: skip
        if unfit:
            raise ValueError(
                f"model.decoder_from: {len(unfit)} tensors of the decoder in {source!r} ({len(given)} tensors) do not "
                f"fit this one ({len(own)}), such as {min(unfit)}: use a run of Reconstruction with the same backbone "
                "and depth."
            )
        self._check_same_encoder(source, state)
        self.decoder.load_state_dict(given)
        if is_first_process():
            values = sum(tensor.numel() for tensor in given.values())
            print(f"{source}: decoder, {len(given)} of {len(own)} tensors, {values:,} values", flush=True)

    def _check_same_encoder(self, source: str, state: dict[str, Tensor]) -> None:
        """A decoder undoes one encoder: the steps of a recipe must follow each other, with one seed."""
        classifier = f"{self.backbone.pretrained_cfg['classifier']}."
        own = {name: value for name, value in self.backbone.state_dict().items() if not name.startswith(classifier)}
        theirs = {name: state.get(f"backbone.{name}", torch.empty(0)) for name in own}
        differing = [name for name, value in own.items() if not torch.equal(value, theirs[name].to(value))]
        if differing:
            raise ValueError(
                f"model.decoder_from: {source!r} trained its decoder with another encoder ({len(differing)} of "
                f"{len(own)} tensors differ, such as {differing[0]}): take model.init_from and model.decoder_from from "
                "the same run."
            )
