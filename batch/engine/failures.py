"""What to make of a step that failed, and how large the next ones may be. The engine and the scorer do the same."""

from __future__ import annotations

import torch

from l4tool.core.console import note
from l4tool.core.errors import DeviceError, L4Error

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
FAILURES_IN_A_ROW = 8  # so many sequences failing one after another, and no step between: it is the model, not they
GOOD_STEPS_TO_GROW = 64  # steps without trouble after which a step shrunk for lack of memory may double again


class StepLimit:
    """Most tokens of a step: half as many where memory ran out, twice as many again when all has long been well."""

    def __init__(self, most: int) -> None:
        self.tokens = self._most = self._fewest = most
        self._good_steps = self._failures = 0
        self.num_halved = 0

    def halve(self, tokens: int) -> None:
        """A step of so many tokens ran out of memory."""
        self.tokens = tokens // 2
        self._good_steps = 0
        self.num_halved += 1
        if self.tokens < self._fewest:
            self._fewest = self.tokens
            note(f"a step of {tokens:,} tokens ran out of memory: the next ones have {self.tokens:,} at most")

    def went_well(self) -> None:
        """A step was computed."""
        self._failures = 0
        self._good_steps += 1
        if self.tokens < self._most and self._good_steps >= GOOD_STEPS_TO_GROW:
            self._good_steps = 0
            self.tokens = min(2 * self.tokens, self._most)

    def failed(self, error: Exception) -> None:
        """One sequence alone failed with `error`, which is raised where that has become the rule."""
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise error


def raise_unless_theirs(error: Exception) -> None:
    """Raises for what is no fault of the sequences in the step: L4Error from weights that are read while it runs,
    DeviceError for a device that is gone."""
    if isinstance(error, L4Error):
        raise error
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        raise DeviceError(f"the device failed: {error}", hint="run again; if it stays, use --device cpu") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it with OutOfMemoryError where it allocates on a device, and with RuntimeErrors of many words for the
    CPU and for what CUDA, cuBLAS and Triton allocate by themselves."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))
