#!/usr/bin/env python3
"""Attention over the paged KV cache on the CPU: GFLOP/s and, for decoding, GB/s of keys and values.

  python bench/attention.py                          all cases, heads of the mini Scout and of Scout, bf16
  python bench/attention.py --case decode --dtype float32 --block-size 16

FLOPs are 4 · D per query head, query and key that it sees (both products). Layers are taken in turn, so that no
layer's keys are in the processor's cache from the time before, where a decoding step is larger than that. The fastest
round counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from batch.kernels import ops  # noqa: E402
from batch.kernels.paging import LayerCache, PagedBatch  # noqa: E402
from l4tool.core.console import table  # noqa: E402

HEADS = {"mini": (16, 4, 64), "Scout": (40, 8, 128)}  # query heads, kv heads, head_dim


@dataclass(frozen=True)
class Case:
    """`seqs` sequences with `queries` new tokens each; the last sees `context` keys, `shared` of them common to all."""

    name: str
    seqs: int
    queries: int
    context: int
    shared: int = 0
    layers: int = 1


CASES = [
    Case("prefill 6 × 300", 6, 300, 300),
    Case("prefill 2,048 up to 8,000", 1, 2048, 8000),
    Case("prefill 32 × 64 after 2,000 shared", 32, 64, 2064, 2000),
    Case("decode 1 × 300", 1, 1, 300, layers=16),
    Case("decode 1 × 8,000", 1, 1, 8000, layers=8),
    Case("decode 64 × 300", 64, 1, 300, layers=4),
    Case("decode 64 × 2,064, 2,000 shared", 64, 1, 2064, 2000, layers=4),
    Case("decode 16 × 2,064, none shared", 16, 1, 2064, layers=2),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only those whose name has this in it")
    parser.add_argument("--heads", choices=list(HEADS), nargs="+", default=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    return parser.parse_args()


def build(
    case: Case, heads: tuple[int, int, int], dtype: torch.dtype, size: int
) -> tuple[list[LayerCache], PagedBatch]:
    """Caches of random values, blocks in a random order, and the step."""
    _, kv_heads, dim = heads
    width = -(-case.context // size)
    table = torch.randperm(case.seqs * width).reshape(case.seqs, width).int()
    table[:, : case.shared // size] = table[0, : case.shared // size]
    packed = ops.packs_cache(torch.device("cpu"), dtype, size, dim)
    k_shape, v_shape = LayerCache.shapes(size, kv_heads, dim, packed)
    layers = [
        LayerCache(*(torch.randn(case.seqs * width, *shape).to(dtype) for shape in (k_shape, v_shape)), packed)
        for _ in range(case.layers)
    ]
    starts = torch.arange(case.seqs + 1, dtype=torch.int32) * case.queries
    context = torch.full((case.seqs,), case.context, dtype=torch.int32)
    return layers, PagedBatch(table, starts, context, case.queries, case.context)


def measure(case: Case, heads: tuple[int, int, int], arguments: argparse.Namespace) -> list[str]:
    num_heads, kv_heads, dim = heads
    dtype = getattr(torch, arguments.dtype)
    layers, batch = build(case, heads, dtype, arguments.block_size)
    q = torch.randn(case.seqs * case.queries, num_heads, dim).to(dtype)
    for layer in layers[:2]:
        ops.paged_attention(q, layer, batch, dim**-0.5)  # compile, warm up
    times: list[float] = []
    while sum(times) < arguments.seconds or len(times) < 4:
        began = time.perf_counter()
        for layer in layers:
            ops.paged_attention(q, layer, batch, dim**-0.5)
        times.append((time.perf_counter() - began) / len(layers))
    seconds = min(times)
    seen = case.seqs * case.queries * (case.context - (case.queries - 1) / 2)
    keys = case.seqs * case.context - (case.seqs - 1) * case.shared // arguments.block_size * arguments.block_size
    num_bytes = keys * kv_heads * dim * 2 * dtype.itemsize
    flops = 4 * dim * num_heads * seen
    return [f"{seconds * 1e3:.3f}", f"{flops / seconds / 1e9:.0f}", f"{num_bytes / seconds / 1e9:.1f}"]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    rows = [
        [case.name, name, *measure(case, HEADS[name], arguments)]
        for case in CASES
        if arguments.case in case.name
        for name in arguments.heads
    ]
    print(table(rows, ["attention", "heads of", "ms a layer", "GFLOP/s", "GB/s of keys and values"]))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
