"""Expanding one quantized weight at a time on the CPU, into a buffer that the next one reuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batch.kernels import parallel, reference
from batch.kernels.linears import Fp8Linear, Int4Linear
from batch.kernels.simd import elements_at, jit, narrow, take_item, widen

ROWS = 16  # per work item
_BF16, _F32, _I64 = np.uint16(0), np.float32(0), np.int64(0)
_scratch: dict[torch.dtype, torch.Tensor] = {}


def scratch(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A [rows, columns] tensor that the next call for the same dtype may overwrite."""
    size = rows * columns
    if dtype not in _scratch or _scratch[dtype].numel() < size:
        _scratch[dtype] = torch.empty(size, dtype=dtype)
    return _scratch[dtype][:size].view(rows, columns)


@jit
def _expand_int4(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, rows, words, group_words = args[1], args[2], args[3], args[4]
    packed, scale, out = elements_at(args[5], np.int32(0)), elements_at(args[6], _BF16), elements_at(args[7], like)
    values = np.empty(16, np.float32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for group in range(item * ROWS * words // group_words, min((item + 1) * ROWS, rows) * words // group_words):
            factor = widen(scale[group])
            for q in range(16):
                values[q] = np.float32(q - 8) * factor
            for word in range(group * group_words, (group + 1) * group_words):
                bits = packed[word]
                for k in range(8):
                    out[word * 8 + k] = narrow(values[(bits >> np.int32(4 * k)) & np.int32(15)], like)


@jit
def _expand_bytes(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, size, source = args[1], args[2], elements_at(args[3], np.uint8(0))
    table, out = elements_at(args[4], like), elements_at(args[5], like)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for i in range(item * 65536, min((item + 1) * 65536, size)):
            out[i] = table[source[i]]


@parallel.Kernel
def _expand_int4_bf16(job: Any) -> None:
    _expand_int4(job, _BF16)


@parallel.Kernel
def _expand_int4_f32(job: Any) -> None:
    _expand_int4(job, _F32)


@parallel.Kernel
def _expand_bytes_bf16(job: Any) -> None:
    _expand_bytes(job, _BF16)


@parallel.Kernel
def _expand_bytes_f32(job: Any) -> None:
    _expand_bytes(job, _F32)


_INT4 = {torch.bfloat16: _expand_int4_bf16, torch.float32: _expand_int4_f32}
_BYTES = {torch.bfloat16: _expand_bytes_bf16, torch.float32: _expand_bytes_f32}


def expand_int4(part: Int4Linear, dtype: torch.dtype) -> torch.Tensor:
    """As `reference.dequantize_int4`, in `dtype`, in scratch memory: [N, K]."""
    if part.scale.dtype != torch.bfloat16 or not (part.packed.is_contiguous() and part.scale.is_contiguous()):
        return reference.dequantize_int4(part, dtype)
    rows, words = part.packed.shape
    out = scratch(rows, words * 8, dtype)
    items = -(-rows // ROWS)
    parallel.run(_INT4[dtype], items, rows, words, part.group_size // 8, part.packed, part.scale, out)
    return out


def expand_fp8(part: Fp8Linear, dtype: torch.dtype) -> torch.Tensor:
    """The e4m3 values of a weight, without scales, in `dtype`, in scratch memory: [N, K]."""
    if not part.weight.is_contiguous():
        return part.weight.to(dtype)
    out = scratch(part.out_features, part.in_features, dtype)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    parallel.run(_BYTES[dtype], -(-out.numel() // 65536), out.numel(), part.weight, table, out)
    return out
