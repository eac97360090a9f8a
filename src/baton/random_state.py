"""The random state of a run: saved and restored for exact resumption, or set aside for a while."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _own_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def gather_random_state() -> list[dict[str, Any]]:
    """Return the state of every process, in order of their rank."""
    state = _own_state()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def set_random_state(states: list[dict[str, Any]], rank: int) -> None:
    """Restore what `gather_random_state` returned.

    Raises:
        ValueError: if there were fewer processes then.
    """
    if rank >= len(states):
        raise ValueError(
            f"The checkpoint holds the random state of {len(states)} processes, this run has more: resume with as "
            "many devices, or start a new run with init_from."
        )
    state = states[rank]
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the random state outside untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
