"""INT4 group quantization on the CPU: one pass from stored weights to packed words, scales and error.

Legend as in `bits.py`; C candidates of the scale; J = G / 8 packed words of one group.
"""

from __future__ import annotations

import numpy as np

from quant.kernels.bits import (
    INF_BITS,
    LANES,
    ROUND_MAGIC,
    STAGE_ROWS,
    TILES,
    TINY_SCALE,
    UNROLL,
    ZERO_GROUP_SCALE,
    float_bits,
    jit,
    load_tiles,
    round_bf16,
    round_even,
)

NUM_CANDIDATES = 9
SHRINK_STEP = np.float32(0.04)  # candidate c is the base scale times 1 - 0.04 c: 1.00, 0.96, …, 0.68
LOW, HIGH = np.float32(-8), np.float32(7)
ONE, ZERO = np.float32(1), np.float32(0)


@jit
def clamp_q(u):  # type: ignore[no-untyped-def]
    """A quotient → [-8, 7], not yet rounded."""
    u = u if u > LOW else LOW
    return u if u < HIGH else HIGH


@jit
def round_q(u):  # type: ignore[no-untyped-def]
    """A quotient → the nearest q in [-8, 7] as float32, ties to even."""
    return round_even(clamp_q(u))


@jit
def safe_scale(s):  # type: ignore[no-untyped-def]
    """float32 → bfloat16 scale whose inverse is finite; an all-zero group gets compressed-tensors' stand-in."""
    s = round_bf16(s)
    return s if abs(s) >= TINY_SCALE else ZERO_GROUP_SCALE


@jit
def extremes(tile, high, low):  # type: ignore[no-untyped-def]
    """high[R] = max(0, largest), low[R] = min(0, smallest)."""
    lanes = tile.shape[1]
    high[:] = ZERO
    low[:] = ZERO
    for k in range(0, tile.shape[0], UNROLL):
        for r in range(lanes):
            up, down = high[r], low[r]
            for i in range(UNROLL):
                w = tile[k + i, r]
                up = w if w > up else up
                down = w if w < down else down
            high[r], low[r] = up, down


@jit
def absmax_scale(tile, work, scale):  # type: ignore[no-untyped-def]
    """scale[R] = absmax / 7.5, as compressed-tensors computes it."""
    high, low = work[0], work[1]
    extremes(tile, high, low)
    for r in range(tile.shape[1]):
        s = round_bf16((high[r] if high[r] >= -low[r] else -low[r]) / np.float32(7.5))
        scale[r] = s if s != ZERO else ZERO_GROUP_SCALE


@jit
def squared(u):  # type: ignore[no-untyped-def]
    """(u - q)**2 of a quotient."""
    d = u - round_q(u)
    return d * d


@jit
def search_error(tile, inverse, error):  # type: ignore[no-untyped-def]
    """error[C, R] = sum over k of (w/s - q)**2 with 1/s from inverse[C, R]; three candidates share a pass."""
    n_cols, lanes = tile.shape
    error[:] = ZERO
    for c in range(0, NUM_CANDIDATES, 3):
        inv0, inv1, inv2 = inverse[c], inverse[c + 1], inverse[c + 2]
        sum0, sum1, sum2 = error[c], error[c + 1], error[c + 2]
        for k in range(0, n_cols, UNROLL):
            for r in range(lanes):
                i0, i1, i2 = inv0[r], inv1[r], inv2[r]
                e0, e1, e2 = sum0[r], sum1[r], sum2[r]
                for i in range(UNROLL):
                    w = tile[k + i, r]
                    e0 += squared(w * i0)
                    e1 += squared(w * i1)
                    e2 += squared(w * i2)
                sum0[r], sum1[r], sum2[r] = e0, e1, e2


@jit
def mse_scale(tile, work, scale):  # type: ignore[no-untyped-def]
    """scale[R] of the least squared error: the largest |w| on -8, shrunk by each candidate, then least squares.

    `work` is float32 scratch [2 * NUM_CANDIDATES + 2, R].
    """
    lanes = tile.shape[1]
    inverse, error = work[:NUM_CANDIDATES], work[NUM_CANDIDATES : 2 * NUM_CANDIDATES]
    base, best = work[2 * NUM_CANDIDATES], work[2 * NUM_CANDIDATES + 1]
    extremes(tile, base, best)
    for r in range(lanes):
        base[r] = (base[r] if base[r] >= -best[r] else best[r]) * np.float32(-0.125)
    for c in range(NUM_CANDIDATES):
        factor = ONE - np.float32(c) * SHRINK_STEP
        for r in range(lanes):
            inverse[c, r] = ONE / safe_scale(base[r] * factor)
    search_error(tile, inverse, error)
    for c in range(NUM_CANDIDATES):
        factor = ONE - np.float32(c) * SHRINK_STEP
        for r in range(lanes):
            s = safe_scale(base[r] * factor)
            e = error[c, r] * (s * s)
            better = c == 0 or e < best[r]
            scale[r] = s if better else scale[r]
            best[r] = e if better else best[r]
    refine(tile, work, best, scale)


@jit
def refine(tile, work, best, scale):  # type: ignore[no-untyped-def]
    """Least squares for fixed q, s = sum(w q) / sum(q q), kept where the squared error falls below best[R]."""
    n_cols, lanes = tile.shape
    inverse, dot, norm, trial = work[0], work[1], work[2], work[3]
    for r in range(lanes):
        inverse[r] = ONE / scale[r]
    dot[:] = ZERO
    norm[:] = ZERO
    for k in range(0, n_cols, UNROLL):
        for r in range(lanes):
            wq, qq = dot[r], norm[r]
            for i in range(UNROLL):
                w = tile[k + i, r]
                q = round_q(w * inverse[r])
                wq += w * q
                qq += q * q
            dot[r], norm[r] = wq, qq
    for r in range(lanes):
        trial[r] = safe_scale(dot[r] / (norm[r] if norm[r] > ZERO else ONE))
        inverse[r] = ONE / trial[r]
    dot[:] = ZERO
    for k in range(0, n_cols, UNROLL):
        for r in range(lanes):
            total = dot[r]
            for i in range(UNROLL):
                u = tile[k + i, r] * inverse[r]
                d = u - round_q(u)
                total += d * d
            dot[r] = total
    for r in range(lanes):
        better = dot[r] * (trial[r] * trial[r]) < best[r]
        scale[r] = trial[r] if better else scale[r]


@jit
def quantize_tile(tile, divide, bf16_source, work, scale, words):  # type: ignore[no-untyped-def]
    """Pack q of a tile into words[J, R]; work[0] = squared error, work[1] = squared weight per lane.

    `divide`: q = round(w / s) with the quotient in the source's precision, as compressed-tensors has it;
    otherwise q = round(w * (1/s)).
    """
    n_cols, lanes = tile.shape
    error, square, inverse = work[0], work[1], work[2]
    error[:] = ZERO
    square[:] = ZERO
    for r in range(lanes):
        inverse[r] = ONE / scale[r]
    for j in range(n_cols // 8):
        for r in range(lanes):
            word, err, sq, s, inv = np.int32(0), error[r], square[r], scale[r], inverse[r]
            for i in range(8):
                w = tile[8 * j + i, r]
                u = w / s if divide else w * inv
                if divide and bf16_source:
                    u = round_bf16(u)
                t = clamp_q(u) + ROUND_MAGIC
                d = w - round_bf16((t - ROUND_MAGIC) * s)
                err += d * d
                sq += w * w
                nibble = np.int32(np.int32(float_bits(t) + np.int32(8)) & np.int32(15))
                word = np.int32(word | np.int32(nibble << np.int32(4 * i)))
            words[j, r] = word
            error[r], square[r] = err, sq


@jit
def int4_rows(src, ld, transposed, mse, bf16_source, packed, scales, error, square):  # type: ignore[no-untyped-def]
    """Quantize weight [rows, cols] to `packed` int32 [rows, cols/8] and `scales` (bfloat16 bits) uint16 [rows, cols/g].

    error[rows], square[rows] float64: squared error after dequantization to bfloat16, squared weight.
    Returns the first row of a panel that holds NaN or Inf, or -1.
    """
    rows, groups = scales.shape
    n_words = packed.shape[1] // groups
    group = 8 * n_words
    tiles = np.empty((TILES, group, LANES), np.float32)
    stage = np.empty((STAGE_ROWS, group), np.float32)
    work = np.empty((2 * NUM_CANDIDATES + 2, LANES), np.float32)
    words = np.empty((n_words, LANES), np.int32)
    scale = np.empty(LANES, np.float32)
    error[:] = 0.0
    square[:] = 0.0
    for panel in range(0, rows, TILES * LANES):
        in_panel = min(TILES * LANES, rows - panel)
        for g in range(groups):
            if load_tiles(src, ld, transposed, panel, in_panel, g * group, group, tiles, stage) >= INF_BITS:
                return panel
            for t in range((in_panel + LANES - 1) // LANES):
                if mse:
                    mse_scale(tiles[t], work, scale)
                else:
                    absmax_scale(tiles[t], work, scale)
                quantize_tile(tiles[t], not mse, bf16_source, work, scale, words)
                row0 = panel + t * LANES
                for r in range(min(LANES, rows - row0)):
                    scales[row0 + r, g] = np.uint16(np.int32(float_bits(scale[r]) >> 16) & np.int32(0xFFFF))
                    error[row0 + r] += np.float64(work[0, r])
                    square[row0 + r] += np.float64(work[1, r])
                    out = packed[row0 + r, g * n_words : (g + 1) * n_words]
                    for j in range(n_words):
                        out[j] = words[j, r]
    return -1
