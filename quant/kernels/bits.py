"""What the kernels share: bit casts, bfloat16 rounding, and the tile loader.

Dimension legend: R = LANES rows of the weight side by side, G columns of one tile (a multiple of UNROLL).
A tile is float32 [G, R]: SIMD lanes run over rows, so sums over columns are sequential and do not depend on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from l4tool.core.jit import kernel_jit

LANES = 128
TILES = 8  # read side by side: 2 KiB of each storage row of a fused expert per page that is touched
STAGE_ROWS = 32  # rows transposed at a time, small enough for the first-level cache
UNROLL = 8  # columns handled per inner step, so that sums stay in registers
ROUND_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest integer, ties to even
ABS_MASK = np.int32(0x7FFFFFFF)
INF_BITS = np.int32(0x7F800000)
TINY_SCALE = np.float32(2.0**-120)  # below it 1/scale overflows float32
ZERO_GROUP_SCALE = np.float32(2.0**-7)  # bfloat16 eps: what compressed-tensors stores where the scale would be 0

jit = kernel_jit(Path(__file__).parent, nogil=True)


@intrinsic
def float_bits(typingctx: Any, x: Any) -> Any:
    """float32 → its bits as int32."""
    return types.int32(types.float32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def bits_float(typingctx: Any, x: Any) -> Any:
    """int32 bits → float32."""
    return types.float32(types.int32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def to_float(typingctx: Any, x: Any) -> Any:
    """A stored element → float32, exactly. uint16 holds bfloat16 bits, int16 float16 bits, float32 itself."""

    def from_bf16(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(wide, ir.FloatType())

    def from_f16(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        # By hand: without F16C, fpext becomes a call to a function that the process does not have.
        i32 = ir.IntType(32)
        wide = builder.zext(args[0], i32)
        magnitude = builder.and_(wide, i32(0x7FFF))
        shifted = builder.shl(magnitude, i32(13))
        finite = builder.bitcast(builder.fmul(builder.bitcast(shifted, ir.FloatType()), ir.FloatType()(2.0**112)), i32)
        special = builder.icmp_unsigned(">=", magnitude, i32(0x7C00))  # Inf and NaN
        bits = builder.select(special, builder.or_(shifted, i32(0x7F800000)), finite)
        sign = builder.shl(builder.and_(wide, i32(0x8000)), i32(16))
        return builder.bitcast(builder.or_(bits, sign), ir.FloatType())

    codegen = {types.uint16: from_bf16, types.int16: from_f16, types.float32: lambda ctx, builder, sig, args: args[0]}
    return types.float32(x), codegen[x]


@intrinsic
def round_even(typingctx: Any, x: Any) -> Any:
    """float32 → the nearest integer as float32, ties to even: one instruction where the CPU has it."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.roundeven.f32")
        return builder.call(function, args)

    return types.float32(types.float32), codegen


@jit
def round_bf16(x):  # type: ignore[no-untyped-def]
    """float32 → the nearest bfloat16 (ties to even), as float32. Not for NaN."""
    bits = float_bits(x)
    bits = np.int32(bits + np.int32(0x7FFF) + (np.int32(bits >> 16) & np.int32(1)))
    return bits_float(np.int32(bits & np.int32(-65536)))


@jit
def load_tiles(src, ld, transposed, row0, n_rows, col0, n_cols, tiles, stage):  # type: ignore[no-untyped-def]
    """Copy weight[row0 : row0 + n_rows, col0 : col0 + n_cols] as float32 to tiles[T, G, R], R rows after R rows.

    `src` is the flat storage and `ld` the distance of two rows (of two columns where `transposed`); `stage` is
    float32 scratch [STAGE_ROWS, G]. What a tile used has no row for becomes 0. Returns the bits of the largest
    absolute value: INF_BITS or more means Inf or NaN.
    """
    n_tiles = (n_rows + LANES - 1) // LANES
    if n_rows < n_tiles * LANES:
        tiles[n_tiles - 1] = np.float32(0)
    if transposed:
        for k in range(n_cols):
            start = (col0 + k) * ld + row0
            for t in range(n_tiles):
                first, in_tile = t * LANES, min(LANES, n_rows - t * LANES)
                line, out = src[start + first : start + first + in_tile], tiles[t, k]
                for r in range(in_tile):
                    out[r] = to_float(line[r])
    else:
        for block in range(0, n_rows, STAGE_ROWS):
            in_block = min(STAGE_ROWS, n_rows - block)
            for r in range(in_block):
                start = (row0 + block + r) * ld + col0
                line, out = src[start : start + n_cols], stage[r]
                for k in range(n_cols):
                    out[k] = to_float(line[k])
            tile, first = tiles[block // LANES], block % LANES
            for k in range(n_cols):
                out = tile[k, first : first + in_block]
                for r in range(in_block):
                    out[r] = stage[r, k]
    largest = np.int32(0)
    for t in range(n_tiles):
        for k in range(n_cols):
            out = tiles[t, k]
            for r in range(LANES):
                largest = max(largest, np.int32(float_bits(out[r]) & ABS_MASK))
    return largest


@jit
def largest_bits(src):  # type: ignore[no-untyped-def]
    """Bits of the largest absolute value of a flat array: INF_BITS or more means Inf or NaN."""
    largest = np.int32(0)
    for i in range(src.size):
        largest = max(largest, np.int32(float_bits(to_float(src[i])) & ABS_MASK))
    return largest
