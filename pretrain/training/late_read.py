"""Numbers of the device for which the host does not wait."""

import torch
from torch import Tensor


class LateRead:
    """Holds the numbers of one step until the host asks for them, best a step later: then they are
    there, while the device has the next step to work on."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._numbers = torch.empty(0)  # where the device can write without the host, if it is one
        self._written: torch.cuda.Event | None = None

    def put(self, step: int, numbers: Tensor) -> None:
        """Begins to copy numbers (n,) of a step; what was put before must have been taken."""
        assert self._step is None
        self._step = step
        if numbers.device.type != "cuda":
            self._numbers = numbers.clone()
            return
        if self._written is None:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._written = torch.cuda.Event()
        self._numbers.copy_(numbers, non_blocking=True)
        self._written.record()

    def take(self) -> tuple[int, list[float]] | None:
        """The step that was put last, and its numbers; None where they have been taken."""
        if self._step is None:
            return None
        if self._written is not None:
            self._written.synchronize()
        step, self._step = self._step, None
        return step, self._numbers.tolist()
