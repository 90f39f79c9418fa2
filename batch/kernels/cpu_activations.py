"""Activations as int8, for INT4 weights in panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.linears import PANEL_GROUP
from batch.kernels.panel_tiles import INT8_ORDER
from batch.kernels.simd import elements_at, take_item, widen

_I64 = np.int64(0)


@dataclass(frozen=True)
class Int8Rows:
    """values int8 [R, K], each eight k in INT8_ORDER; scale float32 and base int32 [R, K/128]; see `int8_tile`."""

    values: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor


@parallel.Kernel
def _quantize_rows(job: Any) -> None:
    """Items are rows; the arguments are those that `quantize_rows` gives."""
    args = elements_at(job, _I64)
    items, x, x_bytes, tail, tail_row, tail_bytes, size = args[1], args[2], args[3], args[4], args[5], args[6], args[7]
    groups, values = size // PANEL_GROUP, elements_at(args[8], np.int8(0))
    scale, base = elements_at(args[9], np.float32(0)), elements_at(args[10], np.int32(0))
    wide, whole = np.empty(PANEL_GROUP, np.float32), np.empty(PANEL_GROUP, np.int32)
    while True:
        row = take_item(job)
        if row >= items:
            return
        address = x + row * x_bytes if row < tail_row else tail + (row - tail_row) * tail_bytes
        source = elements_at(address, np.uint16(0))
        for g in range(groups):
            most = np.float32(0.0)
            for i in range(PANEL_GROUP):
                wide[i] = widen(source[g * PANEL_GROUP + i])
                most = max(most, abs(wide[i]))
            step = most / np.float32(127.0)
            inverse = np.float32(1.0) / step if step > 0 else np.float32(0.0)
            total = np.int32(0)
            for i in range(PANEL_GROUP):
                whole[i] = np.int32(np.rint(wide[i] * inverse))
                total += whole[i]
            at = row * size + g * PANEL_GROUP
            for i in range(0, PANEL_GROUP, 8):
                for j in range(8):
                    values[at + i + j] = np.int8(whole[i + INT8_ORDER[j]])
            scale[row * groups + g], base[row * groups + g] = step, -8 * total


def quantize_rows(xs: tuple[torch.Tensor, ...]) -> Int8Rows:
    """Rows of one or two tensors bfloat16 [R, K] as `reference.quantize_int8_groups` quantizes them."""
    x, tail, rows, size = xs[0], xs[-1], sum(len(part) for part in xs), xs[0].shape[1]
    values = torch.empty((rows, size), dtype=torch.int8)
    scale = torch.empty((rows, size // PANEL_GROUP), dtype=torch.float32)
    base = torch.empty(scale.shape, dtype=torch.int32)
    parallel.run(_quantize_rows, rows, x, x.stride(0) * 2, tail, len(x), tail.stride(0) * 2, size, values, scale, base)
    return Int8Rows(values, scale, base)
