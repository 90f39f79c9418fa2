"""Words of LLVM IR that the register tiles are written in: 512-bit vectors, their arithmetic, loops.

Every function emits code at a builder's place and returns the value; addresses are 64-bit integers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

FLOAT, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
F32X16, I32X16 = ir.VectorType(FLOAT, 16), ir.VectorType(I32, 16)
VECTOR_BYTES = 64


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


def constant(value: int) -> Any:
    """An int64."""
    return ir.Constant(I64, value)


def splat(vector: Any, value: Any) -> Any:
    """`value` in every lane of a vector type."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * vector.count)


def call_llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call one of LLVM's own functions; `result` is the type of what it returns."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def load(builder: Any, address: Any, vector: Any) -> Any:
    """A value of type `vector` from any address."""
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    """To any address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at any address, valid or not."""
    pointer = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 3, 1)))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c on <16 x f32>."""
    return call_llvm(builder, "llvm.fma.v16f32", F32X16, a, b, c)


def halves(builder: Any, words: Any) -> tuple[Any, Any]:
    """Sixteen 32-bit words, each two bfloat16 → their low and high halves as <16 x f32>."""
    low = builder.shl(words, splat(I32X16, 16))
    high = builder.and_(words, splat(I32X16, 0xFFFF0000))
    return builder.bitcast(low, F32X16), builder.bitcast(high, F32X16)


def dot(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """total <16 x f32> += products of two vectors: 16 float32, or 32 bfloat16 as 16 words added in pairs."""
    if left.type == F32X16:
        return fma(builder, left, right, total)
    if has_avx512_bf16():
        a, b = builder.bitcast(left, BF16X32), builder.bitcast(right, BF16X32)
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X16, total, a, b)
    for a, b in zip(halves(builder, left), halves(builder, right), strict=True):
        total = fma(builder, a, b, total)
    return total


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """A vector of lanes of a, and after them of b."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


def add_shuffled(builder: Any, a: Any, b: Any, first: tuple[int, ...], second: tuple[int, ...]) -> Any:
    """Add two picks of 4 out of each 128-bit lane's 8 values (0..3 of a, 4..7 of b)."""
    picks = [[4 * q + (i if i < 4 else i + 12) for q in range(4) for i in pick] for pick in (first, second)]
    return builder.fadd(shuffle(builder, a, b, picks[0]), shuffle(builder, a, b, picks[1]))


def sum_four(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four <16 x f32> → the <4 x f32> of their sums."""
    ab = add_shuffled(builder, a, b, (0, 1, 4, 5), (2, 3, 6, 7))
    cd = add_shuffled(builder, c, d, (0, 1, 4, 5), (2, 3, 6, 7))
    lanes = add_shuffled(builder, ab, cd, (0, 2, 4, 6), (1, 3, 5, 7))  # a, b, c, d in each 128-bit lane
    quarters = [shuffle(builder, lanes, lanes, list(range(4 * q, 4 * q + 4))) for q in range(4)]
    return builder.fadd(builder.fadd(quarters[0], quarters[1]), builder.fadd(quarters[2], quarters[3]))


def rounded(builder: Any, x: Any) -> Any:
    """float32 lanes rounded to the nearest even bfloat16, as float32."""
    bits = builder.bitcast(x, I32X16)
    odd = builder.and_(builder.lshr(bits, splat(I32X16, 16)), splat(I32X16, 1))
    bits = builder.add(builder.add(bits, splat(I32X16, 0x7FFF)), odd)
    return builder.bitcast(builder.and_(bits, splat(I32X16, 0xFFFF0000)), F32X16)


def sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a <16 x f32>, in halves."""
    lanes = list(range(16))
    for width in (8, 4, 2, 1):
        vector = builder.fadd(
            shuffle(builder, vector, vector, lanes[:width]), shuffle(builder, vector, vector, lanes[width : 2 * width])
        )
    return builder.extract_element(vector, ir.Constant(I32, 0))


class Loop:
    """A loop's running offset and the values carried from one round to the next."""

    def __init__(self, offset: Any, old: list[Any]) -> None:
        self.offset, self.old = offset, old
        self.new: list[Any] = old


@contextlib.contextmanager
def loop_over(builder: Any, size: Any, step: int, initial: list[Any]) -> Iterator[Loop]:
    """Emit a loop over offset = 0, step, … < size (at least one round); the body sets `new`, which outlives it."""
    before = builder.block
    body, after = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    offset = builder.phi(I64)
    loop = Loop(offset, [builder.phi(value.type) for value in initial])
    yield loop
    following = builder.add(offset, constant(step))
    offset.add_incoming(constant(0), before)
    offset.add_incoming(following, builder.block)
    for phi, first, value in zip(loop.old, initial, loop.new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, size), body, after)
    builder.position_at_end(after)


def broadcast(builder: Any, value: Any) -> Any:
    """A float32 in every lane of a <16 x f32>."""
    undefined = ir.Constant(F32X16, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return shuffle(builder, first, undefined, [0] * 16)
