"""Paged attention on the CPU over plain caches, float32 and bfloat16: keys and values are read where they lie.

Online softmax over tiles of 32 keys counted from slot 0, in float32. A query's result depends on its keys alone, not on
which queries share the step. Legend: T query rows, A heads, K kv heads, G = A / K, D head_dim, B tokens per block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.cpu_linear import dot_rows
from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.simd import bits_to_float, elements_at, exp_f32, jit, narrow, size_of, take_item
from batch.kernels.tiles import TILE_COLUMNS, TILE_ROWS, mix_tile

KEYS = 32  # keys per softmax tile
MAX_ROWS = 48  # query rows (queries · G) per work item
MIX_COLUMNS = 32
_LOWEST = np.float32(-3.0e38)

_mix_1, _mix_2, _mix_3, _mix_4, _mix_5, _mix_6 = (mix_tile(rows) for rows in range(1, TILE_ROWS + 1))


@jit
def _mix_rows(
    like: Any, rows: Any, p: Any, p_bytes: Any, v: Any, v_bytes: Any, count: Any, out: Any, out_bytes: Any
) -> None:
    """out[m] += Σ_j p[m, j] · v[j] for 1 to 6 rows; see `tiles.mix_tile`."""
    if rows == 6:
        _mix_6(like, p, p_bytes, v, v_bytes, count, out, out_bytes)
    elif rows == 5:
        _mix_5(like, p, p_bytes, v, v_bytes, count, out, out_bytes)
    elif rows == 4:
        _mix_4(like, p, p_bytes, v, v_bytes, count, out, out_bytes)
    elif rows == 3:
        _mix_3(like, p, p_bytes, v, v_bytes, count, out, out_bytes)
    elif rows == 2:
        _mix_2(like, p, p_bytes, v, v_bytes, count, out, out_bytes)
    else:
        _mix_1(like, p, p_bytes, v, v_bytes, count, out, out_bytes)


@jit
def _score_tile(
    like: Any,
    rows: Any,
    q: Any,
    keys: Any,
    key_bytes: Any,
    table: Any,
    block_size: Any,
    block_bytes: Any,
    first: Any,
    count: Any,
    width: Any,
    scores: Any,
) -> None:
    """float32 scores [rows, KEYS] of positions first … first + count (rounded up to 4, inside one block)."""
    for j in range(0, count, TILE_COLUMNS):
        position = first + j
        at = keys + np.int64(table[position // block_size]) * block_bytes + position % block_size * key_bytes
        for row in range(0, rows, TILE_ROWS):
            target = scores + 4 * (row * KEYS + j)
            dot_rows(like, min(TILE_ROWS, rows - row), q + row * width, width, at, key_bytes, width, target, 4 * KEYS)


@jit
def _softmax_row(scores: Any, visible: Any, scale: Any, best: Any, sums: Any, mixed: Any) -> Any:
    """One row's tile: scores [KEYS] become weights in place; rescales its sums [16] and mixed [D]; returns the max."""
    highest = best
    for j in range(visible):
        scores[j] *= scale
        highest = max(highest, scores[j])
    for j in range(visible, KEYS):
        scores[j] = _LOWEST
    for j in range(KEYS):
        scores[j] = exp_f32(max(scores[j] - highest, np.float32(-87.0)))
    for j in range(visible, KEYS):
        scores[j] = np.float32(0.0)
    if highest > best:
        shrink = exp_f32(max(best - highest, np.float32(-87.0)))
        for i in range(16):
            sums[i] *= shrink
        for d in range(mixed.size):
            mixed[d] *= shrink
    for i in range(16):
        sums[i] += scores[i] + scores[16 + i]
    return highest


@jit
def _mix_tile_rows(
    like: Any,
    rows: Any,
    dim: Any,
    weights: Any,
    values: Any,
    value_bytes: Any,
    table: Any,
    block_size: Any,
    block_bytes: Any,
    first: Any,
    count: Any,
    mixed: Any,
) -> None:
    """mixed [rows, D] += weights [rows, KEYS] · values of positions first … first + count, in order of position."""
    done = 0
    while done < count:
        position = first + done
        take = min(count - done, block_size - position % block_size)
        at = values + np.int64(table[position // block_size]) * block_bytes + position % block_size * value_bytes
        for row in range(0, rows, TILE_ROWS):
            part = min(TILE_ROWS, rows - row)
            p = weights + 4 * (row * KEYS + done)
            for d in range(0, dim, MIX_COLUMNS):
                target = mixed + 4 * (row * dim + d)
                _mix_rows(like, part, p, 4 * KEYS, at + d * size_of(like), value_bytes, take, target, 4 * dim)
        done += take


@jit
def _gather_queries(q: Any, first: Any, rows: Any, group: Any, heads: Any, dim: Any, local: Any) -> None:
    """The item's queries, G heads of each token, into consecutive rows of `local` [rows, D]."""
    for m in range(rows):
        source = first + (m // group * heads + m % group) * dim
        for d in range(dim):
            local[m * dim + d] = q[source + d]


@jit
def _store_rows(
    like: Any, mixed: Any, sums: Any, rows: Any, first: Any, group: Any, heads: Any, dim: Any, out: Any
) -> None:
    """mixed [rows, D] divided by the sum of its weights, to where `_gather_queries` took the queries from."""
    for m in range(rows):
        total = np.float32(0.0)
        for i in range(16):
            total += sums[m, i]
        target = first + (m // group * heads + m % group) * dim
        for d in range(dim):
            out[target + d] = narrow(mixed[m, d] / total, like)


@jit
def _attend_keys(
    like: Any,
    rows: Any,
    dim: Any,
    at_q: Any,
    keys: Any,
    values: Any,
    key_bytes: Any,
    table: Any,
    block_size: Any,
    begin: Any,
    end: Any,
    seen: Any,
    group: Any,
    scale: Any,
    scores: Any,
    best: Any,
    sums: Any,
    mixed: Any,
) -> None:
    """Rows take in the keys begin (a multiple of KEYS) … end of one block table. The first G rows see the first `seen`
    keys, every G rows one more, but none sees past `end`."""
    at_p, at_mixed, width = scores.ctypes.data, mixed.ctypes.data, dim * size_of(like)
    block_bytes = block_size * key_bytes
    for first in range(begin, end, KEYS):
        count = min(KEYS, end - first)
        _score_tile(like, rows, at_q, keys, key_bytes, table, block_size, block_bytes, first, count, width, at_p)
        for m in range(rows):
            visible = min(max(seen + m // group - first, 0), count)
            if visible > 0:
                best[m] = _softmax_row(scores[m], visible, scale, best[m], sums[m], mixed[m])
            else:
                scores[m] = 0
        _mix_tile_rows(like, rows, dim, at_p, values, key_bytes, table, block_size, block_bytes, first, count, at_mixed)


@jit
def _attend(job: Any, like: Any) -> None:
    """Item = (work item, kv head). Arguments: see `paged_attention`."""
    args, i32 = elements_at(job, np.int64(0)), np.int32(0)
    items, q, out = args[1], elements_at(args[2], like), elements_at(args[5], like)
    first, shared = elements_at(args[8], i32), elements_at(args[9], i32)
    seqs, begins, ends = elements_at(args[10], i32), elements_at(args[11], i32), elements_at(args[12], i32)
    last_row, cached = elements_at(args[13], i32), elements_at(args[14], i32)
    heads, kv_heads, dim, block_size, scale = args[15], args[16], args[17], args[18], bits_to_float(np.int32(args[19]))
    group, width = heads // kv_heads, dim * size_of(like)
    key_bytes = kv_heads * width
    queries, scores = np.empty(MAX_ROWS * width, np.uint8), np.empty((MAX_ROWS, KEYS), np.float32)
    mixed, sums = np.empty((MAX_ROWS, dim), np.float32), np.empty((MAX_ROWS, 16), np.float32)
    best, at_q = np.empty(MAX_ROWS, np.float32), queries.ctypes.data
    while True:
        item = take_item(job)
        if item >= items:
            return
        work, head = item // kv_heads, item % kv_heads
        at_k, at_v, common, row = args[3] + head * width, args[4] + head * width, np.int64(shared[work]), 0
        for s in range(first[work], first[work + 1]):
            count, place = (ends[s] - begins[s]) * group, (begins[s] * heads + head * group) * dim
            _gather_queries(q, place, count, group, heads, dim, elements_at(at_q + row * width, like))
            row += count
        mixed[:row], sums[:row], best[:row] = 0, 0, _LOWEST
        if common > 0:  # all segments' rows together
            table = elements_at(args[6] + 4 * seqs[first[work]] * args[7], i32)
            _attend_keys(
                like, row, dim, at_q, at_k, at_v, key_bytes, table, block_size, 0, common, common, group, scale,
                scores, best, sums, mixed,
            )  # fmt: skip
        row = 0
        for s in range(first[work], first[work + 1]):
            seq, begin, end = seqs[s], begins[s], ends[s]
            count, place = (end - begin) * group, (begin * heads + head * group) * dim
            seen = cached[seq] - (last_row[seq] - begin) + 1  # positions that the segment's first query sees
            _attend_keys(
                like, count, dim, at_q + row * width, at_k, at_v, key_bytes,
                elements_at(args[6] + 4 * seq * args[7], i32), block_size, common, seen + (end - begin) - 1, seen,
                group, scale, scores, best[row:], sums[row:], mixed[row:],
            )  # fmt: skip
            _store_rows(like, mixed[row:], sums[row:], count, place, group, heads, dim, out)
            row += count


@parallel.Kernel
def _attend_bf16(job: Any) -> None:
    _attend(job, np.uint16(0))


@parallel.Kernel
def _attend_f32(job: Any) -> None:
    _attend(job, np.float32(0))


_KERNELS = {torch.bfloat16: _attend_bf16, torch.float32: _attend_f32}


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As `reference.paged_attention`: q [T, A, D] over a plain cache → [T, A·D]."""
    tokens, heads, dim = q.shape
    kv_heads, block_size = cache.num_kv_heads, cache.block_size
    work = batch.work_items(MAX_ROWS // (heads // kv_heads), block_size, KEYS)
    out = q.new_empty((tokens, heads * dim))
    parallel.run(
        _KERNELS[q.dtype], len(work) * kv_heads, q, cache.k, cache.v, out, batch.block_table,
        batch.block_table.shape[1], work.first, work.shared, work.seq, work.begin, work.end, batch.query_start[1:],
        batch.cached_len, heads, kv_heads, dim, block_size, parallel.float_bits(scale),
    )  # fmt: skip
    return out


def fits(q: torch.Tensor, cache: LayerCache) -> bool:
    """True where `paged_attention` can take these on the CPU: dtype, head_dim in whole tiles, blocks of 4n tokens."""
    group = q.shape[1] // cache.num_kv_heads
    shapes = q.shape[2] % MIX_COLUMNS == 0 and cache.block_size % TILE_COLUMNS == 0 and group <= MAX_ROWS
    return not cache.packed and q.dtype in _KERNELS and q.device.type == "cpu" and shapes and q.is_contiguous()
