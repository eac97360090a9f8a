"""A teacher: a trained network that is looked at and never touched."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from baton import handover
from baton.distill.attention import Attention
from baton.distill.taps import Taps
from baton.losses import input_gradient
from baton.task import is_first_process

#: For every term, tensors whose first dimension is the batch.
Answers = dict[str, list[Tensor]]


class Teacher:
    """A network with its classifier from a hand-over, in evaluation mode, without gradients.

    It is no module, so that the task which holds it has none of its parameters: neither optimiser nor checkpoint nor
    hand-over see it, and a copy of the task (of averaged weights) shares it.

    Args:
        location: a model folder, a run directory, a Lightning checkpoint, `wandb:entity/project/name:alias` or
            `timm:<model>.<tag>`.
        channels_last: give it images in channels-last memory format.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no network with a classifier.
    """

    def __init__(self, location: str, channels_last: bool = False) -> None:
        source = handover.read_source(location)
        if not source.num_classes:
            raise ValueError(
                f"The teacher {location!r} has no classifier: name a run that classifies (Classification)."
            )
        network: Any = handover.build_backbone(source)
        report = handover.load_weights(network, source, classifier=True)
        self.network = network.requires_grad_(False).eval()
        self.location, self.sha256, self.lineage = location, source.sha256, source.lineage()
        self.num_classes, self.classes = source.num_classes, source.classes
        self.channels_last = channels_last
        self.mean, self.std = (torch.tensor(network.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
        self.taps = Taps(self.network, role="teacher")
        if is_first_process():
            print(f"{location}: teacher {source.architecture}, {report}", flush=True)

    def tap(self, paths: list[str]) -> None:
        """Return the outputs of these modules, too, from now on.

        Raises:
            ValueError: for a path that is no module.
        """
        self.taps = Taps(self.network, paths, role="teacher")

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Any]]:
        """Return class scores of images in [0, 1], and the maps; gradients flow to the images where they are wanted."""
        return self.taps(self.normalize(images))

    def answers(
        self,
        images: Float[Tensor, "b c h w"],
        targets: Int[Tensor, " b"],
        maps: Sequence[Tensor],
        names: Collection[str],
        attention: Attention,
    ) -> Answers:
        """Return what terms want to hear: class scores (kd), attention maps (at), maps (hint), the input gradient.

        Args:
            images: in [0, 1]; with `gradient`, they require one.
            targets: their classes.
            maps: of the student; attention maps are averaged down to those that are smaller.
            names: of the terms.
            attention: how it is measured.
        """
        answers: Answers = {}
        with torch.set_grad_enabled("gradient" in names):
            scores, features = self(images)
            if "gradient" in names:
                losses = F.cross_entropy(scores, targets, reduction="none")
                answers["gradient"] = [input_gradient(losses, images, differentiable=False)]
        with torch.no_grad():
            if "kd" in names:
                answers["kd"] = [scores.detach()]
            if "at" in names:
                answers["at"] = attention.maps(features, maps)
            if "hint" in names:
                answers["hint"] = [each.detach() for each in features]
        return answers

    def normalize(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Bring images from [0, 1] to the teacher's own mean and standard deviation, not the student's."""
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def follow(self, student: Tensor) -> None:
        """Move to the device, and to the precision, of one of the student's buffers."""
        if self.mean.device != student.device or self.mean.dtype != student.dtype:
            self.mean, self.std = self.mean.to(student), self.std.to(student)
            self.network.to(device=student.device, dtype=student.dtype)

    def check_same(self, recorded: dict[str, Any] | None) -> None:
        """Make sure that a run goes on with the teacher it began with.

        Args:
            recorded: what its checkpoint says about the teacher, if it had one.

        Raises:
            ValueError: the tensors are others.
        """
        if recorded is not None and recorded["sha256"] != self.sha256:
            raise ValueError(
                f"The teacher {self.location!r} (SHA-256 {self.sha256[:12]}…) is not the one this run began with "
                f"({recorded['source']!r}, {recorded['sha256'][:12]}…): bring that one back, or start a new run."
            )

    def check_classes(self, count: int, names: list[str] | None) -> None:
        """Make sure that its class scores mean what the student's are to mean.

        Args:
            count: classes of the student.
            names: of the classes, where the data know them.

        Raises:
            ValueError: they are others.
        """
        if self.num_classes != count:
            raise ValueError(
                f"The teacher {self.location!r} has {self.num_classes} classes, the student has {count}, so that its "
                "class scores say nothing here: name a teacher of the same classes, or use only at_weight and "
                "hint_weight."
            )
        if names and self.classes and names != self.classes:
            raise ValueError(
                f"The teacher {self.location!r} knows the classes {', '.join(self.classes)}, the data have "
                f"{', '.join(names)}: name a teacher of the same classes, in the same order."
            )

    def check_images(self, example: Float[Tensor, "1 3 h w"]) -> None:
        """Make sure that it can look at the images: some networks take one size alone.

        Args:
            example: an image of the student's, in [0, 1].

        Raises:
            ValueError: it cannot.
        """
        try:
            with torch.no_grad():
                self(example)
        except (AssertionError, RuntimeError, ValueError) as error:
            height, width = example.shape[2:]
            raise ValueError(
                f"The teacher {self.location!r} cannot look at images of {height} x {width} pixels "
                f"({handover.one_line(error)}): give images of its size, or name another teacher."
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def regressor(student: int, teacher: int) -> nn.Module:
    """A 1x1 convolution from the student's channels to the teacher's; nothing where they are equal.

    Source: thesis, section 6.4.1.2: "for networks of the same width ... directly, without 1x1 convolutions".

    Args:
        student: channels.
        teacher: channels.
    """
    return nn.Identity() if student == teacher else nn.Conv2d(student, teacher, 1)
