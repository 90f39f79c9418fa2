"""What numba lacks for the CPU kernels: raw addresses, an atomic counter, bfloat16 and register tiles.

Everything is an intrinsic that expands to LLVM IR inside the kernel that uses it. Elements are float32 or bfloat16,
whose bits numba holds as uint16; a parameter `like` (a value of either type) tells an intrinsic which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from l4tool.core.jit import kernel_jit

jit = kernel_jit(Path(__file__).parent)
FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


@intrinsic
def take_item(typingctx: Any, job: Any) -> Any:
    """Atomically increment the int64 at address `job` and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.intp), codegen


@intrinsic
def elements_at(typingctx: Any, address: Any, like: Any) -> Any:
    """A pointer, indexable like an array without bounds, to elements of like's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), codegen


@intrinsic
def size_of(typingctx: Any, like: Any) -> Any:
    """Bytes of one element of like's type."""
    nbytes = like.bitwidth // 8
    return types.int64(like), lambda context, builder, signature, args: ir.Constant(I64, nbytes)


@intrinsic
def bits_to_float(typingctx: Any, bits: Any) -> Any:
    """The float32 with these int32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], FLOAT)


@intrinsic
def widen(typingctx: Any, value: Any) -> Any:
    """float32 from a float32, or from the bits of a bfloat16 (uint16)."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], I32), ir.Constant(I32, 16))
        return builder.bitcast(wide, FLOAT)

    return types.float32(types.uint16), codegen


@intrinsic
def narrow(typingctx: Any, value: Any, like: Any) -> Any:
    """A float32 in the element type of `like`: unchanged, or rounded to the nearest even bfloat16 (NaN not kept)."""
    if like == types.float32:
        return types.float32(types.float32, like), lambda context, builder, signature, args: args[0]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(I32, 16)), I16)

    return types.uint16(types.float32, types.uint16), codegen


@jit
def exp_f32(x: Any) -> Any:
    """float32 e^x for x in [-87, 88], relative error under 2e-7 (Cephes' polynomial), in operations that vectorise."""
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    poly = np.float32(1.9875691500e-4)
    poly = poly * rest + np.float32(1.3981999507e-3)
    poly = poly * rest + np.float32(8.3334519073e-3)
    poly = poly * rest + np.float32(4.1665795894e-2)
    poly = poly * rest + np.float32(1.6666665459e-1)
    poly = poly * rest + np.float32(5.0000001201e-1)
    poly = poly * rest * rest + rest + np.float32(1.0)
    return poly * bits_to_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@jit
def silu_f32(x: Any) -> Any:
    """float32 x · sigmoid(x)."""
    return x / (np.float32(1.0) + exp_f32(min(max(-x, np.float32(-87.0)), np.float32(88.0))))
