"""How much of an image does a network look at? The effective receptive field of its last map, figure 13."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from baton.callbacks.drawing import Drawing, new_figure
from baton.task import Task

_KINDS = ("map", "scores")


class ReceptiveField(Drawing):
    """Measure and draw the effective receptive field of the backbone's last map at the end of training.

    Pintea et al., "Resolution learning in deep convolutional networks using scale-space theory" (arXiv:2106.03412),
    figure 13: the gradient of what is computed at the centre with respect to the image, absolute, averaged over images
    and channels. Its side is the usual measure of Luo et al., "Understanding the effective receptive field in deep
    convolutional neural networks" (NIPS 2016, arXiv:1701.04128): the square root of the number of pixels above a
    fraction, 1 - 95.45 %, of the largest.

    The metric `receptive_field/side` is recorded after the last epoch, in pixels; `receptive_field.png` shows the field
    and `receptive_field.npy` holds it, (height, width). Images are of the validation split, or of the training split
    where there is no other. The weights stay as they are.

    Args:
        images: over how many the field is averaged.
        of: whose gradient is taken at the middle cell: `map`, the mean over the map's channels, or `scores`, the
            largest class score that the classifier gives there.
        fraction: of the largest value, above which a pixel belongs to the field.
        folder: where the files go; the command sets it to the run's `pictures/`.

    Raises:
        ValueError: for another `of`, no images, or a fraction outside [0, 1).
    """

    def __init__(self, images: int = 16, of: str = "map", fraction: float = 0.0455, folder: str | None = None) -> None:
        super().__init__(folder)
        if of not in _KINDS:
            raise ValueError(f"Expected of 'map' or 'scores', but got {of!r}.")
        if images < 1 or not 0 <= fraction < 1:
            raise ValueError(f"Expected 1 image or more and a fraction in [0, 1), but got {images} and {fraction}.")
        self.images, self.of, self.fraction = images, of, fraction
        self._kept: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep training images where nothing better will come."""
        if not trainer.val_dataloaders:
            self._keep(batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep validation images."""
        if trainer.state.fn == "fit":
            self._keep(batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and draw after the last epoch."""
        if not isinstance(pl_module, Task) or not _ends(trainer) or not self._kept:
            return
        field = self._measure(pl_module)
        field = trainer.strategy.reduce(field, reduce_op="mean").cpu()
        side = side_of(field, self.fraction)
        pl_module.record({"receptive_field/side": side})
        if trainer.is_global_zero:
            self.show(trainer, "receptive_field", draw(field, side))
            if self.folder is not None:
                np.save(self._path("receptive_field.npy"), field.numpy())

    def _keep(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._kept = []
        missing = self.images - sum(map(len, self._kept))
        if missing > 0:
            self._kept.append(batch[0][:missing].detach())

    def _measure(self, task: Task) -> Float[Tensor, "height width"]:
        def score(images: Tensor) -> Tensor:
            cells = task.feature_map(images)
            cell = cells[:, :, cells.shape[2] // 2, cells.shape[3] // 2]
            return cell.mean(1) if self.of == "map" else _classifier(task)(cell).amax(1)

        training = task.training
        task.eval()
        with torch.compiler.set_stance("force_eager"):
            fields = [len(images) * effective_receptive_field(score, images) for images in self._kept]
        task.train(training)
        return torch.stack(fields).sum(0) / sum(map(len, self._kept))


def effective_receptive_field(
    score: Callable[[Tensor], Tensor], images: Float[Tensor, "n channels height width"]
) -> Float[Tensor, "height width"]:
    """Absolute gradient of a score with respect to the image, averaged over images and channels.

    Args:
        score: gives (n,) numbers of n images, each of its own image.
        images: to look at.
    """
    images = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(images).sum(), images)
    return gradient.abs().mean((0, 1))


def side_of(field: Float[Tensor, "height width"], fraction: float = 0.0455) -> float:
    """The square root of the number of pixels above a fraction of the largest.

    Args:
        field: of values of 0 or more.
        fraction: of the largest value.
    """
    return float((field > fraction * field.max()).sum()) ** 0.5


def draw(field: Float[Tensor, "height width"], side: float) -> Any:
    """Draw a field, and a square of its side in its middle.

    Args:
        field: of values of 0 or more.
        side: in pixels.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.patches import Rectangle

    figure = new_figure(3.6, 3.9)
    axis = figure.subplots()
    axis.imshow(field.numpy(), cmap="magma", vmin=0, interpolation="nearest")
    middle = field.shape[1] / 2 - 0.5, field.shape[0] / 2 - 0.5
    corner = middle[0] - side / 2, middle[1] - side / 2
    axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="w", linestyle="--", linewidth=0.8))
    axis.set(title=f"effective receptive field: {side:.1f} pixels a side")
    axis.title.set_fontsize(9)
    return figure


def _classifier(task: Task) -> nn.Linear:
    classifier = task.backbone.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            "ReceptiveField with of='scores' needs a backbone with a linear classifier, but "
            f"{task.hparams['backbone']!r} has {type(classifier).__name__}: use of='map'."
        )
    return classifier


def _ends(trainer: Trainer) -> bool:
    """Whether this epoch is the last."""
    by_steps = trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps
    return trainer.should_stop or by_steps or trainer.current_epoch + 1 == trainer.max_epochs
