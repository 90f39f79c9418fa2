"""How one canonical tensor is stored: the parts it becomes, and how a range of its rows is turned into them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from converters.reader import TensorInfo
from converters.writer import TensorSpec
from converters.writing.encoder import Copy, Encoded, Encoder, Scratch
from l4tool.core.errors import DeviceError, UsageError
from quant import ops
from quant.schemes import Recipe

PACK_FACTOR = 8  # 4-bit values in an int32


class FiniteCopy(Copy):
    """The tensor's bytes as they are, if every value is finite."""

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        ops.require_finite(weight, info.name, row)
        return super().encode(weight, info, stored, row, scratch)


@dataclass(frozen=True)
class Int4(Encoder):
    """compressed-tensors' pack-quantized: `weight_packed`, `weight_scale`, `weight_shape`."""

    group_size: int
    scale: str
    device: str = "cpu"
    kind = "int4"

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        out, cols = info.shape
        if cols % self.group_size:
            raise UsageError(
                f"group size {self.group_size} does not divide the {cols} inputs of {info.name}",
                hint=f"use --group-size {math.gcd(cols, self.group_size)}" if cols % 8 == 0 else "use --fp8",
            )
        return [
            TensorSpec(stored + "_packed", (out, cols // PACK_FACTOR), torch.int32),
            TensorSpec(stored + "_scale", (out, cols // self.group_size), torch.bfloat16),
            TensorSpec(stored + "_shape", (2,), torch.int64),
        ]

    def fixed(self, info: TensorInfo, stored: str) -> dict[str, torch.Tensor]:
        return {stored + "_shape": torch.tensor(info.shape, dtype=torch.int64)}

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        with _device_errors(self.device):
            result = ops.int4(_to(weight, self.device), self.group_size, self.scale, info.name, row, scratch)
        pieces = [(stored + "_packed", result.packed, row), (stored + "_scale", result.scale, row)]
        return Encoded(pieces, result.error, result.square)

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        cols = info.shape[1]
        source = 0 if self.device == "cpu" else rows * cols * info.dtype.itemsize
        return source + rows * (cols // 2 + 2 * cols // self.group_size + 16)


@dataclass(frozen=True)
class Fp8(Encoder):
    """compressed-tensors' float-quantized: `weight` e4m3fn, `weight_scale` per row."""

    device: str = "cpu"
    kind = "fp8"

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        out, cols = info.shape
        scale = TensorSpec(stored + "_scale", (out, 1), torch.bfloat16)
        return [TensorSpec(stored, (out, cols), torch.float8_e4m3fn), scale]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        with _device_errors(self.device):
            result = ops.fp8(_to(weight, self.device), info.name, row, scratch)
        pieces = [(stored, result.weight, row), (stored + "_scale", result.scale, row)]
        return Encoded(pieces, result.error, result.square)

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        cols = info.shape[1]
        source = 0 if self.device == "cpu" else rows * cols * info.dtype.itemsize
        return source + rows * (cols + 24)


def make_encoders(recipe: Recipe, device: str) -> dict[str, Encoder]:
    """Kind ("int4", "fp8", "bf16") → its encoder under this recipe."""
    if recipe.format == "quanto":
        from quant.quanto import QuantoFp8, QuantoInt4

        return {"bf16": FiniteCopy(), "int4": QuantoInt4(recipe.scale), "fp8": QuantoFp8()}
    return {"bf16": FiniteCopy(), "int4": Int4(recipe.group_size, recipe.scale, device), "fp8": Fp8(device)}


@contextlib.contextmanager
def _device_errors(device: str) -> Iterator[None]:
    """What goes wrong on a device as DeviceError."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"{device} failed: {reason}", hint="use fewer --jobs, or --device cpu") from error


def _to(weight: torch.Tensor, device: str) -> torch.Tensor:
    """The weight there, in the memory order that it has: turning it would take longer than all the rest."""
    if device == "cpu":
        return weight
    if weight.stride(0) == 1:
        return weight.T.contiguous().to(device).T
    return weight.contiguous().to(device)
