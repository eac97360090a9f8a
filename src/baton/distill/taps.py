"""What modules inside a network return on the way: the maps that a student and its teacher compare."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Taps:
    """Runs a network and returns, beside its output, what some of its modules returned.

    The hooks stay on the network, because a compiled one knows only those that it had when it first ran. They work with
    any network whose forward pass goes through modules, whether compiled or not.

    Args:
        network: to run.
        paths: dotted paths of the modules, such as `group1` or `group1.0`.
        role: what messages call the network.

    Raises:
        ValueError: for a path that is no module; names the nearest ones.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str] = (), role: str = "student") -> None:
        self.network, self.paths, self.role = network, tuple(paths), role
        self._kept: dict[str, Any] = {}
        for path in dict.fromkeys(self.paths):
            _find(network, path, role).register_forward_hook(self._keep(path))

    def __call__(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Any]]:
        """Return the output for normalised images, and the modules' outputs, in the order of `paths`."""
        self._kept.clear()
        output = self.network(images)
        maps = [self._as_map(self._kept.get(path)) for path in self.paths]
        self._kept.clear()
        return output, maps

    def shapes(self, images: Float[Tensor, "b c h w"]) -> list[tuple[int, ...]]:
        """Run once, in evaluation mode and without gradients, and make sure that every output is a map (B, C, H, W).

        Raises:
            ValueError: one is not, is never computed, or is overwritten by what follows.
        """
        versions: dict[str, int] = {}

        def note(path: str) -> Callable[..., None]:
            return lambda module, given, output: versions.update({path: getattr(output, "_version", -1)})

        handles = [_find(self.network, path, self.role).register_forward_hook(note(path)) for path in self.paths]
        modes = {module: module.training for module in self.network.modules()}  # frozen ones keep theirs
        self.network.eval()
        with torch.no_grad():
            _, maps = self(images)
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
        for path, output in zip(self.paths, maps, strict=True):
            wrong = None
            if path not in versions:
                wrong = "takes no part in its forward pass"
            elif not isinstance(output, Tensor) or output.ndim != 4:
                shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
                wrong = f"returns a {type(output).__name__}{shape}, no map (B, C, H, W)"
            elif output._version != versions[path]:
                wrong = "returns a map that the module after it overwrites"
            if wrong:
                raise ValueError(f"The {self.role}'s module {path!r} {wrong}: name another one in model.pairs.")
        return [tuple(output.shape) for output in maps]

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            self._kept[path] = output

        return hook

    def _as_map(self, output: Any) -> Any:
        """Some of timm's networks have channels last, and say so."""
        channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        return output.permute(0, 3, 1, 2) if channels_last and getattr(output, "ndim", 0) == 4 else output


def pair_paths(student: nn.Module, teacher: nn.Module, pairs: list[list[str]] | None) -> tuple[list[str], list[str]]:
    """Return the student's and the teacher's paths, pair by pair.

    Args:
        student: a timm model.
        teacher: a timm model.
        pairs: (student's path, teacher's path) of each pair; None pairs the groups of both networks, first with first.

    Raises:
        ValueError: for no pairs, a pair that is not of two, or networks with different numbers of groups.
    """
    if pairs is None:
        ours, theirs = group_paths(student), group_paths(teacher)
        if not ours or len(ours) != len(theirs):
            raise ValueError(
                f"The student has {len(ours)} groups of layers ({', '.join(ours)}), the teacher has {len(theirs)} "
                f"({', '.join(theirs)}): say in model.pairs which belong together, such as [[layer1, group1], ...]."
            )
        return ours, theirs
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"model.pairs must be pairs of a path in the student and one in the teacher, such as [[group1, group1]], "
            f"but got {pairs}."
        )
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def group_paths(network: nn.Module) -> list[str]:
    """Return the paths of a network's groups of layers, as its `feature_info` names them.

    In the Wide ResNets these are the sums of residual blocks before the next BatchNorm and ReLU, which the public code
    of attention transfer compares. A single layer that comes first, such as the activation of a ResNet's stem, is no
    group, unless the others are single layers, too (VGG).

    Args:
        network: a timm model.
    """
    paths = [str(row["module"]) for row in getattr(network, "feature_info", None) or []]
    single = [not list(network.get_submodule(path).children()) for path in paths]
    return paths[1:] if len(paths) > 1 and single[0] and not single[1] else paths


def _find(network: nn.Module, path: str, role: str) -> nn.Module:
    names = dict(network.named_modules())
    if not path or path not in names:
        near = difflib.get_close_matches(path, [name for name in names if name], n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"The {role} ({type(network).__name__}) has no module {path!r}{hint}.")
    return names[path]
