"""How much each term of a loss counts, and from when on."""

import difflib
import math
from collections.abc import Mapping
from typing import Any


class Weights:
    """Weights of named terms during training; a term that weighs 0 is not there.

    Args:
        weights: of every term.
        start_epoch: epochs, counted from 1, in which terms begin; others are there from the first epoch on.
        final: fractions of their weights that terms reach at the end of training, linearly from their start on.

    Raises:
        ValueError: for a negative weight, only zeros, nothing to begin with, or a schedule of a term that is not used.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        start_epoch: Mapping[str, int] | None = None,
        final: Mapping[str, float] | None = None,
    ) -> None:
        if negative := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
            raise ValueError(
                f"model.{negative[0]}_weight must be 0 (the term is left out) or more, but got {weights[negative[0]]}."
            )
        self._weights = {name: float(weight) for name, weight in weights.items() if weight}
        self._start, self._final = dict(start_epoch or {}), dict(final or {})
        for option, values in (("start_epoch", self._start), ("final", self._final)):
            for name, value in values.items():
                self._check(option, name, value, set(weights))
        if not self._weights:
            raise ValueError(f"All weights are 0: give one of {', '.join(f'model.{name}_weight' for name in weights)}.")
        if all(self._start.get(name, 1) > 1 for name in self._weights):
            raise ValueError("model.start_epoch leaves nothing to learn in the first epoch: let one term begin there.")

    def __contains__(self, name: str) -> bool:
        """Whether a term is used at any time."""
        return name in self._weights

    def now(self, epoch: float = 0.0, epochs: float = math.inf) -> dict[str, float]:
        """Return the weights of the terms that have begun, after `epoch` (a fraction counts) of `epochs` epochs."""
        current = {}
        for name, weight in self._weights.items():
            begin = self._start.get(name, 1) - 1
            if math.floor(epoch) >= begin:
                done = min((epoch - begin) / (epochs - begin), 1.0) if epochs > begin else 1.0
                current[name] = weight * (1 + (self._final.get(name, 1.0) - 1) * done)
        return current

    def check_length(self, epochs: float) -> None:
        """Make sure that a training of `epochs` epochs (infinity where nobody says) contains what is scheduled.

        Raises:
            ValueError: a term would never begin, or nobody says when its weight is to reach its end.
        """
        late = [name for name, start in self._start.items() if start > epochs]
        if late:
            raise ValueError(
                f"model.start_epoch lets {late[0]!r} begin in epoch {self._start[late[0]]}, but training ends after "
                f"{epochs:g}: begin earlier, or train longer."
            )
        if self._final and epochs == math.inf:
            raise ValueError("model.final needs to know when training ends: set trainer.max_epochs.")

    def _check(self, option: str, name: str, value: Any, known: set[str]) -> None:
        if name not in known:
            near = difflib.get_close_matches(name.removesuffix("_weight"), sorted(known), 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}."
            raise ValueError(f"model.{option}: there is no term {name!r}{hint}")
        if name not in self._weights:
            raise ValueError(f"model.{option} schedules {name!r}, whose weight is 0: give model.{name}_weight.")
        if option == "start_epoch" and value < 1:
            raise ValueError(f"model.start_epoch counts epochs from 1, but got {value} for {name!r}.")
        if option == "final" and not 0 <= value < math.inf:
            raise ValueError(f"model.final is a fraction of a weight, 0 or more, but got {value} for {name!r}.")
