"""Compiles every Triton kernel for an H100, at Scout's shapes, on a machine without a GPU: a line of JSON for each.

A driver that only names its target stands in for CUDA's, and launches end at the compiled kernel.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from batch.kernels import triton_attention, triton_experts, triton_fused, triton_sampling
from batch.kernels.linears import DenseLinear, Fp8Linear, FusedLinear, Int4Linear
from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.triton_banks import Bank
from quant.kernels import triton_quantize

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 5120, 8192, 40, 8, 128  # Scout's
launch = JITFunction.run


class Target:
    """What compiling asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(kernel, *args, grid, warmup, **options):
    made = launch(kernel, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    stack_bytes = int(usage.stdout.partition("STACK:")[2].split()[0])
    constants = {name: str(value) for name, value in options.items() if name.isupper()}
    tensor_core = "wgmma" if "wgmma.mma_async" in made.asm["ptx"] else "mma" if "mma.sync" in made.asm["ptx"] else None
    print(
        json.dumps({
            "kernel": kernel.__name__, "constants": constants, "stack_bytes": stack_bytes,
            "shared_bytes": made.metadata.shared, "tensor_core": tensor_core,
        })
    )  # fmt: skip
    return made


def empty(*shape, dtype=torch.bfloat16):
    """Memory that is only pointed at."""
    return torch.empty(shape, dtype=dtype)


def int4(rows, columns):
    return Int4Linear(empty(rows, columns // 8, dtype=torch.int32), empty(columns // 128, rows).T, 128)


def fp8(rows, columns, dynamic=True):
    return Fp8Linear(empty(rows, columns, dtype=torch.float8_e4m3fn), empty(rows, 1), dynamic)


def dense(rows, columns):
    return DenseLinear(empty(rows, columns))


def experts():
    for make in (int4, fp8, lambda *shape: fp8(*shape, dynamic=False), dense):
        one = make(INNER, HIDDEN)
        up = make(2 * INNER, HIDDEN) if make is dense else FusedLinear((one, one))
        banks = Bank.of([up] * 16, True), Bank.of([make(HIDDEN, INNER)] * 16, False)
        for tokens in (1, 256, 4096) if make is int4 else (1, 4096):
            triton_experts.routed_experts(empty(tokens, HIDDEN), empty(tokens, 16), *banks)


def float32():
    for make in (int4, fp8, lambda *shape: fp8(*shape, dynamic=False)):
        one = make(INNER, HIDDEN)
        banks = Bank.of([FusedLinear((one, one))] * 16, True), Bank.of([make(HIDDEN, INNER)] * 16, False)
        x = empty(4096, HIDDEN, dtype=torch.float32)
        triton_experts.routed_experts(x, empty(4096, 16, dtype=torch.float32), *banks)


def cache_of(dtype):
    return LayerCache(*(empty(8, 32, KV_HEADS, DIM, dtype=dtype) for _ in range(2)))


def attention():
    plain, fp8_cache = (cache_of(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    sizes = ((1, 1), (256, 1), (2, 8), (2, 1024))
    for cache, seqs, queries in (*((plain, *size) for size in sizes), (fp8_cache, 256, 1), (fp8_cache, 2, 1024)):
        ints = [torch.zeros(size, dtype=torch.int32) for size in ((seqs, 99), seqs + 1, seqs)]
        batch = PagedBatch(*ints, queries, 99 * 32)
        triton_attention.paged_attention(empty(seqs * queries, HEADS, DIM), cache, batch, DIM**-0.5)


def fused():
    x, rotation = empty(3, HIDDEN), (empty(3, DIM // 2, dtype=torch.float32),) * 2
    cache = cache_of(torch.bfloat16)
    qkv, slots = empty(3, (HEADS + 2 * KV_HEADS) * DIM), torch.zeros(3, dtype=torch.int64)
    for deltas in ((), (x,), (x, x)):
        triton_fused.add_rms_norm(x, deltas, empty(HIDDEN), 1e-5)
    triton_fused.store_qkv(qkv, HEADS, cache, slots, rotation, 1e-5, None)
    triton_fused.store_qkv(qkv, HEADS, cache, slots, rotation, None, None)
    triton_fused.store_qkv(qkv, HEADS, cache, slots, None, None, empty(3, dtype=torch.float32))
    triton_fused.store_qkv(qkv, HEADS, cache_of(torch.float8_e4m3fn), slots, rotation, 1e-5, None)


def sampling():
    tokens, whole = torch.zeros(4, dtype=torch.int64), torch.zeros((4, 3), dtype=torch.int64)
    logits, reals = empty(4, 202048, dtype=torch.float32), empty(4, 3, dtype=torch.float64)
    triton_sampling.draw(logits, tokens, reals, whole, 128)


def quantize():
    for dtype in (torch.bfloat16, torch.float32):
        for weight in (empty(INNER, HIDDEN, dtype=dtype), empty(HIDDEN, INNER, dtype=dtype).T):
            triton_quantize.fp8(weight)
            for method in ("mse", "absmax"):
                triton_quantize.int4(weight, 128, method)


if __name__ == "__main__":
    driver.set_active(Target())
    JITFunction.run = compile_only
    for part in sys.argv[1:]:
        {
            "experts": experts,
            "float32": float32,
            "attention": attention,
            "fused": fused,
            "quantize": quantize,
            "sampling": sampling,
        }[part]()
