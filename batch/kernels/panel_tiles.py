"""Register tiles over weights packed in panels: 1 to 12 rows of x times 32 columns, as LLVM IR.

A panel holds 32 columns (out features) of a weight so that one vector is 16 columns at a pair of neighbouring k, which
is what VDPBF16PS multiplies with a pair of x broadcast to all lanes: no sums across lanes, and weights are read in one
stream. Layouts are in panels.py. Each cell is summed in an order that does not depend on the tile's number of rows.
"""

from __future__ import annotations

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batch.kernels.linears import PANEL_GROUP as GROUP
from batch.kernels.vector_ir import (
    BF16X32,
    F32X16,
    I32,
    I32X16,
    I64,
    VECTOR_BYTES,
    call_llvm,
    constant,
    dot,
    fma,
    halves,
    load,
    loop_over,
    prefetch,
    rounded,
    shuffle,
    splat,
    store,
)

MAX_ROWS = 12  # 24 sums, 2 weights and a broadcast in 32 registers
LINE_BYTES = 2 * VECTOR_BYTES  # one k-pair of a bfloat16 panel, eight k of an INT4 panel
INT8_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of k in a word of an INT4 panel: low nibbles of its bytes, then high ones
AHEAD_BYTES = 4096  # prefetch distance in the stream of weights
I16X16 = ir.VectorType(ir.IntType(16), 16)


def _splat_word(builder: Any, address: Any) -> Any:
    """The 32-bit word at an address in all 16 lanes."""
    undefined = ir.Constant(I32X16, ir.Undefined)
    first = builder.insert_element(undefined, load(builder, address, I32), ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(I32X16, [ir.Constant(I32, 0)] * 16))


def _float(value: float) -> Any:
    return splat(F32X16, value)


def _bf16(builder: Any, rounded: Any) -> Any:
    """16 bfloat16 as <16 x i16> from lanes that are rounded already."""
    return builder.trunc(builder.lshr(builder.bitcast(rounded, I32X16), splat(I32X16, 16)), I16X16)


def _exp(builder: Any, x: Any) -> Any:
    """simd.exp_f32 on 16 lanes."""
    whole = call_llvm(builder, "llvm.floor.v16f32", F32X16, fma(builder, x, _float(1.44269504), _float(0.5)))
    rest = fma(builder, whole, _float(-0.693359375), x)
    rest = fma(builder, whole, _float(2.12194440e-4), rest)
    poly = _float(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        poly = fma(builder, poly, rest, _float(factor))
    poly = builder.fadd(fma(builder, poly, builder.fmul(rest, rest), rest), _float(1.0))
    power = builder.shl(builder.add(builder.fptosi(whole, I32X16), splat(I32X16, 127)), splat(I32X16, 23))
    return builder.fmul(poly, builder.bitcast(power, F32X16))


def _silu(builder: Any, x: Any) -> Any:
    """simd.silu_f32 on 16 lanes."""
    negative = builder.fsub(_float(0.0), x)
    low = builder.select(builder.fcmp_ordered(">", negative, _float(-87.0)), negative, _float(-87.0))
    clamped = builder.select(builder.fcmp_ordered("<", low, _float(88.0)), low, _float(88.0))
    return builder.fdiv(x, builder.fadd(_exp(builder, clamped), _float(1.0)))


def _scaled_tile(builder: Any, sums: list[Any], x_scale: Any, scale: Any) -> list[Any]:
    """Row m times the m-th float32 at `x_scale`, columns times the 32 float32 at `scale`."""
    columns = [load(builder, builder.add(scale, constant(VECTOR_BYTES * n)), F32X16) for n in (0, 1)]
    scaled = []
    for i, value in enumerate(sums):
        row = builder.bitcast(_splat_word(builder, builder.add(x_scale, constant(4 * (i // 2)))), F32X16)
        scaled.append(builder.fmul(builder.fmul(value, row), columns[i % 2]))
    return scaled


def _store_tile(builder: Any, sums: list[Any], outs: Any, gated: Any) -> None:
    """Row m's sums are sums[2m] and sums[2m + 1]; its address is the m-th int64 at `outs`.

    They go there as 32 bfloat16; or, gated, as 16 of silu(first) · second, rounded where the reference rounds.
    """
    rows = [load(builder, builder.add(outs, constant(8 * m)), I64) for m in range(len(sums) // 2)]
    sums = [rounded(builder, value) for value in sums]
    with builder.if_else(builder.icmp_signed("!=", gated, constant(0))) as (then, otherwise):
        with then:
            for address, left, right in zip(rows, sums[::2], sums[1::2], strict=True):
                product = builder.fmul(rounded(builder, _silu(builder, left)), right)
                store(builder, _bf16(builder, rounded(builder, product)), address)
        with otherwise:
            for address, left, right in zip(rows, sums[::2], sums[1::2], strict=True):
                store(builder, _bf16(builder, left), address)
                store(builder, _bf16(builder, right), builder.add(address, constant(VECTOR_BYTES // 2)))


def _row_starts(builder: Any, x: Any, x_bytes: Any, rows: int) -> list[Any]:
    return [builder.add(x, builder.mul(x_bytes, constant(m))) for m in range(rows)]


def dense_tile(rows: int) -> Any:
    """An intrinsic tile(x, x_bytes, x_scale, w, scale, pairs, outs, gated, ahead, ahead_bytes): `rows` rows of x · a
    panel.

    x: bfloat16 rows x_bytes apart; w: the panel, `pairs` = K / 2 lines of 128 bytes; x_scale, scale: float32 factors
    of the result's rows and 32 columns; outs: address of the int64
    addresses that the rows go to, 32 bfloat16 each; or, with gated ≠ 0, 16 of silu(gate) · up. For each line of the
    panel, `ahead_bytes` from address `ahead` on are asked for.
    """

    @intrinsic
    def tile(
        typingctx: Any, x: Any, x_bytes: Any, x_scale: Any, w: Any, scale: Any, pairs: Any, outs: Any, gated: Any,
        ahead: Any, ahead_bytes: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_bytes, x_scale, w, scale, pairs, outs, gated, ahead, ahead_bytes = args
            starts = _row_starts(builder, x, x_bytes, rows)
            with loop_over(builder, builder.mul(pairs, constant(4)), 4, [_float(0.0)] * (2 * rows)) as loop:
                line = builder.add(w, builder.mul(loop.offset, constant(LINE_BYTES // 4)))
                weights = [load(builder, builder.add(line, constant(n)), I32X16) for n in (0, VECTOR_BYTES)]
                needed = builder.add(ahead, builder.mul(builder.lshr(loop.offset, constant(2)), ahead_bytes))
                for n in (0, VECTOR_BYTES):
                    prefetch(builder, builder.add(needed, constant(n)))
                loop.new = []
                for m, start in enumerate(starts):
                    pair = _splat_word(builder, builder.add(start, loop.offset))
                    loop.new += [dot(builder, loop.old[2 * m + n], pair, weights[n]) for n in (0, 1)]
            _store_tile(builder, _scaled_tile(builder, loop.new, x_scale, scale), outs, gated)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), codegen

    return tile


def int4_tile(rows: int) -> Any:
    """An intrinsic tile(x, x_bytes, w, scale, groups, sums, outs, gated): as `dense_tile` for an INT4 panel.

    w: `groups` = K / 128 times 16 lines; scale: bfloat16 [groups, 32]; sums: 128 · rows bytes of scratch.
    """

    @intrinsic
    def tile(
        typingctx: Any, x: Any, x_bytes: Any, w: Any, scale: Any, groups: Any, sums: Any, outs: Any, gated: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_bytes, w, scale, groups, sums, outs, gated = args
            starts = _row_starts(builder, x, x_bytes, rows)
            cells = [builder.add(sums, constant(VECTOR_BYTES * i)) for i in range(2 * rows)]
            for cell in cells:
                store(builder, _float(0.0), cell)
            with loop_over(builder, groups, 1, []) as group:
                first_k = builder.mul(group.offset, constant(2 * GROUP))  # in bytes of x
                lines = builder.add(w, builder.mul(group.offset, constant(GROUP // 8 * LINE_BYTES)))
                with loop_over(builder, constant(2 * GROUP), 16, [_float(0.0)] * (2 * rows)) as loop:
                    at = builder.add(first_k, loop.offset)
                    line = builder.add(lines, builder.mul(loop.offset, constant(LINE_BYTES // 16)))
                    loop.new = _int4_line(builder, loop.old, [builder.add(s, at) for s in starts], line)
                _add_scaled(builder, loop.new, cells, builder.add(scale, builder.mul(group.offset, constant(64))))
            _store_tile(builder, [load(builder, cell, F32X16) for cell in cells], outs, gated)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    return tile


def _int4_values(builder: Any, words: Any) -> list[Any]:
    """16 packed words → 4 vectors of 32 bfloat16 q - 8: nibbles i and i + 4 of each word, i = 0 … 3."""
    shorts = ir.VectorType(ir.IntType(16), 32)
    bits = [struct.unpack("<I", struct.pack("<f", q - 8))[0] >> 16 for q in range(16)]
    table = ir.Constant(shorts, [ir.Constant(shorts.element, b) for b in bits * 2])  # bit 4 of an index is ignored
    packed = builder.bitcast(words, shorts)
    shifted = [builder.lshr(packed, splat(shorts, 4 * i)) for i in range(4)]
    found = [call_llvm(builder, "llvm.x86.avx512.permvar.hi.512", shorts, table, index) for index in shifted]
    return [builder.bitcast(value, I32X16) for value in found]


def _int4_line(builder: Any, sums: list[Any], x_rows: list[Any], line: Any) -> list[Any]:
    """Eight k of an INT4 panel: word c, half h, nibble i is column c at k = 2i + h."""
    weights = []
    for n in (0, VECTOR_BYTES):
        weights.append(_int4_values(builder, load(builder, builder.add(line, constant(n)), I32X16)))
        prefetch(builder, builder.add(line, constant(AHEAD_BYTES + n)))
    for i in range(4):
        new = []
        for m, row in enumerate(x_rows):
            pair = _splat_word(builder, builder.add(row, constant(4 * i)))
            new += [dot(builder, sums[2 * m + n], pair, weights[n][i]) for n in (0, 1)]
        sums = new
    return sums


def _scales(builder: Any, address: Any) -> list[Any]:
    """32 bfloat16 scales as two <16 x f32>."""
    found = []
    for n in (0, 1):
        bits = builder.zext(load(builder, builder.add(address, constant(32 * n)), I16X16), I32X16)
        found.append(builder.bitcast(builder.shl(bits, splat(I32X16, 16)), F32X16))
    return found


def _add_scaled(builder: Any, group_sums: list[Any], cells: list[Any], scale: Any) -> None:
    """cells += group_sums · scale: the group's part of the product."""
    factors = _scales(builder, scale)
    for i, (value, cell) in enumerate(zip(group_sums, cells, strict=True)):
        store(builder, fma(builder, value, factors[i % 2], load(builder, cell, F32X16)), cell)


def int8_tile(rows: int) -> Any:
    """An intrinsic tile(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated): `int4_tile` for int8 x.

    x: int8 rows, each eight k in the order `INT8_ORDER`; x_scale float32 and x_base int32, `groups` a row: what the
    row's integers stand for, and -8 times their sum, since the weights are multiplied as q + 8. Needs AVX512-VNNI.
    """

    @intrinsic
    def tile(
        typingctx: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any, groups: Any, sums: Any,
        outs: Any, gated: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated = args
            starts = _row_starts(builder, x, x_bytes, rows)
            cells = [builder.add(sums, constant(VECTOR_BYTES * i)) for i in range(2 * rows)]
            for cell in cells:
                store(builder, _float(0.0), cell)
            with loop_over(builder, groups, 1, []) as group:
                word = builder.mul(group.offset, constant(4))
                at = [builder.add(word, builder.mul(groups, constant(4 * m))) for m in range(rows)]
                bases = [_splat_word(builder, builder.add(x_base, offset)) for offset in at]
                factors = [_splat_word(builder, builder.add(x_scale, offset)) for offset in at]
                first_k = builder.mul(group.offset, constant(GROUP))
                lines = builder.add(w, builder.mul(first_k, constant(LINE_BYTES // 8)))
                with loop_over(builder, constant(GROUP), 8, [base for base in bases for _ in (0, 1)]) as loop:
                    at_k = builder.add(first_k, loop.offset)
                    line = builder.add(lines, builder.mul(loop.offset, constant(LINE_BYTES // 8)))
                    loop.new = _int8_line(builder, loop.old, [builder.add(s, at_k) for s in starts], line)
                parts = []
                for m in range(rows):
                    wide = [builder.sitofp(value, F32X16) for value in loop.new[2 * m : 2 * m + 2]]
                    parts += [builder.fmul(value, builder.bitcast(factors[m], F32X16)) for value in wide]
                _add_scaled(builder, parts, cells, builder.add(scale, builder.mul(group.offset, constant(64))))
            _store_tile(builder, [load(builder, cell, F32X16) for cell in cells], outs, gated)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), codegen

    return tile


def _int8_line(builder: Any, sums: list[Any], x_rows: list[Any], line: Any) -> list[Any]:
    """Eight k of an INT4 panel times int8: the low nibbles of a word's four bytes, then the high ones."""
    weights = []
    for n in (0, VECTOR_BYTES):
        words = load(builder, builder.add(line, constant(n)), I32X16)
        prefetch(builder, builder.add(line, constant(AHEAD_BYTES + n)))
        weights.append([builder.and_(builder.lshr(words, splat(I32X16, s)), splat(I32X16, 0x0F0F0F0F)) for s in (0, 4)])
    for i in (0, 1):
        new = []
        for m, row in enumerate(x_rows):
            four = _splat_word(builder, builder.add(row, constant(4 * i)))
            for n in (0, 1):
                new.append(_dot_bytes(builder, sums[2 * m + n], weights[n][i], four))
        sums = new
    return sums


def _dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total <16 x i32> += products of the four bytes of each word."""
    return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, total, unsigned, signed)


@intrinsic
def expand_int4(typingctx: Any, w: Any, scale: Any, groups: Any, out: Any) -> Any:
    """An INT4 panel (`groups` = K / 128) as a bfloat16 panel at `out`: q · scale, rounded as the reference does."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, scale, groups, out = args
        with loop_over(builder, groups, 1, []) as group:
            factors = _scales(builder, builder.add(scale, builder.mul(group.offset, constant(64))))
            first = builder.mul(group.offset, constant(GROUP // 8))
            with loop_over(builder, constant(GROUP // 8), 1, []) as loop:
                line = builder.add(first, loop.offset)
                source = builder.add(w, builder.mul(line, constant(LINE_BYTES)))
                target = builder.add(out, builder.mul(line, constant(4 * LINE_BYTES)))
                for n in (0, 1):
                    words = load(builder, builder.add(source, constant(VECTOR_BYTES * n)), I32X16)
                    prefetch(builder, builder.add(source, constant(AHEAD_BYTES + VECTOR_BYTES * n)))
                    for i, value in enumerate(_int4_values(builder, words)):
                        pairs = _scaled_pairs(builder, value, factors[n])
                        store(builder, pairs, builder.add(target, constant(LINE_BYTES * i + VECTOR_BYTES * n)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def expand_fp8(typingctx: Any, w: Any, lines: Any, out: Any) -> Any:
    """An FP8 panel (`lines` = K / 4) as a bfloat16 panel at `out`: the e4m3 values, exactly, without scales."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, lines, out = args
        with loop_over(builder, lines, 1, []) as loop:
            source = builder.add(w, builder.mul(loop.offset, constant(LINE_BYTES)))
            target = builder.add(out, builder.mul(loop.offset, constant(2 * LINE_BYTES)))
            for n in (0, VECTOR_BYTES):
                words = load(builder, builder.add(source, constant(n)), I32X16)
                prefetch(builder, builder.add(source, constant(AHEAD_BYTES + n)))
                values = [_e4m3(builder, words, byte) for byte in range(4)]
                for i in (0, 1):
                    low = builder.lshr(values[2 * i], splat(I32X16, 16))
                    address = builder.add(target, constant(LINE_BYTES * i + n))
                    store(builder, builder.or_(low, values[2 * i + 1]), address)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


def _e4m3(builder: Any, words: Any, byte: int) -> Any:
    """One byte of each word, float8_e4m3fn, as the bits of the float32 of that value.

    Its exponent and mantissa are moved into a float32's place, which reads as the value times 2⁻¹²⁰, subnormals too.
    """
    top = builder.shl(words, splat(I32X16, 24 - 8 * byte))
    bits = builder.lshr(builder.and_(top, splat(I32X16, 0x7F000000)), splat(I32X16, 4))
    nan = builder.icmp_unsigned("==", bits, splat(I32X16, 0x07F00000))
    value = builder.bitcast(builder.fmul(builder.bitcast(bits, F32X16), _float(2.0**120)), I32X16)
    value = builder.select(nan, splat(I32X16, 0x7FC00000), value)
    return builder.or_(value, builder.and_(top, splat(I32X16, 0x80000000)))


def _scaled_pairs(builder: Any, pairs: Any, factor: Any) -> Any:
    """16 words of two bfloat16 each times a <16 x f32>, rounded to bfloat16 again."""
    low, high = (builder.fmul(half, factor) for half in halves(builder, pairs))
    # VCVTNE2PS2BF16 puts the second argument's lanes first.
    both = call_llvm(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, high, low)
    both = builder.bitcast(both, ir.VectorType(ir.IntType(16), 32))
    return builder.bitcast(shuffle(builder, both, both, [n for i in range(16) for n in (i, 16 + i)]), I32X16)


@intrinsic
def call_tile(
    typingctx: Any, address: Any, rows: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any,
    size: Any, sums: Any, outs: Any, gated: Any, ahead: Any, ahead_bytes: Any,
) -> Any:  # fmt: skip
    """Call the machine code at `address`, which takes the other thirteen integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64] * (len(args) - 1))
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 14), codegen
