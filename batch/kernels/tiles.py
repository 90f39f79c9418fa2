"""Register tiles for matrix products and attention, as LLVM IR: the inner loops that numba cannot express.

Every cell of a tile is computed by the same operations in the same order whatever the tile's number of rows, so a
row's result never depends on its neighbours. bfloat16 products use VDPBF16PS where the CPU has it.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from batch.kernels.vector_ir import (
    F32X16,
    FLOAT,
    I32X16,
    VECTOR_BYTES,
    broadcast,
    constant,
    dot,
    fma,
    halves,
    load,
    loop_over,
    prefetch,
    shuffle,
    splat,
    store,
    sum_four,
)

TILE_ROWS, TILE_COLUMNS = 6, 4  # 24 sums in registers


def dot_tile(rows: int) -> Any:
    """An intrinsic tile(like, x, x_bytes, w, w_bytes, size, out, out_bytes): `rows` rows of x · 4 rows of w.

    x, w: addresses of rows of like's type, x_bytes and w_bytes apart, `size` bytes long (a multiple of 64). Row m's
    four float32 sums go to out + m · out_bytes.
    """

    @intrinsic
    def tile(
        typingctx: Any, like: Any, x: Any, x_bytes: Any, w: Any, w_bytes: Any, size: Any, out: Any, out_bytes: Any
    ) -> Any:
        vector = F32X16 if like == types.float32 else I32X16

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, x, x_bytes, w, w_bytes, size, out, out_bytes = args
            x_rows = [builder.add(x, builder.mul(x_bytes, constant(m))) for m in range(rows)]
            w_rows = [builder.add(w, builder.mul(w_bytes, constant(n))) for n in range(2 * TILE_COLUMNS)]
            cells = [(m, n) for m in range(rows) for n in range(TILE_COLUMNS)]
            with loop_over(builder, size, VECTOR_BYTES, [splat(F32X16, 0.0)] * len(cells)) as loop:
                left = [load(builder, builder.add(row, loop.offset), vector) for row in x_rows]
                right = [load(builder, builder.add(row, loop.offset), vector) for row in w_rows[:TILE_COLUMNS]]
                loop.new = [dot(builder, old, left[m], right[n]) for old, (m, n) in zip(loop.old, cells, strict=True)]
                for row in w_rows[TILE_COLUMNS:]:  # rows are too short for the hardware's prefetcher
                    prefetch(builder, builder.add(row, loop.offset))
            for m in range(rows):
                four = sum_four(builder, *loop.new[m * TILE_COLUMNS : (m + 1) * TILE_COLUMNS])
                store(builder, four, builder.add(out, builder.mul(out_bytes, constant(m))))
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 7), codegen

    return tile


def mix_tile(rows: int) -> Any:
    """An intrinsic tile(like, p, p_bytes, v, v_bytes, count, out, out_bytes): out[m] += Σ_j p[m, j] · v[j].

    p: address of float32 rows; v: `count` rows of 32 elements of like's type; out: float32 rows of 32.
    """

    @intrinsic
    def tile(
        typingctx: Any, like: Any, p: Any, p_bytes: Any, v: Any, v_bytes: Any, count: Any, out: Any, out_bytes: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, p, p_bytes, v, v_bytes, count, out, out_bytes = args
            p_rows = [builder.add(p, builder.mul(p_bytes, constant(m))) for m in range(rows)]
            out_rows = [builder.add(out, builder.mul(out_bytes, constant(m))) for m in range(rows)]
            ends = [(row, builder.add(row, constant(VECTOR_BYTES))) for row in out_rows]
            initial = [load(builder, address, F32X16) for pair in ends for address in pair]
            if like != types.float32:
                initial = _pairwise(builder, initial, _deinterleave)
            with loop_over(builder, count, 1, initial) as loop:
                at = builder.add(v, builder.mul(v_bytes, loop.offset))
                if like == types.float32:
                    values = [load(builder, builder.add(at, constant(n)), F32X16) for n in (0, VECTOR_BYTES)]
                else:
                    values = list(halves(builder, load(builder, at, I32X16)))
                loop.new = []
                for m, row in enumerate(p_rows):
                    weight = load(builder, builder.add(row, builder.mul(loop.offset, constant(4))), FLOAT)
                    wide = broadcast(builder, weight)
                    loop.new += [fma(builder, wide, values[i], loop.old[2 * m + i]) for i in (0, 1)]
            final = loop.new if like == types.float32 else _pairwise(builder, loop.new, _interleave)
            for address, value in zip([a for pair in ends for a in pair], final, strict=True):
                store(builder, value, address)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 7), codegen

    return tile


def _pairwise(builder: Any, vectors: list[Any], change: Any) -> list[Any]:
    return [v for i in range(0, len(vectors), 2) for v in change(builder, vectors[i], vectors[i + 1])]


def _deinterleave(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """32 values in order → those at even and at odd places, as `halves` splits bfloat16."""
    return shuffle(builder, a, b, list(range(0, 32, 2))), shuffle(builder, a, b, list(range(1, 32, 2)))


def _interleave(builder: Any, even: Any, odd: Any) -> tuple[Any, Any]:
    order = [lane for i in range(16) for lane in (i, 16 + i)]
    return shuffle(builder, even, odd, order[:16]), shuffle(builder, even, odd, order[16:])
