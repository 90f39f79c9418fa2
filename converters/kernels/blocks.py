"""GGUF's Q8_0 and Q4_0 blocks, the same bits as the `gguf` package's `quants.Q8_0` and `quants.Q4_0`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from l4tool.core.jit import kernel_jit

jit = kernel_jit(Path(__file__).parent, nogil=True)
BLOCK, Q8_BYTES, Q4_BYTES, SLICE = 32, 34, 18, 64


@jit
def _q8_0(src, out, scale):  # type: ignore[no-untyped-def]
    """src float32 [rows, cols] → codes in out uint8 [rows, blocks·34] behind two bytes for the scale [rows, blocks]."""
    rows, blocks = scale.shape
    for i in range(rows):
        for b in range(blocks):
            block, codes = src[i, b * 32 : b * 32 + 32], out[i, b * 34 + 2 : b * 34 + 34]
            largest = np.float32(0.0)
            for j in range(32):
                largest = max(largest, abs(block[j]))
            d = largest / np.float32(127.0)
            inverse = np.float32(0.0) if d == 0 else np.float32(1.0) / d
            scale[i, b] = d
            for j in range(32):
                x = block[j] * inverse
                a = abs(x)
                whole = np.floor(a)
                half_up = whole + np.floor(np.float32(2.0) * (a - whole))  # away from zero, as C's roundf
                codes[j] = np.uint8(np.int8(half_up if x >= 0 else -half_up))


@jit
def _q4_0(src, out, scale):  # type: ignore[no-untyped-def]
    """The same with 4-bit codes, value j and j + 16 in byte j; the scale is signed, its largest magnitude at -8."""
    rows, blocks = scale.shape
    for i in range(rows):
        for b in range(blocks):
            block, codes = src[i, b * 32 : b * 32 + 32], out[i, b * 18 + 2 : b * 18 + 18]
            largest, at = np.float32(-1.0), 0
            for j in range(32):
                a = abs(block[j])
                if a > largest:
                    largest, at = a, j
            d = block[at] / np.float32(-8.0)
            inverse = np.float32(0.0) if d == 0 else np.float32(1.0) / d
            scale[i, b] = d
            for j in range(16):
                low = min(max(np.int32(block[j] * inverse + np.float32(8.5)), 0), 15)
                high = min(max(np.int32(block[j + 16] * inverse + np.float32(8.5)), 0), 15)
                codes[j] = np.uint8(low | (high << 4))


def pack_q8_0(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Floats [rows, cols] → packed uint8 [rows, cols / 32 · 34]."""
    _pack(_q8_0, weight, packed, Q8_BYTES)


def pack_q4_0(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Floats [rows, cols] → packed uint8 [rows, cols / 32 · 18]."""
    _pack(_q4_0, weight, packed, Q4_BYTES)


def _pack(kernel, weight: torch.Tensor, packed: torch.Tensor, block_bytes: int) -> None:  # type: ignore[no-untyped-def]
    rows, cols = weight.shape
    for start in range(0, rows, SLICE):
        floats = weight[start : start + SLICE].float().contiguous().numpy()
        out = packed[start : start + SLICE].numpy()
        scale = np.empty((len(floats), cols // BLOCK), dtype=np.float32)
        kernel(floats, out, scale)
        halves = scale.astype(np.float16).view(np.uint8).reshape(len(floats), -1, 2)
        out.reshape(len(floats), -1, block_bytes)[:, :, :2] = halves
