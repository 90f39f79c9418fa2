"""FP8 (e4m3fn) per-row quantization on the CPU. Legend as in `bits.py`."""

from __future__ import annotations

import numpy as np

from quant.kernels.bits import (
    ABS_MASK,
    INF_BITS,
    LANES,
    STAGE_ROWS,
    TILES,
    ZERO_GROUP_SCALE,
    bits_float,
    float_bits,
    jit,
    load_tiles,
    round_bf16,
    to_float,
)

TILE_COLS = 128  # the last tile of a row may be narrower
FP8_MAX = np.float32(448)
MIN_NORMAL = np.float32(2.0**-6)
SUBNORMAL_MAGIC = np.float32(2.0**14)  # its ulp is 2**-9, the step of e4m3fn's subnormals
ZERO = np.float32(0)


@jit
def encode(v):  # type: ignore[no-untyped-def]
    """float32 in [-448, 448] → e4m3fn bits in an int32, to nearest, ties to even."""
    bits = float_bits(v)
    magnitude = np.int32(bits & ABS_MASK)
    odd = np.int32(np.int32(magnitude >> 20) & np.int32(1))
    normal = np.int32(np.int32(np.int32(magnitude + np.int32(0x7FFFF) + odd) >> 20) - np.int32(120 << 3))
    small = np.int32(float_bits(bits_float(magnitude) + SUBNORMAL_MAGIC) - float_bits(SUBNORMAL_MAGIC))
    code = small if bits_float(magnitude) < MIN_NORMAL else normal
    return np.int32(code | np.int32(np.int32(bits >> 24) & np.int32(0x80)))


@jit
def decode(code):  # type: ignore[no-untyped-def]
    """e4m3fn bits in an int32 → float32; the NaN codes are not expected."""
    magnitude = np.int32(code & np.int32(0x7F))
    normal = bits_float(np.int32(np.int32(magnitude << 20) + np.int32(120 << 23)))
    value = np.float32(magnitude) * np.float32(2.0**-9) if magnitude < np.int32(8) else normal
    return -value if np.int32(code & np.int32(0x80)) else value


@jit
def row_absmax(src, ld, transposed, rows, cols, largest):  # type: ignore[no-untyped-def]
    """largest[rows] int32 = bits of the largest |w| of each row, read in storage order."""
    largest[:] = 0
    if transposed:
        for k in range(cols):
            line = src[k * ld : k * ld + rows]
            for r in range(rows):
                largest[r] = max(largest[r], np.int32(float_bits(to_float(line[r])) & ABS_MASK))
    else:
        for r in range(rows):
            line = src[r * ld : r * ld + cols]
            m = np.int32(0)
            for k in range(cols):
                m = max(m, np.int32(float_bits(to_float(line[k])) & ABS_MASK))
            largest[r] = m


@jit
def encode_tile(tile, bf16_source, scale, words, work):  # type: ignore[no-untyped-def]
    """words[G/4, R] int32 = e4m3fn(w / s) of four columns each; work[0] = squared error, work[1] = squared weight."""
    lanes = tile.shape[1]
    error, square = work[0], work[1]
    error[:] = ZERO
    square[:] = ZERO
    for j in range(tile.shape[0] // 4):
        for r in range(lanes):
            word, err, sq, s = np.int32(0), error[r], square[r], scale[r]
            for i in range(4):
                w = tile[4 * j + i, r]
                u = w / s
                u = round_bf16(u) if bf16_source else u
                u = u if u > -FP8_MAX else -FP8_MAX
                u = u if u < FP8_MAX else FP8_MAX
                code = encode(u)
                word = np.int32(word | np.int32(code << np.int32(8 * i)))
                d = w - round_bf16(decode(code) * s)
                err += d * d
                sq += w * w
            words[j, r] = word
            error[r], square[r] = err, sq


@jit
def store_words(words, n_rows, n_cols, out, row0, col0):  # type: ignore[no-untyped-def]
    """words[G/4, R] → bytes out[row0 : row0 + n_rows, col0 : col0 + n_cols], by words where rows start aligned."""
    n_words = n_cols // 4
    if out.shape[1] % 4 == 0:
        wide = out.view(np.int32)
        for r in range(n_rows):
            line = wide[row0 + r, col0 // 4 : col0 // 4 + n_words]
            for j in range(n_words):
                line[j] = words[j, r]
    else:
        for r in range(n_rows):
            for k in range(n_cols):
                out[row0 + r, col0 + k] = np.uint8(np.int32(words[k // 4, r] >> np.int32(8 * (k % 4))) & np.int32(255))


@jit
def fp8_rows(src, ld, transposed, bf16_source, out, scales, error, square):  # type: ignore[no-untyped-def]
    """Weight [rows, cols] → `out` uint8 (e4m3fn bits) [rows, cols] and `scales` uint16 (bfloat16 bits) [rows].

    error[rows], square[rows] float64: squared error after dequantization to bfloat16, squared weight.
    Returns the first row that holds NaN or Inf, or -1.
    """
    rows, cols = out.shape
    largest = np.empty(rows, np.int32)
    row_absmax(src, ld, transposed, rows, cols, largest)
    tiles = np.empty((TILES, TILE_COLS, LANES), np.float32)
    stage = np.empty((STAGE_ROWS, TILE_COLS), np.float32)
    words = np.empty((TILE_COLS // 4, LANES), np.int32)
    work = np.empty((2, LANES), np.float32)
    scale = np.ones(TILES * LANES, np.float32)
    error[:] = 0.0
    square[:] = 0.0
    for panel in range(0, rows, TILES * LANES):
        in_panel = min(TILES * LANES, rows - panel)
        for r in range(in_panel):
            if largest[panel + r] >= INF_BITS:
                return panel + r
            s = round_bf16(bits_float(largest[panel + r]) / FP8_MAX)
            scale[r] = s if s != ZERO else ZERO_GROUP_SCALE
            scales[panel + r] = np.uint16(np.int32(float_bits(scale[r]) >> 16) & np.int32(0xFFFF))
        for col0 in range(0, cols, TILE_COLS):
            n_cols = min(TILE_COLS, cols - col0)
            n_padded = (n_cols + 3) // 4 * 4
            tiles[:, n_cols:n_padded] = ZERO  # adds nothing to the sums
            load_tiles(src, ld, transposed, panel, in_panel, col0, n_cols, tiles, stage)
            for t in range((in_panel + LANES - 1) // LANES):
                tile, in_tile = tiles[t, :n_padded], min(LANES, in_panel - t * LANES)
                encode_tile(tile, bf16_source, scale[t * LANES : (t + 1) * LANES], words, work)
                row0 = panel + t * LANES
                store_words(words, in_tile, n_cols, out, row0, col0)
                for r in range(in_tile):
                    error[row0 + r] += np.float64(work[0, r])
                    square[row0 + r] += np.float64(work[1, r])
    return -1
