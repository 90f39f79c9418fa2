"""GGUF's Q8_0 and Q4_0 blocks, the same bits as the `gguf` package's `quants.Q8_0` and `quants.Q4_0`.

One pass, a block of 32 values at a time in the first-level cache: bits → float32 → scale as float16 and codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from l4tool.core.jit import kernel_jit

jit = kernel_jit(Path(__file__).parent, nogil=True)
BLOCK, Q8_BYTES, Q4_BYTES, SLICE = 32, 34, 18, 64
MAGNITUDE, INF = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
HALF_OVERFLOW = 0x477FF000  # float32 bits of 65,520, which rounds to infinity in float16
HALF_NORMAL, ONE_HALF = 0x38800000, 0x3F000000  # of 2**-14 and of 0.5, whose ulp is float16's smallest step


@jit
def _half(word, value):  # type: ignore[no-untyped-def]
    """float16 bits, to nearest even, of the float32 that word [1] int32 and value [1] float32 share as memory."""
    bits = np.int64(word[0])
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if magnitude >= HALF_OVERFLOW:
        return sign | 0x7C00
    if magnitude < HALF_NORMAL:
        word[0] = np.int32(magnitude)
        value[0] += np.float32(0.5)
        return sign | (np.int64(word[0]) - ONE_HALF)
    return sign | (((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10))


@jit
def _load(src, shift, words):  # type: ignore[no-untyped-def]
    """32 values' bits → words [32] int32, their bits as float32; the bits of the largest magnitude."""
    largest = np.int32(0)
    for j in range(32):
        word = np.int32(np.int32(src[j]) << shift)
        words[j] = word
        largest = max(largest, np.int32(word & MAGNITUDE))
    return largest


@jit
def _q8_0(src, shift, out):  # type: ignore[no-untyped-def]
    """src uint16 or int32 [rows, cols]: float32 bits above `shift` → out uint8 [rows, cols / 32 · 34].

    Returns the first row that holds NaN, Inf, or a scale that float16 has not; -1 without one.
    """
    words, codes_wide, word = np.empty(32, np.int32), np.empty(32, np.int32), np.empty(1, np.int32)
    block, value = words.view(np.float32), word.view(np.float32)
    for i in range(src.shape[0]):
        for b in range(src.shape[1] // 32):
            largest = _load(src[i, b * 32 : b * 32 + 32], shift, words)
            if largest >= INF:
                return i
            word[0] = largest
            value[0] = value[0] / np.float32(127.0)
            inverse = np.float32(0.0) if value[0] == 0 else np.float32(1.0) / value[0]
            half, target = _half(word, value), out[i, b * 34 : b * 34 + 34]
            if half == 0x7C00:
                return i
            target[0], target[1] = half & 255, half >> 8
            for j in range(32):
                x = block[j] * inverse
                a = abs(x)
                whole = np.floor(a)
                away = np.int32(whole + np.floor(np.float32(2.0) * (a - whole)))  # halves from zero, as C's roundf
                codes_wide[j] = away if x >= 0 else -away
            codes = target[2:]
            for j in range(32):
                codes[j] = np.uint8(codes_wide[j])
    return -1


@jit
def _q4_0(src, shift, out):  # type: ignore[no-untyped-def]
    """The same with 4-bit codes, value j and j + 16 in byte j; the scale is signed, its largest magnitude at -8."""
    words, codes_wide, word = np.empty(32, np.int32), np.empty(32, np.int32), np.empty(1, np.int32)
    block, value = words.view(np.float32), word.view(np.float32)
    for i in range(src.shape[0]):
        for b in range(src.shape[1] // 32):
            largest = _load(src[i, b * 32 : b * 32 + 32], shift, words)
            if largest >= INF:
                return i
            at = 0
            while np.int32(words[at] & MAGNITUDE) != largest:
                at += 1
            value[0] = block[at] / np.float32(-8.0)
            inverse = np.float32(0.0) if value[0] == 0 else np.float32(1.0) / value[0]
            half, target = _half(word, value), out[i, b * 18 : b * 18 + 18]
            if half & 0x7FFF == 0x7C00:
                return i
            target[0], target[1] = half & 255, half >> 8
            for j in range(32):
                codes_wide[j] = min(max(np.int32(block[j] * inverse + np.float32(8.5)), np.int32(0)), np.int32(15))
            codes = target[2:]
            for j in range(16):
                codes[j] = np.uint8(codes_wide[j] | (codes_wide[j + 16] << 4))
    return -1


def pack_q8_0(weight: torch.Tensor, packed: torch.Tensor) -> int:
    """Floats [rows, cols] → packed uint8 [rows, cols / 32 · 34]. Returns the first row that it cannot hold, or -1."""
    return _pack(_q8_0, weight, packed)


def pack_q4_0(weight: torch.Tensor, packed: torch.Tensor) -> int:
    """Floats [rows, cols] → packed uint8 [rows, cols / 32 · 18]. Returns the first row that it cannot hold, or -1."""
    return _pack(_q4_0, weight, packed)


def _pack(kernel: Callable[..., int], weight: torch.Tensor, packed: torch.Tensor) -> int:
    """No torch operation on many values: its threads and the caller's would get in each other's way."""
    weight, out = weight.contiguous(), packed.numpy()
    if weight.dtype == torch.bfloat16:
        return kernel(weight.view(torch.int16).numpy().view(np.uint16), np.int32(16), out)
    if weight.dtype == torch.float32:
        return kernel(weight.view(torch.int32).numpy(), np.int32(0), out)
    for start in range(0, weight.shape[0], SLICE):
        wide = weight[start : start + SLICE].numpy().astype(np.float32).view(np.int32)
        row = kernel(wide, np.int32(0), out[start : start + SLICE])
        if row >= 0:
            return start + row
    return -1
