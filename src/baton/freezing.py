"""Which modules of a backbone stay as they are while the rest is trained."""

import difflib
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def modules_to_freeze(backbone: nn.Module, paths: Sequence[str], batchnorm: bool) -> list[nn.Module]:
    """Return the modules that are named, and every BatchNorm where asked for.

    Args:
        backbone: a timm model.
        paths: dotted paths of its modules, such as `layer1` or `layer2.0.conv1`.
        batchnorm: also every BatchNorm, with its scale, its shift and its running statistics.

    Raises:
        ValueError: for a path that is no module, naming the nearest ones, or if there is no BatchNorm.
    """
    modules = dict(backbone.named_modules())
    del modules[""]
    for path in paths:
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
            children = ", ".join(dict(backbone.named_children()))
            some = f"the nearest are {', '.join(near)}" if near else f"it has {children}"
            raise ValueError(f"model.freeze: the backbone ({type(backbone).__name__}) has no module {path!r}; {some}.")
    norms = [module for module in modules.values() if isinstance(module, _BatchNorm)] if batchnorm else []
    if batchnorm and not norms:
        raise ValueError(
            f"model.freeze_batchnorm is set, but the backbone ({type(backbone).__name__}) has none: leave it out."
        )
    return [modules[path] for path in paths] + norms
