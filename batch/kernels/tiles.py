"""Register tiles for matrix products and attention, as LLVM IR: the inner loops that numba cannot express.

Every cell of a tile is computed by the same operations in the same order whatever the tile's number of rows, so a
row's result never depends on its neighbours. bfloat16 products use VDPBF16PS where the CPU has it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
F32X16, I32X16 = ir.VectorType(FLOAT, 16), ir.VectorType(I32, 16)
VECTOR_BYTES = 64
TILE_ROWS, TILE_COLUMNS = 6, 4  # 24 sums in registers


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not declare."""

    def _to_string(self) -> str:
        return "bfloat"


BF16X32 = ir.VectorType(_BFloat(), 32)


@functools.cache
def has_avx512_bf16() -> bool:
    """True where the host multiplies pairs of bfloat16 in 512-bit vectors."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


@functools.cache
def has_avx512_vnni() -> bool:
    """True where the host multiplies fours of bytes in 512-bit vectors."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


def _constant(value: int) -> Any:
    return ir.Constant(I64, value)


def _splat(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _load(builder: Any, address: Any, vector: Any) -> Any:
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at any address, valid or not."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 3, 1)))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", F32X16, a, b, c)


def _halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """Sixteen 32-bit words, each two bfloat16 → their low and high halves as <16 x f32>."""
    low = builder.shl(words, _splat(I32X16, 16))
    high = builder.and_(words, _splat(I32X16, 0xFFFF0000))
    return builder.bitcast(low, F32X16), builder.bitcast(high, F32X16)


def _dot(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """total <16 x f32> += products of two vectors: 16 float32, or 32 bfloat16 as 16 words added in pairs."""
    if left.type == F32X16:
        return _fma(builder, left, right, total)
    if has_avx512_bf16():
        a, b = builder.bitcast(left, BF16X32), builder.bitcast(right, BF16X32)
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X16, total, a, b)
    for a, b in zip(_halves(builder, left), _halves(builder, right), strict=True):
        total = _fma(builder, a, b, total)
    return total


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


def _add_shuffled(builder: Any, a: Any, b: Any, first: tuple[int, ...], second: tuple[int, ...]) -> Any:
    """Add two picks of 4 out of each 128-bit lane's 8 values (0..3 of a, 4..7 of b)."""
    picks = [[4 * q + (i if i < 4 else i + 12) for q in range(4) for i in pick] for pick in (first, second)]
    return builder.fadd(_shuffle(builder, a, b, picks[0]), _shuffle(builder, a, b, picks[1]))


def _sum_four(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four <16 x f32> → the <4 x f32> of their sums."""
    ab = _add_shuffled(builder, a, b, (0, 1, 4, 5), (2, 3, 6, 7))
    cd = _add_shuffled(builder, c, d, (0, 1, 4, 5), (2, 3, 6, 7))
    lanes = _add_shuffled(builder, ab, cd, (0, 2, 4, 6), (1, 3, 5, 7))  # a, b, c, d in each 128-bit lane
    quarters = [_shuffle(builder, lanes, lanes, list(range(4 * q, 4 * q + 4))) for q in range(4)]
    return builder.fadd(builder.fadd(quarters[0], quarters[1]), builder.fadd(quarters[2], quarters[3]))


class _Loop:
    """A loop's running offset and the values carried from one round to the next."""

    def __init__(self, offset: Any, old: list[Any]) -> None:
        self.offset, self.old = offset, old
        self.new: list[Any] = old


@contextlib.contextmanager
def _loop(builder: Any, size: Any, step: int, initial: list[Any]) -> Iterator[_Loop]:
    """Emit a loop over offset = 0, step, … < size (at least one round); the body sets `new`, which outlives it."""
    before = builder.block
    body, after = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    offset = builder.phi(I64)
    loop = _Loop(offset, [builder.phi(value.type) for value in initial])
    yield loop
    following = builder.add(offset, _constant(step))
    offset.add_incoming(_constant(0), before)
    offset.add_incoming(following, builder.block)
    for phi, first, value in zip(loop.old, initial, loop.new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, size), body, after)
    builder.position_at_end(after)


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
            x_rows = [builder.add(x, builder.mul(x_bytes, _constant(m))) for m in range(rows)]
            w_rows = [builder.add(w, builder.mul(w_bytes, _constant(n))) for n in range(2 * TILE_COLUMNS)]
            cells = [(m, n) for m in range(rows) for n in range(TILE_COLUMNS)]
            with _loop(builder, size, VECTOR_BYTES, [_splat(F32X16, 0.0)] * len(cells)) as loop:
                left = [_load(builder, builder.add(row, loop.offset), vector) for row in x_rows]
                right = [_load(builder, builder.add(row, loop.offset), vector) for row in w_rows[:TILE_COLUMNS]]
                loop.new = [_dot(builder, old, left[m], right[n]) for old, (m, n) in zip(loop.old, cells, strict=True)]
                for row in w_rows[TILE_COLUMNS:]:  # rows are too short for the hardware's prefetcher
                    _prefetch(builder, builder.add(row, loop.offset))
            for m in range(rows):
                four = _sum_four(builder, *loop.new[m * TILE_COLUMNS : (m + 1) * TILE_COLUMNS])
                _store(builder, four, builder.add(out, builder.mul(out_bytes, _constant(m))))
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
            p_rows = [builder.add(p, builder.mul(p_bytes, _constant(m))) for m in range(rows)]
            out_rows = [builder.add(out, builder.mul(out_bytes, _constant(m))) for m in range(rows)]
            ends = [(row, builder.add(row, _constant(VECTOR_BYTES))) for row in out_rows]
            initial = [_load(builder, address, F32X16) for pair in ends for address in pair]
            if like != types.float32:
                initial = _pairwise(builder, initial, _deinterleave)
            with _loop(builder, count, 1, initial) as loop:
                at = builder.add(v, builder.mul(v_bytes, loop.offset))
                if like == types.float32:
                    halves = [_load(builder, builder.add(at, _constant(n)), F32X16) for n in (0, VECTOR_BYTES)]
                else:
                    halves = list(_halves(builder, _load(builder, at, I32X16)))
                loop.new = []
                for m, row in enumerate(p_rows):
                    weight = _load(builder, builder.add(row, builder.mul(loop.offset, _constant(4))), FLOAT)
                    wide = _broadcast(builder, weight)
                    loop.new += [_fma(builder, wide, halves[i], loop.old[2 * m + i]) for i in (0, 1)]
            final = loop.new if like == types.float32 else _pairwise(builder, loop.new, _interleave)
            for address, value in zip([a for pair in ends for a in pair], final, strict=True):
                _store(builder, value, address)
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 7), codegen

    return tile


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(F32X16, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return _shuffle(builder, first, undefined, [0] * 16)


def _pairwise(builder: Any, vectors: list[Any], change: Any) -> list[Any]:
    return [v for i in range(0, len(vectors), 2) for v in change(builder, vectors[i], vectors[i + 1])]


def _deinterleave(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """32 values in order → those at even and at odd places, as `_halves` splits bfloat16."""
    return _shuffle(builder, a, b, list(range(0, 32, 2))), _shuffle(builder, a, b, list(range(1, 32, 2)))


def _interleave(builder: Any, even: Any, odd: Any) -> tuple[Any, Any]:
    order = [lane for i in range(16) for lane in (i, 16 + i)]
    return _shuffle(builder, even, odd, order[:16]), _shuffle(builder, even, odd, order[16:])
