"""Dequantization and error on the CPU. Legend as in `bits.py`; J = G / 8 packed words of one group."""

from __future__ import annotations

import numpy as np

from quant.kernels.bits import ABS_MASK, LANES, STAGE_ROWS, TILES, bits_float, float_bits, jit, load_tiles, round_bf16


@jit
def int4_expand(packed, scales, zeros, out):  # type: ignore[no-untyped-def]
    """packed int32 [rows, cols/8], bfloat16 bits `scales` and int8 `zeros` [rows, cols/g] → bfloat16 bits
    out[rows, cols] = (q - zero) · scale."""
    rows, groups = scales.shape
    n_words = packed.shape[1] // groups
    values = np.empty(8 * n_words, np.float32)
    for r in range(rows):
        for g in range(groups):
            offset = np.int32(np.int32(zeros[r, g]) + np.int32(8))
            words = packed[r, g * n_words : (g + 1) * n_words]
            for j in range(n_words):
                for i in range(8):
                    nibble = np.int32(np.int32(words[j] >> np.int32(4 * i)) & np.int32(15))
                    values[8 * j + i] = np.float32(np.int32(nibble - offset))
            scale = bits_float(np.int32(np.int32(scales[r, g]) << np.int32(16)))
            line = out[r, 8 * n_words * g : 8 * n_words * (g + 1)]
            for k in range(8 * n_words):
                line[k] = np.uint16(np.int32(float_bits(round_bf16(values[k] * scale)) >> 16) & np.int32(0xFFFF))


@jit
def row_errors(src, ld, transposed, back, back_ld, cols, block, error, square, largest):  # type: ignore[no-untyped-def]
    """error[rows], square[rows] float64 = sum (w - b)**2 and sum w**2; largest[rows] float32 = max |w - b|.

    `back` is stored by rows, `back_ld` elements apart. Sums are float32 inside `block` columns and float64 over blocks,
    in the order of the quantizing kernels. NaN and Inf come through.
    """
    rows = error.size
    tiles = np.empty((TILES, block, LANES), np.float32)
    others = np.empty((TILES, block, LANES), np.float32)
    stage = np.empty((STAGE_ROWS, block), np.float32)
    work = np.empty((2, LANES), np.float32)
    peak = np.empty(LANES, np.int32)
    error[:] = 0.0
    square[:] = 0.0
    largest[:] = np.float32(0)
    for panel in range(0, rows, TILES * LANES):
        in_panel = min(TILES * LANES, rows - panel)
        for col0 in range(0, cols, block):
            n_cols = min(block, cols - col0)
            load_tiles(src, ld, transposed, panel, in_panel, col0, n_cols, tiles, stage)
            load_tiles(back, back_ld, False, panel, in_panel, col0, n_cols, others, stage)
            for t in range((in_panel + LANES - 1) // LANES):
                tile_errors(tiles[t, :n_cols], others[t, :n_cols], work, peak)
                row0 = panel + t * LANES
                for r in range(min(LANES, rows - row0)):
                    error[row0 + r] += np.float64(work[0, r])
                    square[row0 + r] += np.float64(work[1, r])
                    d = bits_float(peak[r])
                    largest[row0 + r] = d if not d <= largest[row0 + r] else largest[row0 + r]


@jit
def tile_errors(tile, other, work, peak):  # type: ignore[no-untyped-def]
    """work[0] = squared error, work[1] = squared weight, peak = bits of the largest |difference|, per lane."""
    error, square = work[0], work[1]
    error[:] = np.float32(0)
    square[:] = np.float32(0)
    peak[:] = np.int32(0)
    for k in range(tile.shape[0]):
        for r in range(tile.shape[1]):
            d = tile[k, r] - other[k, r]
            error[r] += d * d
            square[r] += tile[k, r] * tile[k, r]
            peak[r] = max(peak[r], np.int32(float_bits(d) & ABS_MASK))
