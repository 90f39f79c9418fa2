"""Loops over one row of bfloat16 in 512-bit vectors, as LLVM IR: norms and rotation. Sizes are multiples of 32.

Rounding points are those of the reference; only the order of a sum of squares is these loops' own.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batch.kernels.vector_ir import (
    F32X16,
    FLOAT,
    I32X16,
    broadcast,
    call_llvm,
    constant,
    fma,
    halves,
    load,
    loop_over,
    rounded,
    splat,
    store,
    sum_lanes,
)

WORD_BYTES = 64  # 16 words of two bfloat16


def _pack(builder: Any, even: Any, odd: Any) -> Any:
    """Two <16 x f32> that are rounded already → 16 words of two bfloat16."""
    return builder.or_(builder.lshr(builder.bitcast(even, I32X16), splat(I32X16, 16)), builder.bitcast(odd, I32X16))


def _rounded_both(builder: Any, values: Any) -> list[Any]:
    return [rounded(builder, value) for value in values]


def _pairs_at(builder: Any, address: Any) -> list[Any]:
    """16 words of two bfloat16 as their even and odd ones, <16 x f32> each."""
    return list(halves(builder, load(builder, address, I32X16)))


def _inverse_root(builder: Any, squares: list[Any], count: Any, eps: Any) -> Any:
    """1 / √(Σ squares / count + eps) in every lane."""
    mean = builder.fdiv(sum_lanes(builder, builder.fadd(*squares)), builder.sitofp(count, FLOAT))
    root = call_llvm(builder, "llvm.sqrt.f32", FLOAT, builder.fadd(mean, eps))
    return broadcast(builder, builder.fdiv(ir.Constant(FLOAT, 1.0), root))


def add_norm_row(deltas: int) -> Any:
    """An intrinsic row(x, first, second, weight, out, size, eps): x += the sum of 0 to 2 rows, rounded as it is stored;
    out = rms_norm(x) · weight. Addresses of `size` bfloat16; eps float32."""

    @intrinsic
    def row(typingctx: Any, x: Any, first: Any, second: Any, weight: Any, out: Any, size: Any, eps: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, first, second, weight, out, size, eps = args
            num_bytes = builder.mul(size, constant(2))
            zero = splat(F32X16, 0.0)
            with loop_over(builder, num_bytes, WORD_BYTES, [zero, zero]) as loop:
                at = builder.add(x, loop.offset)
                values = _pairs_at(builder, at)
                if deltas:
                    added = _pairs_at(builder, builder.add(first, loop.offset))
                    if deltas == 2:
                        more = _pairs_at(builder, builder.add(second, loop.offset))
                        added = [rounded(builder, builder.fadd(a, b)) for a, b in zip(added, more, strict=True)]
                    values = [rounded(builder, builder.fadd(a, b)) for a, b in zip(values, added, strict=True)]
                    store(builder, _pack(builder, *values), at)
                loop.new = [fma(builder, v, v, old) for v, old in zip(values, loop.old, strict=True)]
            factor = _inverse_root(builder, loop.new, size, eps)
            with loop_over(builder, num_bytes, WORD_BYTES, []) as loop:
                values = _pairs_at(builder, builder.add(x, loop.offset))
                normal = _rounded_both(builder, [builder.fmul(value, factor) for value in values])
                weights = _pairs_at(builder, builder.add(weight, loop.offset))
                scaled = [builder.fmul(a, b) for a, b in zip(normal, weights, strict=True)]
                store(builder, _pack(builder, *_rounded_both(builder, scaled)), builder.add(out, loop.offset))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6, types.float32), codegen

    return row


def turn_head(norm: bool) -> Any:
    """An intrinsic head(source, cos, sin, scratch, out, size, eps): rope on one head of `size` bfloat16, and with
    `norm` the weightless RMS norm after it. cos, sin: float32 [size / 2]; scratch: 4 · size bytes."""

    @intrinsic
    def head(typingctx: Any, source: Any, cos: Any, sin: Any, scratch: Any, out: Any, size: Any, eps: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, cos, sin, scratch, out, size, eps = args
            num_bytes = builder.mul(size, constant(2))
            zero = splat(F32X16, 0.0)
            with loop_over(builder, num_bytes, WORD_BYTES, [zero, zero]) as loop:
                even, odd = _pairs_at(builder, builder.add(source, loop.offset))
                c = load(builder, builder.add(cos, loop.offset), F32X16)
                s = load(builder, builder.add(sin, loop.offset), F32X16)
                turned = [
                    builder.fsub(builder.fmul(even, c), builder.fmul(odd, s)),
                    builder.fadd(builder.fmul(even, s), builder.fmul(odd, c)),
                ]
                turned = _rounded_both(builder, turned)
                if norm:
                    place = builder.add(scratch, builder.mul(loop.offset, constant(2)))
                    store(builder, turned[0], place)
                    store(builder, turned[1], builder.add(place, constant(WORD_BYTES)))
                    loop.new = [fma(builder, v, v, old) for v, old in zip(turned, loop.old, strict=True)]
                else:
                    store(builder, _pack(builder, *turned), builder.add(out, loop.offset))
            if norm:
                factor = _inverse_root(builder, loop.new, size, eps)
                with loop_over(builder, num_bytes, WORD_BYTES, []) as loop:
                    place = builder.add(scratch, builder.mul(loop.offset, constant(2)))
                    values = [load(builder, builder.add(place, constant(n)), F32X16) for n in (0, WORD_BYTES)]
                    scaled = _rounded_both(builder, [builder.fmul(value, factor) for value in values])
                    store(builder, _pack(builder, *scaled), builder.add(out, loop.offset))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6, types.float32), codegen

    return head


@intrinsic
def scale_row(typingctx: Any, source: Any, factor: Any, out: Any, size: Any) -> Any:
    """out = source · factor on `size` bfloat16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, factor, out, size = args
        wide = broadcast(builder, factor)
        with loop_over(builder, builder.mul(size, constant(2)), WORD_BYTES, []) as loop:
            values = _pairs_at(builder, builder.add(source, loop.offset))
            scaled = _rounded_both(builder, [builder.fmul(value, wide) for value in values])
            store(builder, _pack(builder, *scaled), builder.add(out, loop.offset))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp), codegen
