#!/usr/bin/env python3
"""What this machine can do, measured: memory reads per second, and dot products in registers per second.

  python bench/machine.py                  a few seconds; every core that this process may use

The limits that other benchmarks print (bench/limits.py) are computed from these figures, taken in the same run.
Memory: every thread sums its share of 1 GiB. Dot products: every thread keeps 12 sums in registers and multiplies into
them without touching memory: VDPBF16PS and VPDPBUSD where the CPU has them, else float32 FMA for both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SUMS = 12  # independent sums: enough to hide a latency of six cycles at two a cycle
ROUNDS, ROUND_LENGTH = 5, 20_000_000  # of the register loops
I32, I64 = ir.IntType(32), ir.IntType(64)
F32X16, I32X16 = ir.VectorType(ir.FloatType(), 16), ir.VectorType(I32, 16)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not declare."""

    def _to_string(self) -> str:
        return "bfloat"


BF16X32 = ir.VectorType(_BFloat(), 32)


@dataclass(frozen=True)
class Machine:
    """read_bytes_s: memory read bandwidth; bf16_flops, int8_flops: multiplications plus additions per second."""

    threads: int
    read_bytes_s: float
    bf16_flops: float
    int8_flops: float

    def __str__(self) -> str:
        return (
            f"{self.threads} threads: memory reads {self.read_bytes_s / 1e9:.1f} GB/s, dot products "
            f"{self.bf16_flops / 1e9:.0f} GFLOP/s in bf16, {self.int8_flops / 1e9:.0f} GOP/s in int8"
        )


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _bf16_step(builder: Any, total: Any, words: Any) -> Any:
    a = builder.bitcast(words, BF16X32)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return builder.bitcast(_call(builder, name, F32X16, builder.bitcast(total, F32X16), a, a), I32X16)


def _int8_step(builder: Any, total: Any, words: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", I32X16, total, words, words)


def _float_step(builder: Any, total: Any, words: Any) -> Any:
    a = builder.bitcast(words, F32X16)
    return builder.bitcast(_call(builder, "llvm.fma.v16f32", F32X16, a, a, builder.bitcast(total, F32X16)), I32X16)


def register_loop(step: Callable[[Any, Any, Any], Any]) -> Any:
    """A compiled loop(count, word) → int: `count` rounds of `SUMS` steps; `word` fills the vectors multiplied."""

    @intrinsic
    def rounds(typingctx: Any, count: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            count, word = args
            undefined = ir.Constant(I32X16, ir.Undefined)
            first = builder.insert_element(undefined, word, ir.Constant(I32, 0))
            words = builder.shuffle_vector(first, undefined, ir.Constant(I32X16, [ir.Constant(I32, 0)] * 16))
            before, body = builder.block, builder.append_basic_block("rounds")
            after = builder.append_basic_block("done")
            builder.branch(body)
            builder.position_at_end(body)
            index = builder.phi(I64)
            sums = [builder.phi(I32X16) for _ in range(SUMS)]
            new = [step(builder, total, words) for total in sums]
            following = builder.add(index, ir.Constant(I64, 1))
            index.add_incoming(ir.Constant(I64, 0), before)
            index.add_incoming(following, body)
            for total, value in zip(sums, new, strict=True):
                total.add_incoming(ir.Constant(I32X16, [ir.Constant(I32, 0)] * 16), before)
                total.add_incoming(value, body)
            builder.cbranch(builder.icmp_signed("<", following, count), body, after)
            builder.position_at_end(after)
            result = new[0]
            for value in new[1:]:  # every sum is used, or LLVM would drop it
                result = builder.xor(result, value)
            return builder.extract_element(result, ir.Constant(I32, 0))

        return types.int32(types.int64, types.int32), codegen

    def loop(count: int, word: int) -> int:
        return rounds(count, word)

    return numba.njit("int32(int64, int32)", nogil=True)(loop)


@numba.njit("int64(int64[::1])", nogil=True)
def total_of(values: Any) -> Any:
    total = 0
    for index in range(values.size):
        total += values[index]
    return total


def on_all(threads: int, work: Callable[[int], Any]) -> float:
    """Seconds until `threads` threads have each done work(their number)."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(time.sleep, [0.001] * threads))  # they are there
        began = time.perf_counter()
        list(pool.map(work, range(threads)))
        return time.perf_counter() - began


def operations_per_second(step: Callable[[Any, Any, Any], Any], per_step: int, word: int, threads: int) -> float:
    """The best of a few rounds; `per_step` operations in one step."""
    loop = register_loop(step)
    best = min(on_all(threads, lambda _: loop(ROUND_LENGTH, word)) for _ in range(ROUNDS))
    return threads * ROUND_LENGTH * SUMS * per_step / best


def read_bytes_per_second(threads: int, size: int = 1 << 30) -> float:
    """The median of 7 passes over `size` bytes."""
    values = np.ones(size // 8, np.int64)
    parts = np.array_split(values, threads)
    return size / float(np.median([on_all(threads, lambda thread: total_of(parts[thread])) for _ in range(7)]))


def measure(threads: int | None = None) -> Machine:
    """Takes about three seconds and 1 GiB."""
    threads = threads or len(os.sched_getaffinity(0))
    features = llvm.get_host_cpu_features()
    bf16 = (_bf16_step, 64, 0x3F803F80) if features.get("avx512bf16") else (_float_step, 32, 0x3F800000)
    int8 = (_int8_step, 128, 0x01010101) if features.get("avx512vnni") else (_float_step, 32, 0x3F800000)
    return Machine(
        threads,
        read_bytes_per_second(threads),
        operations_per_second(*bf16, threads),
        operations_per_second(*int8, threads),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    machine = measure(arguments.threads)
    print(json.dumps(asdict(machine)) if arguments.json else machine)


if __name__ == "__main__":
    main()
