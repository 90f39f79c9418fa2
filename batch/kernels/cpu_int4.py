"""bfloat16 activations times INT4 weights as they are stored, for few rows: one call computes every group of a layer.

The weights are read once, at 4 bits each, and never expanded in memory; q · scale is not rounded to bfloat16 as the
reference does, so results are slightly closer to the exact product. Needs AVX512-BF16 and groups of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.cpu_linear import BLOCK_COLUMNS, store_gated_row, store_row
from batch.kernels.linears import Int4Linear
from batch.kernels.simd import elements_at, jit, take_item
from batch.kernels.tiles import INT4_BLOCK, TILE_COLUMNS, has_avx512_bf16, int4_tile

TILE_ROWS = 4
BLOCK_ROWS = 32

_tile_1, _tile_2, _tile_3, _tile_4 = (int4_tile(rows) for rows in range(1, TILE_ROWS + 1))


@jit
def _block(rows: Any, columns: Any, x: Any, w: Any, scale: Any, size: Any, out: Any) -> None:
    """float32 out [rows, columns] = rows of x · packed rows of w; `size` is K."""
    x_bytes, w_bytes, scale_bytes, out_bytes = size * 2, size // 2, size // INT4_BLOCK * 2, 4 * columns
    for column in range(0, columns, TILE_COLUMNS):
        packed, factors = w + column * w_bytes, scale + column * scale_bytes
        for row in range(0, rows, TILE_ROWS):
            count, at, to = rows - row, x + row * x_bytes, out + 4 * (row * columns + column)
            if count >= 4:
                _tile_4(at, x_bytes, packed, w_bytes, factors, scale_bytes, w_bytes, to, out_bytes)
            elif count == 3:
                _tile_3(at, x_bytes, packed, w_bytes, factors, scale_bytes, w_bytes, to, out_bytes)
            elif count == 2:
                _tile_2(at, x_bytes, packed, w_bytes, factors, scale_bytes, w_bytes, to, out_bytes)
            else:
                _tile_1(at, x_bytes, packed, w_bytes, factors, scale_bytes, w_bytes, to, out_bytes)


@parallel.Kernel
def _grouped_int4(job: Any) -> None:
    i64, like = np.int64(0), np.uint16(0)
    args = elements_at(job, i64)
    items, x, out, tables = args[1], args[2], elements_at(args[3], like), elements_at(args[4], i64)
    starts, order = elements_at(args[5], i64), elements_at(args[6], i64)
    columns_total, size, gated, blocks = args[7], args[8], args[9], args[10]
    scattered = args[6] != 0
    sums = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    ups = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        group, first = item // blocks, item % blocks * BLOCK_COLUMNS
        columns = min(BLOCK_COLUMNS, columns_total - first)
        packed_at, scale_at = first * (size // 2), first * (size // INT4_BLOCK * 2)
        for begin in range(starts[group], starts[group + 1], BLOCK_ROWS):
            rows = min(BLOCK_ROWS, starts[group + 1] - begin)
            at, table = x + begin * size * 2, 4 * group
            _block(rows, columns, at, tables[table] + packed_at, tables[table + 1] + scale_at, size, sums.ctypes.data)
            if gated:
                packed, scale = tables[table + 2] + packed_at, tables[table + 3] + scale_at
                _block(rows, columns, at, packed, scale, size, ups.ctypes.data)
            for m in range(rows):
                target = (order[begin + m] if scattered else begin + m) * columns_total + first
                if gated:
                    store_gated_row(like, sums[m * columns :], ups[m * columns :], out, target, columns)
                else:
                    store_row(like, sums[m * columns :], out, target, columns)


def grouped_int4(
    x: torch.Tensor, weights: Sequence[tuple[Int4Linear, ...]], starts: Sequence[int], order: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows starts[g]:starts[g+1] of x bfloat16 [R, K] times weights[g] → bfloat16 [R, N].

    weights[g] is one linear, or (gate, up), whose result is silu(gate) · up. `order`: as in `grouped_linear`.
    """
    rows, size = x.shape
    out_features, gated = weights[0][0].out_features, len(weights[0]) == 2
    # [R, K/128, l = 16, h = 2, i = 4] → [R, K/128, i, l, h]
    permuted = x.view(rows, -1, 16, 2, 4).permute(0, 1, 4, 2, 3).contiguous()
    out = x.new_empty((rows, out_features))
    groups = [g for g in range(len(weights)) if starts[g + 1] > starts[g]]
    addresses = [[a for part in weights[g] for a in (part.packed.data_ptr(), part.scale.data_ptr())] for g in groups]
    tables = torch.tensor([(pair * 2)[:4] for pair in addresses])
    bounds = torch.tensor([starts[g] for g in groups] + [rows])
    blocks = -(-out_features // BLOCK_COLUMNS)
    parallel.run(
        _grouped_int4, len(groups) * blocks, permuted, out, tables, bounds, 0 if order is None else order,
        out_features, size, int(gated), blocks,
    )  # fmt: skip
    return out


def fits(x: torch.Tensor, part: object) -> bool:
    """True where `grouped_int4` can multiply x by a weight of this kind on this CPU."""
    if not (isinstance(part, Int4Linear) and x.dtype == torch.bfloat16 and has_avx512_bf16()):
        return False
    whole = part.in_features % INT4_BLOCK == 0 and part.out_features % TILE_COLUMNS == 0
    plain = part.packed.is_contiguous() and part.scale.is_contiguous() and x.is_contiguous()
    return part.group_size == INT4_BLOCK and part.scale.dtype == torch.bfloat16 and whole and plain
