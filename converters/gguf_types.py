"""GGUF's tensor types: what convert can write, and how rows are packed into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from converters.reader import TensorInfo
from converters.writer import TensorSpec
from converters.writing.encoder import Encoded, Encoder, Scratch
from l4tool.core.errors import CheckpointError, UsageError

BLOCK = 32  # values that share a scale
# name → bytes of a block, `general.file_type` (llama.cpp's LLAMA_FTYPE_MOSTLY_*)
QUANTIZED = {"q8_0": (34, 7), "q5_1": (24, 9), "q5_0": (22, 8), "q4_1": (20, 3), "q4_0": (18, 2)}
HALVES = {name: 2 if name.endswith("_1") else 1 for name in QUANTIZED}  # float16 at a block's beginning: scale, minimum
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32} | {name: file_type for name, (_, file_type) in QUANTIZED.items()}


def block_bytes(name: str) -> int:
    return QUANTIZED[name][0]


@dataclass(frozen=True)
class Blocks(Encoder):
    """Rows in blocks of 32 values, quantized as the `gguf` package's `quants` does, bit for bit."""

    type_name: str

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.type_name

    def row_bytes(self, cols: int) -> int:
        return cols // BLOCK * block_bytes(self.type_name)

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        rows, cols = info.shape
        if cols % BLOCK:
            raise UsageError(
                f"{stored} has {cols} inputs: {self.type_name} packs {BLOCK} at a time", hint="use --dtype bf16 or f16"
            )
        return [TensorSpec(stored, (rows, self.row_bytes(cols)), torch.uint8)]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        packed = scratch.empty("packed", (weight.shape[0], self.row_bytes(weight.shape[1])), torch.uint8)
        bad = pack(weight, self.type_name, packed)
        if bad >= 0:
            raise _cannot_hold(weight[bad], self.type_name, info.name, row + bad)
        return Encoded([(stored, packed, row)])

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        cols = math.prod(info.shape[1:])
        return rows * cols * (info.dtype.itemsize + 2) + SLICE * cols * 24


SLICE = 64  # rows at a time, so that the intermediate arrays of numpy stay in the cache


def pack(weight: torch.Tensor, type_name: str, packed: torch.Tensor) -> int:
    """Floats [rows, cols] → `packed` uint8 [rows, bytes]. Returns the first row that it cannot hold, or -1: NaN, Inf,
    and values whose block's scale is none in float16."""
    if type_name in ("q8_0", "q4_0"):
        from converters.kernels.blocks import pack_q4_0, pack_q8_0

        return (pack_q8_0 if type_name == "q8_0" else pack_q4_0)(weight, packed)
    from gguf import GGMLQuantizationType, quants

    qtype, halves = GGMLQuantizationType[type_name.upper()], 2 * HALVES[type_name]
    for start in range(0, weight.shape[0], SLICE):
        rows = weight[start : start + SLICE].float().contiguous().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf make a scale like themselves
            blocks = quants.quantize(rows, qtype)
        packed[start : start + SLICE] = torch.from_numpy(np.ascontiguousarray(blocks))
        scales = blocks.reshape(len(rows), -1, block_bytes(type_name))[:, :, :halves]
        bad = ~np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all((1, 2))
        if bad.any():
            return start + int(bad.argmax())
    return -1


def _cannot_hold(row: torch.Tensor, type_name: str, name: str, number: int) -> CheckpointError:
    """The error for row `number`: its first NaN or Inf, else its largest value."""
    values = row.float()
    odd = (~values.isfinite()).nonzero()
    at = int(odd[0] if len(odd) else values.abs().argmax())
    return CheckpointError(
        f"{name}: element [{number}, {at}] is {float(values[at]):g}, which {type_name} cannot hold",
        hint="use --dtype bf16 or f32",
    )
