"""What a teacher said about training images, kept so that it need not look at the same image twice."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from baton.distill.teacher import Answers
from baton.task import is_first_process


class TeacherCache:
    """A teacher's answers by the index of the image, in the memory of the host, in the precision they were given in.

    It is filled as training goes along: the teacher is asked about images that are not known yet, alone. Every process
    keeps what it has seen itself, and a resumed run begins with nothing.

    Args:
        data: the data module, which tells from now on which training images a batch holds.

    Raises:
        ValueError: its training images vary from epoch to epoch.
    """

    def __init__(self, data: Any) -> None:
        if data is None:
            raise ValueError("model.cache_teacher needs to know which images it sees: train with a data module.")
        if augmentation := data.augmentation():
            raise ValueError(
                f"model.cache_teacher needs the same images in every epoch, but {augmentation} would vary them: leave "
                "the augmentation out, or cache_teacher."
            )
        data.tells_indices = True
        self._data, count = data, len(data.train_set)
        self._known = torch.zeros(count, dtype=torch.bool)
        self._kept: Answers = {}

    def recall(self, ask: Callable[[Int[Tensor, " unknown"]], Answers], device: Any) -> Answers:
        """Return the answers for the present batch.

        Args:
            ask: returns the teacher's answers for the samples at these places of the batch.
            device: where they are needed.

        Raises:
            ValueError: they do not fit into memory.
        """
        indices = self._data.batch_indices
        assert indices is not None  # while training
        unknown = (~self._known[indices]).nonzero().flatten()
        if len(unknown):
            self._keep(indices[unknown], ask(unknown))
        return {
            name: [values.index_select(0, indices).to(device, non_blocking=True) for values in kept]
            for name, kept in self._kept.items()
        }

    def _keep(self, indices: Int[Tensor, " unknown"], answers: Answers) -> None:
        if not self._kept:
            self._make_room(answers)
        for name, tensors in answers.items():
            for kept, values in zip(self._kept[name], tensors, strict=True):
                kept[indices] = values.detach().cpu()
        self._known[indices] = True

    def _make_room(self, answers: Answers) -> None:
        """Reserve memory for all images; the system hands it out as it is filled."""
        count = len(self._known)
        size = sum(values[0].numel() * values.element_size() for each in answers.values() for values in each)
        whole = f"{size:,} bytes an image, {size * count / 1e9:,.2f} GB for {count:,} images"
        try:
            self._kept = {
                name: [torch.empty(count, *values.shape[1:], dtype=values.dtype) for values in tensors]
                for name, tensors in answers.items()
            }
        except RuntimeError as error:
            raise ValueError(
                f"model.cache_teacher keeps {whole}, which do not fit into memory: leave it out, or use fewer pairs."
            ) from error
        if is_first_process():
            print(f"teacher: its answers are kept, {whole} and process", flush=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherCache":
        return self
