"""Distillation: a student learns from labels and from what a trained teacher makes of the same images."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MetricCollection

from baton import losses as terms
from baton.data.images import Batch
from baton.distill.attention import Attention
from baton.distill.attention_pictures import Before, draw_attention
from baton.distill.taps import Taps, pair_paths
from baton.distill.teacher import Answers, Teacher, regressor
from baton.distill.teacher_cache import TeacherCache
from baton.distill.weights import Weights
from baton.labels import data_of, find_classes, top_accuracies, with_errors
from baton.random_state import fixed_randomness
from baton.task import Task

#: Terms that look at the teacher, at maps of both networks, at class scores of the teacher, and at input gradients.
_TEACHER, _MAPS = {"kd", "at", "hint", "gradient"}, {"at", "hint"}
_SCORES, _GRADIENTS = {"kd", "gradient"}, {"gradient", "symmetry", "gradient_penalty"}

#: Images of which attention is drawn.
_SHOWN = 8


class Distillation(Task):
    """Train a student to classify, and to agree with a trained teacher on the same augmented images.

    The loss is the sum of weighted terms; a term that weighs 0 is not computed, any others go together:

        ce                  cross-entropy with the labels
        kd                  knowledge distillation, `baton.losses.knowledge_distillation`
        at                  attention transfer, `baton.losses.attention_transfer`, summed over `pairs`
        hint                FitNets' hints (full-activation transfer), `baton.losses.hint_loss`, summed over `pairs`;
                            where channels differ, a 1x1 convolution that stays behind regresses one to the other
        gradient            attention transfer of the gradient of the cross-entropy with respect to the image
        symmetry            invariance of that gradient under horizontal flips; needs no teacher
        gradient_penalty    the norm of that gradient (double backpropagation); needs no teacher

    The teacher stays in evaluation mode and bit-identical, and its mean and standard deviation are its own. It is
    needed to train, not to evaluate, to predict or to load a checkpoint: validation and test report the cross-entropy
    and the accuracy of the student. A checkpoint records which teacher it was, and a resumed run checks that.

    Gradients are taken with respect to the images in [0, 1], which both networks share; BatchNorm's statistics are
    those of the batch, also in the second backward pass, and those of `symmetry`'s flipped images count as well.

    Source: chapter 6 of Zagoruyko's thesis, which is Zagoruyko and Komodakis, "Paying More Attention to Attention"
    (ICLR 2017), and its public code: `at_weight` 1000 (its beta), `kd_weight` 0.9 and `ce_weight` 0.1 (its alpha and
    1 - alpha) at temperature 4. The thesis decays beta when attention transfer is combined with distillation, without
    a schedule (`final: {at: 0}` here), and adds it from epoch 60 on ImageNet (`start_epoch`), which its code does not.
    FitNets (Romero et al., 2015) are two runs: the hint alone up to its layer, then distillation that starts from it.

    Args:
        teacher: the trained network: a model folder, a run directory, a Lightning checkpoint,
            `wandb:entity/project/name:alias` or `timm:<model>.<tag>`. It needs its classifier.
        num_classes: number of classes; None asks the data.
        ce_weight: of the cross-entropy.
        kd_weight: of knowledge distillation.
        temperature: of knowledge distillation.
        kd_form: `kl`, or `legacy`, with which the published numbers were made.
        at_weight: of attention transfer.
        at_power: exponent of activations in an attention map.
        at_reduce: over the channels of an attention map: `sum` or `max`.
        at_form: `code` (mean of squared differences) or `paper` (norm of the difference).
        hint_weight: of the hints.
        hint_normalize: divide activations by their norm before they are compared, as the thesis does; FitNets do not.
        gradient_weight: of gradient attention transfer, half the beta of equation 6.2.
        symmetry_weight: of the symmetry of gradients, half the beta of equation 6.3.
        gradient_penalty_weight: of the squared norm of gradients.
        pairs: modules whose outputs are compared, (path in the student, path in the teacher) each, such as
            `[[group1, group1], [group2.0, group2.0]]`; None: the groups of both networks, first with first.
        start_epoch: epochs, counted from 1, in which terms begin: `{at: 60}` is after 59 full epochs.
        final: fraction of its weight that a term reaches at the end of training, linearly from its start: `{at: 0}`.
        cache_teacher: let the teacher look at every training image once, and keep in memory what it said: for data
            without augmentation. Of an image, each process keeps the class scores for `kd` (4 bytes each), the
            attention maps for `at` (4 bytes a cell: 5,376 for the groups of a Wide ResNet at 32 pixels) and whole maps
            for `hint` (4 bytes an element: 65,536 for 64 channels of 16 x 16); scores and whole maps take half of it
            in half precision. Input gradients are not kept.
        kwargs: see `Task`.
    """

    def __init__(
        self,
        teacher: str | None = None,
        num_classes: int | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        kd_form: Literal["kl", "legacy"] = "kl",
        at_weight: float = 0.0,
        at_power: float = 2.0,
        at_reduce: Literal["sum", "max"] = "sum",
        at_form: Literal["code", "paper"] = "code",
        hint_weight: float = 0.0,
        hint_normalize: bool = False,
        gradient_weight: float = 0.0,
        symmetry_weight: float = 0.0,
        gradient_penalty_weight: float = 0.0,
        pairs: list[list[str]] | None = None,
        start_epoch: dict[str, int] | None = None,
        final: dict[str, float] | None = None,
        cache_teacher: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        weights = {"ce": ce_weight, "kd": kd_weight, "at": at_weight, "hint": hint_weight, "gradient": gradient_weight,
                   "symmetry": symmetry_weight, "gradient_penalty": gradient_penalty_weight}  # fmt: skip
        self.weights = Weights(weights, start_epoch, final)
        self.num_classes, self.pairs, self.hint_normalize = num_classes, pairs, hint_normalize
        self.temperature, self.kd_form = temperature, kd_form
        self.attention, self.cache_teacher = Attention(at_power, at_reduce, at_form), cache_teacher
        self._check_options(teacher)
        self._source = teacher
        self.teacher: Teacher | None = None
        self._cache: TeacherCache | None = None
        self._before: Before | None = None
        self.student = Taps(self.backbone)
        self.regressors = nn.ModuleList()

    def _check_options(self, teacher: str | None) -> None:
        if not self.temperature > 0 or self.attention.power < 1:
            raise ValueError(
                f"model.temperature must be above 0 and model.at_power at least 1, but got {self.temperature} and "
                f"{self.attention.power}."
            )
        if teacher is not None and not self._uses(_TEACHER):
            raise ValueError(
                "model.teacher is given, but no term looks at it: set model.kd_weight, model.at_weight, "
                "model.hint_weight or model.gradient_weight, or leave the teacher out."
            )
        if self.cache_teacher and not self._uses(_TEACHER):
            raise ValueError(
                "model.cache_teacher keeps what a teacher says, but no term listens to it: set model.kd_weight, "
                "model.at_weight or model.hint_weight, or leave cache_teacher out."
            )
        if self.cache_teacher and self._uses({"gradient"}):
            raise ValueError(
                "model.cache_teacher keeps class scores and maps, not the input gradient that model.gradient_weight "
                "compares: leave one of them out."
            )
        if self.compile_backbone and self._uses(_GRADIENTS):
            raise ValueError(
                "model.compile makes networks without second derivatives, which gradient_weight, symmetry_weight and "
                "gradient_penalty_weight need: leave compile out."
            )

    # Lightning's hooks, and Task's

    def build(self) -> None:
        """Give the student a fresh classifier and, to train, bring in the teacher."""
        classes, self.classes = find_classes(self, self.num_classes)
        self.num_classes = self.hparams["num_classes"] = classes
        self.need_classifier(classes)
        self.metrics = MetricCollection({**top_accuracies(classes)})
        if self._trainer is None:
            if self._source is not None:
                self._bring_in(self._source)
        elif self.trainer.state.fn == "fit":
            self._need_teacher()

    def on_fit_start(self) -> None:
        """Bring in the teacher of a task that was evaluated, or loaded from a checkpoint, before."""
        self._need_teacher()
        epochs = self.trainer.max_epochs
        if epochs is not None and epochs > 0:  # before anything is written; how long an epoch is, is not known yet
            self.weights.check_length(epochs)
        if self.cache_teacher:
            self._cache = TeacherCache(data_of(self))

    def on_fit_end(self) -> None:
        """Forget what the teacher said about these images."""
        self._cache = None

    def on_train_start(self) -> None:
        """Make sure that training is long enough for what is scheduled; see where the student looks before it."""
        super().on_train_start()
        self.weights.check_length(self._training_length()[1])
        data = data_of(self)
        if self.global_step == 0 and self.teacher is not None and self.student.paths and data is not None:
            images = data.examples(_SHOWN)
            maps = self._attention_of_student(data.to_float(images.to(self.device)))
            self._before = Before(images, [each.cpu() for each in maps])

    def networks(self) -> list[nn.Module]:
        """The teacher runs as the student does."""
        return [self.backbone, *([self.teacher.network] if self.teacher is not None else [])]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint needs no teacher, and records which one it had."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["teacher"] = None
        checkpoint["baton"]["teacher"] = self.taught_by
        checkpoint["baton"]["attention_before"] = self._before and vars(self._before)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the teacher is still the same; without one, make the regressors that the checkpoint holds."""
        super().on_load_checkpoint(checkpoint)
        record = checkpoint.get("baton", {})
        before = record.get("attention_before")
        self._before = Before(**before) if before else None
        if self.teacher is not None:
            self.teacher.check_same(record.get("teacher"))
            return
        self.taught_by = record.get("teacher")
        if not len(self.regressors):
            shapes = {int(name.split(".")[1]): value.shape for name, value in checkpoint["state_dict"].items()
                      if name.startswith("regressors.") and name.endswith(".weight")}  # fmt: skip
            for index in range(max(shapes, default=-1) + 1):
                theirs, ours = shapes.get(index, (0, 0))[:2]
                self.regressors.append(regressor(ours, theirs))
            self.regressors.to(self.device)

    # What it learns and shows

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum, every term without its weight, and the training error."""
        images, targets = batch
        weights = self._present_weights()
        if weights.keys() & _GRADIENTS:
            images = images.detach().requires_grad_()
        logits, maps = self.student(self.normalize(images))
        found: dict[str, Tensor] = {}
        if "ce" in weights:
            found["ce"] = F.cross_entropy(logits, targets)
        theirs = self._ask_teacher(images, targets, maps, set(weights))
        if "kd" in weights:
            found["kd"] = terms.knowledge_distillation(logits, theirs["kd"][0], self.temperature, self.kd_form)
        if "at" in weights:
            found["at"] = self.attention.transfer(maps, theirs["at"])
        if "hint" in weights:
            features = [regress(own) for regress, own in zip(self.regressors, maps, strict=True)]
            found["hint"] = terms.hint_loss(features, theirs["hint"], self.hint_normalize)
        if weights.keys() & _GRADIENTS:
            found |= self._gradient_terms(images, targets, logits, theirs.get("gradient", []), weights)
        total = torch.stack([weight * found[name] for name, weight in weights.items()]).sum()
        error = (logits.detach().argmax(1) != targets).float().mean()
        return {"loss": total, **{f"loss_{name}": value for name, value in found.items()}, "error": error}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The student's cross-entropy; top-1 and (above five classes) top-5 are counted by torchmetrics."""
        images, targets = batch
        logits, _ = self.student(self.normalize(images))
        assert self.metrics is not None
        self.metrics.update(logits, targets)
        return {"loss": F.cross_entropy(logits, targets)}

    def summarize(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the errors to the accuracies."""
        return with_errors(values)

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return the student's class, its probability, and the target (-1 where unknown)."""
        images, targets = batch
        logits, _ = self.student(self.normalize(images))
        probability, prediction = logits.softmax(1).max(1)
        return {"prediction": prediction, "probability": probability, "target": targets}

    def pictures(self, batch: Batch) -> dict[str, Float[Tensor, "3 h w"]]:
        """Images, and where the student looked in them before training, looks now, and where the teacher looks.

        A run shows the same images from beginning to end: those of the data's `examples` (figures 6.4 and 6.6 of the
        thesis).
        """
        if self.teacher is None or not self.student.paths:
            return {}
        images = batch[0][:_SHOWN]
        if self._before is not None:
            images = self._before.images.to(self.device).float() / 255  # as every data module's `to_float`
        self.teacher.follow(self.mean)
        sides = {"student": (self.student.paths, self._attention_of_student(images))}
        if self._before is not None:
            sides = {"student before": (self.student.paths, self._before.maps), **sides}
        sides["teacher"] = self.teacher.taps.paths, self.attention.maps(self.teacher(images)[1])
        rows = {
            f"{who}\n{paths[index]}": maps[index]
            for index in range(len(self.student.paths))
            for who, (paths, maps) in sides.items()
        }
        return {"attention": draw_attention(images, rows)}

    # Inside

    def _uses(self, names: set[str]) -> bool:
        return any(name in self.weights for name in names)

    def _present_weights(self) -> dict[str, float]:
        if self._trainer is None or not self.trainer.training:
            return self.weights.now()
        per_epoch, epochs = self._training_length()
        return self.weights.now(self.global_step / per_epoch, epochs)

    def _need_teacher(self) -> None:
        if self.teacher is None and self._uses(_TEACHER):
            source = self._source or (self.taught_by or {}).get("source")
            if source is None:
                raise ValueError("model.teacher is missing: name the run, or the model, that the student learns from.")
            self._bring_in(source)

    def _bring_in(self, source: str) -> None:
        """Load the teacher, and make sure, before any training, that this student can learn from it."""
        assert self.num_classes is not None
        with fixed_randomness(torch.initial_seed() + 1):
            teacher = Teacher(source, self.channels_last)
            teacher.check_same(self.taught_by)
            if self._uses(_SCORES):
                teacher.check_classes(self.num_classes, self.classes)
            teacher.follow(self.mean)
            example = self._example()
            teacher.check_images(example)
            if self._uses(_MAPS):
                ours, theirs = pair_paths(self.backbone, teacher.network, self.pairs)
                self.student = Taps(self.backbone, ours)
                teacher.tap(theirs)
                shapes = self.student.shapes(self.normalize(example))
                their_shapes = teacher.taps.shapes(teacher.normalize(example))
                if "hint" in self.weights and not len(self.regressors):
                    channels = zip(shapes, their_shapes, strict=True)
                    self.regressors.extend(regressor(own[1], other[1]) for own, other in channels)
                    self.regressors.to(self.mean)
        self.teacher, self.taught_by = teacher, teacher.lineage

    def _example(self) -> Float[Tensor, "1 3 h w"]:
        """An image of the size that the networks will see."""
        data = data_of(self)
        if data is None:
            return torch.zeros(1, *self.backbone.pretrained_cfg["input_size"]).to(self.mean)
        return data.to_float(data.train_set.__getitems__([0])[0]).to(self.mean)

    def _ask_teacher(
        self, images: Float[Tensor, "b c h w"], targets: Int[Tensor, " b"], maps: list[Tensor], names: set[str]
    ) -> Answers:
        """What the teacher says to the terms that are there now; `maps` are the student's."""
        if not names & _TEACHER:
            return {}
        if self.teacher is None:
            raise ValueError("There is no teacher to learn from: name one (model.teacher), and fit.")
        teacher, attention = self.teacher, self.attention
        teacher.follow(self.mean)
        if self._cache is None:
            return teacher.answers(images, targets, maps, names, attention)
        listening = {name for name in _TEACHER if name in self.weights}  # also those that begin later
        return self._cache.recall(
            lambda which: teacher.answers(images[which], targets[which], maps, listening, attention), self.device
        )

    def _attention_of_student(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Its attention maps in evaluation mode."""
        training = self.training
        self.eval()
        with torch.no_grad():
            _, maps = self.student(self.normalize(images))
        self.train(training)
        return self.attention.maps(maps)

    def _gradient_terms(
        self,
        images: Float[Tensor, "b c h w"],
        targets: Int[Tensor, " b"],
        logits: Float[Tensor, "b classes"],
        their_gradient: list[Tensor],
        weights: dict[str, float],
    ) -> dict[str, Tensor]:
        found = {}
        gradient = terms.input_gradient(F.cross_entropy(logits, targets, reduction="none"), images)
        if "gradient" in weights:
            found["gradient"] = terms.gradient_attention_transfer(gradient, *their_gradient)
        if "symmetry" in weights:
            flipped = images.detach().flip(-1).requires_grad_()
            scores, _ = self.student(self.normalize(flipped))
            other = terms.input_gradient(F.cross_entropy(scores, targets, reduction="none"), flipped)
            found["symmetry"] = terms.gradient_symmetry(gradient, other)
        if "gradient_penalty" in weights:
            found["gradient_penalty"] = terms.gradient_penalty(gradient)
        return found
