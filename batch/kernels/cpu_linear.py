"""Matrix products on the CPU, float32 and bfloat16: one call computes every group (expert) of a layer.

Weights are read once, in place, as [out, in]; sums are float32 in a fixed order, so a row's result depends neither on
the other rows nor on the number of threads. Legend: R rows of x, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.simd import elements_at, jit, narrow, silu_f32, size_of, take_item, widen
from batch.kernels.tiles import TILE_COLUMNS, TILE_ROWS, dot_tile
from batch.kernels.vector_ir import VECTOR_BYTES

BLOCK_ROWS, BLOCK_COLUMNS = 96, 64  # rows of x kept in L2 while one work item's columns are walked

_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (dot_tile(rows) for rows in range(1, TILE_ROWS + 1))


@jit
def dot_rows(
    like: Any, rows: Any, x: Any, x_bytes: Any, w: Any, w_bytes: Any, size: Any, out: Any, out_bytes: Any
) -> None:
    """1 to 6 rows of x · 4 rows of w → float32 [rows, 4]; see `tiles.dot_tile`."""
    if rows == 6:
        _tile_6(like, x, x_bytes, w, w_bytes, size, out, out_bytes)
    elif rows == 5:
        _tile_5(like, x, x_bytes, w, w_bytes, size, out, out_bytes)
    elif rows == 4:
        _tile_4(like, x, x_bytes, w, w_bytes, size, out, out_bytes)
    elif rows == 3:
        _tile_3(like, x, x_bytes, w, w_bytes, size, out, out_bytes)
    elif rows == 2:
        _tile_2(like, x, x_bytes, w, w_bytes, size, out, out_bytes)
    else:
        _tile_1(like, x, x_bytes, w, w_bytes, size, out, out_bytes)


@jit
def _block(like: Any, rows: Any, columns: Any, x: Any, w: Any, row_bytes: Any, out: Any) -> None:
    """float32 out [rows, columns] = rows of x · rows of w, the weight's rows in the outer loop."""
    for column in range(0, columns, TILE_COLUMNS):
        weight = w + column * row_bytes
        for row in range(0, rows, TILE_ROWS):
            count = min(TILE_ROWS, rows - row)
            target = out + 4 * (row * columns + column)
            dot_rows(like, count, x + row * row_bytes, row_bytes, weight, row_bytes, row_bytes, target, 4 * columns)


@jit
def store_row(like: Any, sums: Any, out: Any, target: Any, columns: Any) -> None:
    for n in range(columns):
        out[target + n] = narrow(sums[n], like)


@jit
def store_gated_row(like: Any, gates: Any, ups: Any, out: Any, target: Any, columns: Any) -> None:
    for n in range(columns):
        gate = widen(narrow(silu_f32(widen(narrow(gates[n], like))), like))
        out[target + n] = narrow(gate * widen(narrow(ups[n], like)), like)


@jit
def _grouped_linear(job: Any, like: Any) -> None:
    args = elements_at(job, np.int64(0))
    items, x, out, weights = args[1], args[2], elements_at(args[3], like), elements_at(args[4], np.int64(0))
    starts, order = elements_at(args[5], np.int64(0)), elements_at(args[6], np.int64(0))
    size, row_bytes, gated, blocks = args[7], args[8] * size_of(like), args[9], args[10]
    scattered = args[6] != 0
    sums = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    ups = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        group, first = item // blocks, item % blocks * BLOCK_COLUMNS
        columns = min(BLOCK_COLUMNS, size - first)
        weight = weights[group] + first * row_bytes
        for begin in range(starts[group], starts[group + 1], BLOCK_ROWS):
            rows = min(BLOCK_ROWS, starts[group + 1] - begin)
            at = x + begin * row_bytes
            _block(like, rows, columns, at, weight, row_bytes, sums.ctypes.data)
            if gated:
                _block(like, rows, columns, at, weight + size * row_bytes, row_bytes, ups.ctypes.data)
            for m in range(rows):
                target = (order[begin + m] if scattered else begin + m) * size + first
                if gated:
                    store_gated_row(like, sums[m * columns :], ups[m * columns :], out, target, columns)
                else:
                    store_row(like, sums[m * columns :], out, target, columns)


@parallel.Kernel
def _grouped_linear_bf16(job: Any) -> None:
    _grouped_linear(job, np.uint16(0))


@parallel.Kernel
def _grouped_linear_f32(job: Any) -> None:
    _grouped_linear(job, np.float32(0))


_KERNELS = {torch.bfloat16: _grouped_linear_bf16, torch.float32: _grouped_linear_f32}


def grouped_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    starts: Sequence[int],
    out_features: int,
    gated: bool = False,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows starts[g]:starts[g+1] of x [R, K] times weights[g]ᵀ → [R, N] in x's dtype.

    weights[g] is [N, K], or with `gated` [2N, K] (gate rows first), and the result silu(gate) · up, rounded as the
    reference rounds. `order` int64 [R]: row r of the product goes to row order[r] of the result.
    """
    out = x.new_empty((x.shape[0], out_features))
    groups = [g for g in range(len(weights)) if starts[g + 1] > starts[g]]
    addresses = torch.tensor([weights[g].data_ptr() for g in groups])
    bounds = torch.tensor([starts[g] for g in groups] + [x.shape[0]])
    blocks = -(-out_features // BLOCK_COLUMNS)
    parallel.run(
        _KERNELS[x.dtype], len(groups) * blocks, x, out, addresses, bounds, 0 if order is None else order,
        out_features, x.shape[1], int(gated), blocks,
    )  # fmt: skip
    return out


def fits(x: torch.Tensor, out_features: int) -> bool:
    """True where `grouped_linear` can take x on the CPU: dtype, and shapes in whole vectors."""
    whole = x.shape[1] * x.element_size() % VECTOR_BYTES == 0 and out_features % TILE_COLUMNS == 0
    return x.dtype in _KERNELS and x.device.type == "cpu" and whole and x.is_contiguous()
