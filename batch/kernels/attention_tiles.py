"""Attention over packed keys and values (`paging.LayerCache`) as LLVM IR: products in registers, softmax in vectors.

Both products multiply pairs of bfloat16, broadcast from rows of queries or weights, with vectors of pairs from the
cache: no sums across lanes, no gathers. As in tiles.py, a row's result never depends on its neighbours.
Needs AVX512-BF16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batch.kernels.vector_ir import (
    BF16X32,
    F32X16,
    FLOAT,
    I32,
    I32X16,
    I64,
    VECTOR_BYTES,
    broadcast,
    call_llvm,
    constant,
    dot,
    fma,
    load,
    loop_over,
    shuffle,
    splat,
    store,
)

KEYS = 128  # keys per softmax tile
MAX_TILE_ROWS = 6  # times 4 vectors: 24 sums in registers
LANES = 16
LOWEST = -3.0e38
# 2^x for |x| ≤ 1/2, relative error below 3e-6: the minimax polynomial of degree 4, highest term first
_EXP2 = (0.009582853, 0.055906426, 0.24024099, 0.69312418, 1.0)


def _rows(builder: Any, address: Any, row_bytes: Any, count: int) -> list[Any]:
    return [builder.add(address, builder.mul(row_bytes, constant(m))) for m in range(count)]


def _pair(builder: Any, address: Any) -> Any:
    """The two bfloat16 at an address in every 32-bit lane."""
    word = load(builder, address, FLOAT)
    return builder.bitcast(broadcast(builder, word), I32X16)


def _ask_for(builder: Any, address: Any) -> None:
    """Ask for the cache line at any address, valid or not, into L2."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 2, 1)))


def _by_rows(builder: Any, rows: Any, emit: Callable[[int], None]) -> None:
    """emit(1) … emit(MAX_TILE_ROWS), of which the one for `rows` (int64) runs."""
    cases = [builder.append_basic_block(f"rows_{count}") for count in range(1, MAX_TILE_ROWS + 1)]
    done = builder.append_basic_block("rows_done")
    switch = builder.switch(rows, cases[-1])
    for count, block in enumerate(cases, 1):
        if count < MAX_TILE_ROWS:
            switch.add_case(constant(count), block)
        builder.position_at_end(block)
        emit(count)
        builder.branch(done)
    builder.position_at_end(done)


def _multiply(builder: Any, old: list[Any], rows: list[Any], at: Any, right: list[Any]) -> list[Any]:
    """Sums of rows · vectors, row by row, each with the products of the pair at rows[m] + at and `right` added."""
    new = []
    for m, row in enumerate(rows):
        left = _pair(builder, builder.add(row, at))
        new += [dot(builder, old[m * len(right) + n], left, vector) for n, vector in enumerate(right)]
    return new


def _vectors(builder: Any, address: Any, count: int) -> list[Any]:
    return [builder.add(address, constant(VECTOR_BYTES * n)) for n in range(count)]


def score_tile(vectors: int) -> Any:
    """An intrinsic tile(rows, q, at, pair_bytes, size, ahead, out): 1 to 6 `rows` of q · 16 `vectors` keys.

    q: bfloat16 rows of `size` bytes. at: address of int64 addresses, one per 16 keys, of their first pair of dims; the
    next pair lies pair_bytes further. Row m's float32 products go to out + m · 4 KEYS. What lies `ahead` bytes behind
    each vector is asked for: it will be needed soon.
    """

    @intrinsic
    def tile(typingctx: Any, rows: Any, q: Any, at: Any, pair_bytes: Any, size: Any, ahead: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, q, at, pair_bytes, size, ahead, out = args
            keys = [load(builder, builder.add(at, constant(8 * n)), I64) for n in range(vectors)]

            def emit(count: int) -> None:
                q_rows = _rows(builder, q, size, count)
                initial = [constant(0)] + [splat(F32X16, 0.0)] * (count * vectors)
                with loop_over(builder, size, 4, initial) as loop:
                    place, *old = loop.old
                    places = [builder.add(key, place) for key in keys]
                    right = [load(builder, address, I32X16) for address in places]
                    for address in places:
                        _ask_for(builder, builder.add(address, ahead))
                    new = _multiply(builder, old, q_rows, loop.offset, right)
                    loop.new = [builder.add(place, pair_bytes), *new]
                targets = _rows(builder, out, constant(4 * KEYS), count)
                cells = [cell for target in targets for cell in _vectors(builder, target, vectors)]
                for cell, value in zip(cells, loop.new[1:], strict=True):
                    store(builder, value, cell)

            _by_rows(builder, rows, emit)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def value_tile(vectors: int) -> Any:
    """An intrinsic tile(rows, p, at, pairs, runs, pair_bytes, skip, ahead, shrink, out): weights · values.

    out[m] = out[m] · shrink[m] + Σ p[m] · v for 1 to 6 `rows` and 16 `vectors` dims. p: bfloat16 rows [KEYS]; the
    values of its pairs of keys lie in `runs` ≥ 1 runs: at[r] is the address of the first of pairs[r] ≥ 1 pairs of run
    r, pair_bytes apart. out: float32 rows, pair_bytes apart as well. In both the dims begin `skip` bytes into the row.
    What lies ahead[r] bytes behind each vector of run r is asked for.
    """

    @intrinsic
    def tile(
        typingctx: Any, rows: Any, p: Any, at: Any, pairs: Any, runs: Any, pair_bytes: Any, skip: Any, ahead: Any,
        shrink: Any, out: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows, p, at, pairs, runs, pair_bytes, skip, ahead, shrink, out = args
            out = builder.add(out, skip)

            def emit(count: int) -> None:
                p_rows = _rows(builder, p, constant(2 * KEYS), count)
                cells = [c for row in _rows(builder, out, pair_bytes, count) for c in _vectors(builder, row, vectors)]
                factors = [load(builder, at, FLOAT) for at in _rows(builder, shrink, constant(4), count)]
                wide = [broadcast(builder, factor) for factor in factors for _ in range(vectors)]
                sums = [builder.fmul(load(builder, c, F32X16), f) for c, f in zip(cells, wide, strict=True)]
                with loop_over(builder, builder.mul(runs, constant(8)), 8, [constant(0), *sums]) as run:
                    done, *old = run.old
                    begin = builder.add(load(builder, builder.add(at, run.offset), I64), skip)
                    further = load(builder, builder.add(ahead, run.offset), I64)
                    size = builder.mul(load(builder, builder.add(pairs, run.offset), I64), constant(4))
                    with loop_over(builder, size, 4, [begin, *old]) as loop:
                        place, *old = loop.old
                        places = _vectors(builder, place, vectors)
                        right = [load(builder, address, I32X16) for address in places]
                        for address in places:
                            _ask_for(builder, builder.add(address, further))
                        new = _multiply(builder, old, p_rows, builder.add(done, loop.offset), right)
                        loop.new = [builder.add(place, pair_bytes), *new]
                    run.new = [builder.add(done, size), *loop.new[1:]]
                for cell, value in zip(cells, run.new[1:], strict=True):
                    store(builder, value, cell)

            _by_rows(builder, rows, emit)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


def _exp2(builder: Any, x: Any) -> Any:
    """2^x of <16 x f32> x; 0 far below."""
    whole = call_llvm(builder, "llvm.rint.v16f32", F32X16, x)
    rest = builder.fsub(x, whole)
    poly = splat(F32X16, _EXP2[0])
    for coefficient in _EXP2[1:]:
        poly = fma(builder, poly, rest, splat(F32X16, coefficient))
    mask, rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(I32, 4)
    return call_llvm(builder, "llvm.x86.avx512.mask.scalef.ps.512", F32X16, poly, whole, poly, mask, rounding)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _largest_lane(builder: Any, x: Any) -> Any:
    """The largest of 16 lanes, in all of them."""
    for step in (8, 4, 2, 1):
        x = _larger(builder, x, shuffle(builder, x, x, [lane ^ step for lane in range(LANES)]))
    return x


def _tree(builder: Any, combine: Any, values: list[Any]) -> Any:
    while len(values) > 1:
        values = [combine(builder, a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _store_weights(builder: Any, low: Any, high: Any, address: Any) -> None:
    """32 weights, rounded to bfloat16, in order."""
    store(builder, call_llvm(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, high, low), address)


class _State:
    """A row's softmax so far: its largest score `best`, and the sums [16] of its weights."""

    def __init__(self, builder: Any, best: Any, sums: Any, shrink: Any, factor: Any) -> None:
        self.builder, self.best, self.sums, self.shrink = builder, best, sums, shrink
        self.factor = broadcast(builder, factor)
        self.old = broadcast(builder, load(builder, best, FLOAT))

    def begin(self, largest: Any) -> Any:
        """Takes the tile's scores' lane-wise maxima; returns what to subtract from each score · factor."""
        builder = self.builder
        high = _larger(builder, _largest_lane(builder, largest), self.old)
        self.scale = _exp2(builder, builder.fmul(builder.fsub(self.old, high), self.factor))
        for address, vector in ((self.best, high), (self.shrink, self.scale)):
            store(builder, builder.extract_element(vector, ir.Constant(I32, 0)), address)
        return builder.fsub(splat(F32X16, -0.0), builder.fmul(high, self.factor))

    def end(self, added: Any) -> None:
        total = fma(self.builder, load(self.builder, self.sums, F32X16), self.scale, added)
        store(self.builder, total, self.sums)


def softmax_full() -> Any:
    """An intrinsic tile(scores, weights, best, sums, shrink, factor): one row of KEYS scores, all of them visible.

    Addresses of float32 scores [KEYS], bfloat16 weights [KEYS] = 2^(factor · (score - best)) (written), float32 best
    (updated), sums [16] (added to) and shrink (written): what earlier weights have to be multiplied by.
    """

    @intrinsic
    def tile(typingctx: Any, scores: Any, weights: Any, best: Any, sums: Any, shrink: Any, factor: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scores, weights, *state_args = args
            state = _State(builder, *state_args)
            places = range(0, 4 * KEYS, VECTOR_BYTES)
            values = [load(builder, builder.add(scores, constant(at)), F32X16) for at in places]
            minus = state.begin(_tree(builder, _larger, values))
            values = [_exp2(builder, fma(builder, value, state.factor, minus)) for value in values]
            for i in range(0, len(values), 2):
                address = builder.add(weights, constant(VECTOR_BYTES // 2 * i))
                _store_weights(builder, values[i], values[i + 1], address)
            state.end(_tree(builder, lambda b, x, y: b.fadd(x, y), values))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32), codegen

    return tile


def softmax_part() -> Any:
    """An intrinsic tile(scores, weights, best, sums, shrink, factor, visible, size): as `softmax_full` for the first
    `visible` scores; weights up to size / 4 ≥ visible (size in bytes of scores, a multiple of 128) become 0."""

    @intrinsic
    def tile(
        typingctx: Any, scores: Any, weights: Any, best: Any, sums: Any, shrink: Any, factor: Any, visible: Any,
        size: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            scores, weights, *state_args, visible, size = args
            state = _State(builder, *state_args)
            limit = builder.trunc(visible, I32)
            lowest, zero = splat(F32X16, LOWEST), splat(F32X16, 0.0)

            def masked(offset: Any, half: int) -> tuple[Any, Any]:
                first = builder.trunc(builder.lshr(offset, constant(2)), I32)
                lanes = ir.Constant(I32X16, [ir.Constant(I32, half * LANES + lane) for lane in range(LANES)])
                mask = builder.icmp_signed("<", lanes, _lanes(builder, builder.sub(limit, first)))
                address = builder.add(scores, builder.add(offset, constant(half * VECTOR_BYTES)))
                return load(builder, address, F32X16), mask

            with loop_over(builder, size, 2 * VECTOR_BYTES, [lowest, lowest]) as loop:
                loop.new = []
                for half in (0, 1):
                    value, mask = masked(loop.offset, half)
                    loop.new.append(_larger(builder, builder.select(mask, value, lowest), loop.old[half]))
            minus = state.begin(_larger(builder, loop.new[0], loop.new[1]))
            with loop_over(builder, size, 2 * VECTOR_BYTES, [zero]) as loop:
                pair = []
                for half in (0, 1):
                    value, mask = masked(loop.offset, half)
                    weight = _exp2(builder, fma(builder, value, state.factor, minus))
                    pair.append(builder.select(mask, weight, zero))
                address = builder.add(weights, builder.lshr(loop.offset, constant(1)))
                _store_weights(builder, pair[0], pair[1], address)
                loop.new = [builder.fadd(loop.old[0], builder.fadd(pair[0], pair[1]))]
            state.end(loop.new[0])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, types.float32, *[types.int64] * 2), codegen

    return tile


def _lanes(builder: Any, word: Any) -> Any:
    undefined = ir.Constant(I32X16, ir.Undefined)
    first = builder.insert_element(undefined, word, ir.Constant(I32, 0))
    return shuffle(builder, first, undefined, [0] * LANES)
