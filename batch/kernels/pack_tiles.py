"""Register tiles that bring weights into the order of panels, as LLVM IR.

Targets are whole cache lines, 64-byte aligned, and written past the cache: nobody reads them soon.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from batch.kernels.vector_ir import I32, I32X16, VECTOR_BYTES, constant, load, shuffle, splat

SIDE = 16  # words
_I16X16 = ir.VectorType(ir.IntType(16), SIDE)


def _store_line(builder: Any, value: Any, address: Any) -> None:
    store = builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=VECTOR_BYTES)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 words, turned: swaps of ever larger blocks beside the diagonal."""
    for step in (1, 2, 4, 8):
        upper = [lane if not lane & step else SIDE + lane - step for lane in range(SIDE)]
        lower = [lane + step if not lane & step else SIDE + lane for lane in range(SIDE)]
        new = list(rows)
        for i in range(SIDE):
            if not i & step:
                new[i] = shuffle(builder, rows[i], rows[i + step], upper)
                new[i + step] = shuffle(builder, rows[i], rows[i + step], lower)
        rows = new
    return rows


def _reorder_nibbles(builder: Any, words: Any) -> Any:
    """Nibble 2i + h of each word goes to 4h + i."""
    halves = []
    for shift in (0, 4):
        part = builder.and_(builder.lshr(words, splat(I32X16, shift)), splat(I32X16, 0x0F0F0F0F))
        for bits, mask in ((4, 0x00FF00FF), (8, 0x0000FFFF)):
            part = builder.and_(builder.or_(part, builder.lshr(part, splat(I32X16, bits))), splat(I32X16, mask))
        halves.append(part)
    return builder.or_(halves[0], builder.shl(halves[1], splat(I32X16, 16)))


def turn_tile(int4: bool) -> Any:
    """An intrinsic tile(source, source_bytes, target, target_bytes): 16 words of 16 rows → 16 lines, word by word.

    int4: the words are eight INT4 weights each, and their nibbles are put into the order of an INT4 panel.
    """

    @intrinsic
    def tile(typingctx: Any, source: Any, source_bytes: Any, target: Any, target_bytes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, source_bytes, target, target_bytes = args
            rows = [
                load(builder, builder.add(source, builder.mul(source_bytes, constant(i))), I32X16) for i in range(SIDE)
            ]
            for i, line in enumerate(_transpose(builder, rows)):
                value = _reorder_nibbles(builder, line) if int4 else line
                _store_line(builder, value, builder.add(target, builder.mul(target_bytes, constant(i))))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return tile


@intrinsic
def pair_tile(typingctx: Any, low: Any, high: Any, target: Any) -> Any:
    """16 bfloat16 at `low` and 16 at `high`, in pairs: one line."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low, high, target = args
        left, right = (builder.zext(load(builder, address, _I16X16), I32X16) for address in (low, high))
        _store_line(builder, builder.or_(left, builder.shl(right, splat(I32X16, 16))), target)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen
