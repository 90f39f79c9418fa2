"""Dequantization on the CPU: packed codes to bytes, and bytes (int8 or e4m3fn) times their scales."""

from __future__ import annotations

import numpy as np

from quant.kernels.bits import bits_float, float_bits, jit, round_bf16

FP8_REBIAS = np.float32(2.0**120)  # e4m3fn's bits at the top of a float32 lack 127 - 7 in the exponent
NAN_CODE = np.int32(0x7F)
NAN = np.float32("nan")


@jit
def unpack_words(words, bits, out):  # type: ignore[no-untyped-def]
    """uint32 words [rows, W] → int8 out[rows, cols]: code k is in bits k·bits … of its row, stored as
    code + 2**(bits - 1)."""
    mask, offset = np.uint64((1 << bits) - 1), np.int32(1 << (bits - 1))
    for r in range(out.shape[0]):
        for k in range(out.shape[1]):
            place, shift = (k * bits) >> 5, (k * bits) & 31
            window = np.uint64(words[r, place])
            if shift + bits > 32:
                window |= np.uint64(words[r, place + 1]) << np.uint64(32)
            out[r, k] = np.int8(np.int32((window >> np.uint64(shift)) & mask) - offset)


@jit
def expand_int8(codes, scales, zeros, span, rounded, out, exact):  # type: ignore[no-untyped-def]
    """(code - zero) · scale of int8 codes [rows, cols]; `scales`, `zeros` float32 [rows, ceil(cols / span)].

    `rounded`: to bfloat16 bits out[rows, cols] (uint16); else to exact[rows, cols] (float32). The other is not used.
    """
    rows, cols = codes.shape
    for r in range(rows):
        for g in range(scales.shape[1]):
            first, last = span * g, min(span * (g + 1), cols)
            line, scale, zero = codes[r, first:last], scales[r, g], zeros[r, g]
            if rounded:
                to = out[r, first:last]
                for k in range(line.size):
                    bits = float_bits(round_bf16((np.float32(line[k]) - zero) * scale))
                    to[k] = np.uint16(np.int32(bits >> 16) & np.int32(0xFFFF))
            else:
                wide = exact[r, first:last]
                for k in range(line.size):
                    wide[k] = (np.float32(line[k]) - zero) * scale


@jit
def decode_any(code):  # type: ignore[no-untyped-def]
    """e4m3fn bits in an int32 → float32, subnormals and NaN included."""
    magnitude = np.int32(code & np.int32(0x7F))
    sign = np.int32(np.int32(code & np.int32(0x80)) << 24)
    value = bits_float(np.int32(np.int32(magnitude << 20) | sign)) * FP8_REBIAS
    return NAN if magnitude == NAN_CODE else value


@jit
def expand_fp8(codes, scales, span, rounded, out, exact):  # type: ignore[no-untyped-def]
    """As `expand_int8`, of e4m3fn bits (uint8)."""
    rows, cols = codes.shape
    for r in range(rows):
        for g in range(scales.shape[1]):
            first, last = span * g, min(span * (g + 1), cols)
            line, scale = codes[r, first:last], scales[r, g]
            if rounded:
                to = out[r, first:last]
                for k in range(line.size):
                    bits = float_bits(round_bf16(decode_any(np.int32(line[k])) * scale))
                    to[k] = np.uint16(np.int32(bits >> 16) & np.int32(0xFFFF))
            else:
                wide = exact[r, first:last]
                for k in range(line.size):
                    wide[k] = decode_any(np.int32(line[k])) * scale
