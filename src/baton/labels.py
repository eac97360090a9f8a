"""What tasks over classes share: the classes of the data, samples that have one, and the usual metrics."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from baton.task import Task


def find_classes(task: Task, num_classes: int | None, *, of_samples: bool = True) -> tuple[int, list[str] | None]:
    """Return how many classes a task has and, where the data can name all of them, their names.

    Args:
        task: with its data module, or none.
        num_classes: what the user says; `None` asks the data.
        of_samples: whether every sample that this run will compare with its class must have one; otherwise parts of it
            have classes, such as its pixels.

    Raises:
        ValueError: for fewer than two classes, fewer than the data have, or samples without one.
    """
    name, data = type(task).__name__, data_of(task)
    classes = num_classes or (data.num_classes if data is not None else 0)
    if classes < 2:
        raise ValueError(f"{name} needs labelled data of at least two classes, or model.num_classes.")
    if data is None:
        return classes, None
    if data.num_classes > classes:
        raise ValueError(f"model.num_classes={classes} is too few: the data have {data.num_classes} classes.")
    if of_samples:
        _check_samples(task, data)
    return classes, list(data.classes) if data.num_classes == classes else None


def data_of(task: Task) -> Any:
    """Return the data module of a task's trainer, or None."""
    return getattr(task.trainer, "datamodule", None) if task._trainer is not None else None


def _check_samples(task: Task, data: Any) -> None:
    stage = task.trainer.state.fn.value if task.trainer.state.fn else ""
    splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
    for split in splits:
        targets = getattr(getattr(data, f"{split}_set"), "targets", None)
        if targets is not None and (targets < 0).any():
            raise ValueError(
                f"{type(task).__name__} needs a class for every sample, but {int((targets < 0).sum())} of "
                f"{len(targets)} in the {split} split have none: use labelled data."
            )


def top_accuracies(classes: int, suffix: str = "") -> dict[str, Metric]:
    """Return metrics of class scores (B, classes): top-1 accuracy and, above five classes, top-5.

    Args:
        classes: how many.
        suffix: of the names, which are `accuracy` and `accuracy_top5`.
    """
    tops = {"accuracy": 1, "accuracy_top5": 5} if classes > 5 else {"accuracy": 1}
    return {
        f"{name}{suffix}": MulticlassAccuracy(classes, average="micro", top_k=top, validate_args=False)
        for name, top in tops.items()
    }


def with_errors(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values and, beside each accuracy, its error."""
    errors = {name.replace("accuracy", "error"): 1 - value for name, value in values.items() if "accuracy" in name}
    return {**values, **errors}
