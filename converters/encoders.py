"""How convert stores a tensor: its bits as they are, or rounded to another float type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from converters.reader import TensorInfo
from converters.writer import TensorSpec
from converters.writing.encoder import Encoded, Encoder, Scratch
from l4tool.core.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Plain(Encoder):
    """The tensor in `dtype`, rounded to nearest even where that is narrower; the same bits where it is the same.

    A finite value that `dtype` cannot hold raises CheckpointError. `gather_bytes`: memory that the rows take before
    they are encoded, per byte of them.
    """

    dtype: torch.dtype
    gather_bytes: int = 1
    kind = "plain"

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        return [TensorSpec(stored, info.shape, self.dtype)]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        if weight.dtype == self.dtype:
            return Encoded([(stored, weight, row)])
        cast = scratch.empty("cast", tuple(weight.shape), self.dtype)
        cast.copy_(weight)
        if self.dtype == torch.float16 or weight.dtype == torch.float32:
            _require_held(weight, cast, info.name, row)
        return Encoded([(stored, cast, row)])

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        elements = rows * (info.nbytes // info.dtype.itemsize // max(info.shape[0] if info.shape else 1, 1))
        cast = 0 if info.dtype == self.dtype else elements * (self.dtype.itemsize + 4)  # and a mask to check it by
        return elements * info.dtype.itemsize * self.gather_bytes + cast


def _require_held(weight: torch.Tensor, cast: torch.Tensor, name: str, row: int) -> None:
    """Rounding may overflow: 65,520 and more is infinite in float16."""
    lost = cast.isinf() & weight.isfinite()
    if not bool(lost.any()):
        return
    place = [int(at) for at in lost.nonzero()[0]]
    value = float(weight[tuple(place)])
    if place:
        place[0] += row
    raise CheckpointError(
        f"{name}: element {place} is {value:g}, which {str(cast.dtype).removeprefix('torch.')} cannot hold",
        hint="leave --dtype away, or use one that can hold it (bf16, f32)",
    )
