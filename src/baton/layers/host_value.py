"""A number that lives on the device and that the host must know: looked at without waiting for the device."""

import torch
from torch import Tensor

#: Calls between two looks at an accelerator.
EVERY = 32


class HostValue:
    """The host's copy of a vector of a few numbers, such as a layer's scales.

    On the CPU it is always exact. An accelerator would have to stop for each look, so every 32nd call starts a copy
    that the 32nd call after it reads, when it has long arrived: the values are those of at most 63 calls before.
    Compiled graphs never look.

    Args:
        values: what is known of them now.
    """

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self._calls = 0
        self._copy: tuple[Tensor, torch.Event] | None = None

    def follow(self, tensor: Tensor) -> list[float]:
        """Give the values, looking where it costs nothing.

        Args:
            tensor: (n,), on any device.
        """
        if torch.compiler.is_compiling():
            return self.values
        if tensor.device.type == "cpu":
            return self.look(tensor)
        if tensor.is_meta:
            return self.values
        if self._calls % EVERY == 0:
            if self._copy is not None:
                copied, arrived = self._copy
                arrived.synchronize()
                self.values = copied.tolist()
            event = torch.Event(tensor.device)
            self._copy = tensor.detach().to("cpu", non_blocking=True), event
            event.record()
        self._calls += 1
        return self.values

    def look(self, tensor: Tensor) -> list[float]:
        """Give the present values, even if the host has to wait for them."""
        if not tensor.is_meta:
            self.values, self._calls, self._copy = tensor.detach().tolist(), 0, None
        return self.values

    def __getstate__(self) -> dict[str, list[float]]:
        """Copies and pickles of it begin with its values alone: an event belongs to a device."""
        return {"values": list(self.values)}

    def __setstate__(self, state: dict[str, list[float]]) -> None:
        self.__init__(**state)  # type: ignore[misc]
