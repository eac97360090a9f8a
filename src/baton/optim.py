"""How a task optimises: timm's optimisers by name, and learning-rate schedules counted in epochs as papers count."""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import timm.optim
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

#: What a pattern in `Optimizer.overrides` may set.
_OWN = ("lr_factor", "weight_decay")


@dataclass(frozen=True)
class Optimizer:
    """An optimiser of timm's, by name.

    Args:
        name: as in `timm.optim.list_optimizers()`; `momentum` is SGD with plain momentum, `sgd` has Nesterov's.
        lr: learning rate at the start of the schedule.
        weight_decay: L2 penalty (decoupled where the optimiser decouples it).
        momentum: of optimisers that have one.
        decay_all: decay every parameter, as the Wide ResNet code does; otherwise biases, norms and what the backbone
            names in `no_weight_decay()` are left out.
        layer_decay: multiply the learning rate by this once for every layer group below the head (the backbone's
            `group_matcher` says what a group is).
        options: further arguments of the optimiser, such as `betas` or `eps`.
        overrides: parameters of another treatment: patterns of their names, in the task or in the backbone, with
            `lr_factor` (of the learning rate that they would have) or `weight_decay` (whatever the rules above say), or
            both: `{"*.log2_sigma": {lr_factor: 0.1, weight_decay: 0}}`. Later patterns come on top of earlier ones.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    decay_all: bool = False
    layer_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, float]] = field(default_factory=dict)

    def build(self, module: nn.Module, backbone: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser over all parameters of `module` that learn; `backbone` is a part of it.

        Raises:
            ValueError: if timm knows no optimiser of this name, or refuses an option, or if `overrides` name no
                parameter that learns or set what they cannot.
        """
        known = timm.optim.list_optimizers()
        if self.name not in known:
            near = difflib.get_close_matches(self.name, map(str, known), 3) or ["see timm.optim.list_optimizers()"]
            raise ValueError(
                f"optimizer.name={self.name!r} is not one of timm's optimisers; nearest: {', '.join(near)}."
            )
        options = dict(self.options)
        if timm.optim.get_optimizer_info(self.name).has_momentum:
            options["momentum"] = self.momentum
        groups = _treat(self._groups(module, backbone), _treatments(module, self.overrides), self.lr)
        try:
            return timm.optim.create_optimizer_v2(
                groups, self.name, lr=self.lr, weight_decay=self.weight_decay, **options
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"The optimiser {self.name!r} does not take these options: {error}.") from error

    def _groups(self, module: nn.Module, backbone: Any) -> list[dict[str, Any]]:
        skip = set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
        if self.layer_decay is None:
            own, rest = [], dict(module.named_parameters())
        else:
            if not hasattr(backbone, "group_matcher"):
                raise ValueError(f"optimizer.layer_decay needs a backbone with a group_matcher, not {type(backbone)}.")
            own = timm.optim.param_groups_layer_decay(
                backbone,
                weight_decay=self.weight_decay,
                no_weight_decay_list=tuple(skip),
                weight_decay_exclude_1d=not self.decay_all,
                layer_decay=self.layer_decay,
            )
            for group in own:  # timm leaves this to its own schedulers
                group["lr"] = self.lr * group.pop("lr_scale")
            inside = {id(parameter) for parameter in backbone.parameters()}
            rest = {name: p for name, p in module.named_parameters() if id(p) not in inside}
        return own + _split_by_decay(rest.items(), skip, self.weight_decay, self.decay_all)


def _split_by_decay(
    named: Iterable[tuple[str, nn.Parameter]], skip: set[str], weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        left_out = parameter.ndim <= 1 or name.removeprefix("backbone.") in skip
        (plain if left_out and not decay_all else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _treatments(module: nn.Module, overrides: dict[str, dict[str, float]]) -> dict[nn.Parameter, dict[str, float]]:
    """What is set for each parameter that a pattern names."""
    named = [
        (name, parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)  # any name of a shared one counts
        if parameter.requires_grad
    ]
    treatments: dict[nn.Parameter, dict[str, float]] = {}
    for pattern, own in overrides.items():
        for key, value in own.items():
            if key not in _OWN:
                raise ValueError(f"optimizer.overrides[{pattern!r}] sets {key!r}; it can set {' and '.join(_OWN)}.")
            if not 0 <= value < math.inf:
                raise ValueError(f"optimizer.overrides[{pattern!r}] needs {key} of 0 or more, but has {value}.")
        found = [
            parameter
            for name, parameter in named
            if fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix("backbone."), pattern)
        ]
        if not found:
            names = [name for name, _ in named]
            near = difflib.get_close_matches(pattern, names, 3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"optimizer.overrides[{pattern!r}] matches no parameter that learns; such are {', '.join(near)}."
            )
        for parameter in found:
            treatments[parameter] = {**treatments.get(parameter, {}), **own}
    return treatments


def _treat(
    groups: list[dict[str, Any]], treatments: dict[nn.Parameter, dict[str, float]], lr: float
) -> list[dict[str, Any]]:
    """Take the parameters of another treatment out of their groups, into groups of their own behind all others."""
    kept: list[dict[str, Any]] = []
    own: dict[Any, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        kept.append({**group, "params": [parameter for parameter in group["params"] if parameter not in treatments]})
        for parameter in group["params"]:
            if parameter in treatments:
                treatment = dict(treatments[parameter])
                key = number, *sorted(treatment.items())
                rate = group.get("lr", lr) * treatment.pop("lr_factor", 1.0)
                own.setdefault(key, {**group, "lr": rate, **treatment, "params": []})["params"].append(parameter)
    return [group for group in (*kept, *own.values()) if group["params"]]


@dataclass(frozen=True)
class LRScheduler:
    """A learning-rate schedule; epochs are counted from 1, as in papers.

    Args:
        name: `constant`; `step`: multiply by `factor` from the start of each epoch named in `milestones`
            (60 means after 59 full epochs, as the Wide ResNet code does); `exponential`: multiply by `factor` every
            `every` epochs; `cosine`: half a cosine from the start to `final` times the start, per step; `poly`:
            (1 - t)^`power` down to `final` times the start, t being the part of training that is done, per step (as
            DeepLab).
        milestones: epochs of `step`.
        factor: of `step` and `exponential`.
        every: epochs between two drops of `exponential`.
        final: of `cosine` and `poly`, as a fraction of the learning rate.
        power: of `poly`.
        warmup_epochs: rise linearly from zero over this many epochs (per step), before anything else.
        reset_momentum: forget the optimiser's state at every drop of `step`, as the Wide ResNet code does.
    """

    name: Literal["constant", "step", "exponential", "cosine", "poly"] = "constant"
    milestones: list[int] = field(default_factory=list)
    factor: float = 0.1
    every: int = 1
    final: float = 0.0
    power: float = 0.9
    warmup_epochs: float = 0.0
    reset_momentum: bool = False

    def multiplier(self, epoch: float, epochs: float) -> float:
        """Return the factor on the learning rate after `epoch` (a fraction counts) of `epochs` epochs."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.name == "step":
            return self.factor ** sum(math.floor(epoch) + 1 >= milestone for milestone in self.milestones)
        if self.name == "exponential":
            return self.factor ** (math.floor(epoch) // self.every)
        if self.name in ("cosine", "poly"):
            done = min((epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9), 1.0)
            left = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else (1 - done) ** self.power
            return self.final + (1 - self.final) * left
        return 1.0

    def build(
        self, optimizer: torch.optim.Optimizer, length: Callable[[], tuple[float, float]]
    ) -> dict[str, Any] | None:
        """Return Lightning's scheduler configuration, or None where the learning rate never changes.

        Args:
            optimizer: whose learning rate changes.
            length: gives steps an epoch and the number of epochs; called from the first step on.
        """
        if self.name == "constant" and not self.warmup_epochs:
            return None
        per_step = self.name in ("cosine", "poly") or self.warmup_epochs > 0

        def multiplier(count: int) -> float:
            per_epoch, epochs = length() if count else (1.0, math.inf)
            return self.multiplier(count / per_epoch if per_step else count, epochs)

        return {"scheduler": LambdaLR(optimizer, multiplier), "interval": "step" if per_step else "epoch"}

    def resets_in(self, epoch: int) -> bool:
        """Whether the optimiser's state is forgotten at the start of this epoch (counted from 0)."""
        return self.reset_momentum and self.name == "step" and epoch + 1 in self.milestones


def keep_equal_values(options: dict[str, Any]) -> dict[str, Any]:
    """Let an average of two equal values be that value, so that averaging leaves frozen tensors bit-identical.

    PyTorch's exponential average computes decay * x + (1 - decay) * x, which rounding may take for another number.

    Args:
        options: of `torch.optim.swa_utils.AveragedModel`; only its `avg_fn` changes.
    """
    average = options.get("avg_fn")
    if average is None or hasattr(average, "keeps_equal_values"):
        return options

    def keeping(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        return torch.where(averaged == current, averaged, average(averaged, current, count))

    keeping.keeps_equal_values = True  # type: ignore[attr-defined]
    return {**options, "avg_fn": keeping}
