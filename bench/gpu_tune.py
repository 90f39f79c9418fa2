#!/usr/bin/env python3
"""Which tiles the grouped products should have on this card: every shape tried, the fastest of each size printed.

  python bench/gpu_tune.py                    INT4, FP8 and bf16 experts of Scout's widths
  python bench/gpu_tune.py --schemes int4

A tile is (columns, warps, stages) for so many rows; what is printed goes into SHAPES, GATED_SHAPES and
GATED_DECODED_SHAPES of batch/kernels/triton_experts.py. Sixteen experts get as many rows as a tile has on average half
filled (full at 128), as in decoding; a shape that does not compile or fit is left out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

Shape = tuple[int, int, int]
COLUMNS, WARPS, STAGES = (32, 64, 128), (4, 8), (2, 3, 4, 5, 6)
ROWS = (16, 32, 64, 128)
FULL = 128  # rows that tiles are full with
EXPERTS, HIDDEN, INNER = 16, 5120, 8192


def fastest(
    shapes: Iterable[Shape], seconds_of: Callable[[Shape], float], failures: tuple[type[Exception], ...]
) -> list[tuple[float, Shape]]:
    """(seconds, shape) of all that run, the fastest first."""
    found = []
    for shape in shapes:
        try:
            found.append((seconds_of(shape), shape))
        except failures as error:
            print(f"  {shape}: {type(error).__name__}", file=sys.stderr)
    return sorted(found)


def tune(scheme: str, device: str) -> None:
    """Prints one line for each size of tile, gated and not."""
    import torch
    from gpu_measure import random_experts
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from batch.kernels import triton_experts
    from batch.kernels.triton_banks import Bank

    where = torch.device(device)
    weights = random_experts(scheme, EXPERTS, HIDDEN, INNER, where)
    for gated, rows in itertools.product((True, False), ROWS):
        bank = Bank.of(weights.gate_up if gated else weights.down, gated)
        table = triton_experts.shapes_of(bank)
        kept, seconds_of = table[rows], timer(bank, rows, where)
        found = fastest(
            itertools.product(COLUMNS, WARPS, STAGES), seconds_of, (CompilationError, OutOfResources, PTXASError)
        )
        table[rows] = kept
        now = next(seconds for seconds, shape in found if shape == kept)
        best = ", ".join(f"{shape} {seconds * 1e6:.0f} µs" for seconds, shape in found[:3])
        name = f"{scheme}, gated" if gated else scheme
        print(f"{name}, {rows} rows: now {kept} {now * 1e6:.0f} µs; best {best}")


def timer(bank: Any, rows: int, device: Any) -> Callable[[Shape], float]:
    """What times a product of tiles of so many rows in a shape, which it leaves in the table."""
    import torch
    from gpu_measure import timed

    from batch.kernels import triton_experts
    from batch.kernels.triton_rows import dispatch, prepare

    tokens = EXPERTS * (rows if rows == FULL else rows // 2)
    logits = torch.zeros(tokens, EXPERTS, device=device)
    logits[torch.arange(tokens), torch.arange(tokens) % EXPERTS] = 1.0
    x = torch.randn(tokens, bank.form.in_features, device=device).bfloat16()
    score, order, tiles = dispatch(logits.bfloat16())
    assert tiles.rows == rows
    ready, table = prepare(x, bank, order, score), triton_experts.shapes_of(bank)

    def seconds_of(shape: Shape) -> float:
        table[rows] = shape
        return timed(lambda: triton_experts.product(ready, bank, tiles), device)

    return seconds_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=["int4", "fp8", "bf16"], default=["int4", "fp8", "bf16"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    from gpu_device import require_cuda

    require_cuda(arguments.device)
    for scheme in arguments.schemes:
        tune(scheme, arguments.device)


if __name__ == "__main__":
    main()
