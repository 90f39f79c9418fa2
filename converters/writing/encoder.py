"""How one tensor is stored: the parts it becomes, and how a range of its rows is turned into them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from converters.reader import TensorInfo
from converters.writer import TensorSpec


class Scratch:
    """Result memory used again and again by one thread: fresh pages would cost more than the kernels.

    What a call returns lies in here until the next call with the same Scratch.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def empty(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor; `use` keeps apart what lives at the same time."""
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.nbytes < nbytes:
            held = self._held[use] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(shape)


@dataclass(frozen=True)
class Encoded:
    """Rows of one tensor as written: (stored name, tensor, first row); float64 error sums per row, None for a copy."""

    pieces: list[tuple[str, torch.Tensor, int]]
    error: torch.Tensor | None = None
    square: torch.Tensor | None = None


class Encoder(ABC):
    """One way to store a tensor. `splittable`: any range of rows can be encoded alone."""

    kind: str
    splittable = True

    @abstractmethod
    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        """What the tensor becomes; `stored` is its name in the output, ending in `.weight` for a Linear.

        Raises UsageError where the options do not fit the tensor.
        """

    def fixed(self, info: TensorInfo, stored: str) -> dict[str, torch.Tensor]:
        """Parts that do not depend on the weight; `encode` does not give them."""
        return {}

    @abstractmethod
    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        """Encode rows [row, row + len(weight)) into `scratch`. CheckpointError: values it cannot hold."""

    @abstractmethod
    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        """Anonymous memory that encoding `rows` rows takes, results included."""


class Copy(Encoder):
    """The tensor's bytes as they are."""

    kind = "copy"

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        return [TensorSpec(stored, info.shape, info.dtype)]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        return Encoded([(stored, weight, row)])

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        return rows * math.prod(info.shape[1:]) * info.dtype.itemsize  # only a strided view is really copied
