"""Paged attention over packed keys and values (`paging.LayerCache`): bfloat16 on CPUs with AVX512-BF16.

Online softmax over tiles of 128 keys counted from slot 0; weights are rounded to bfloat16, sums are float32.
Legend: T query rows, A heads, K kv heads, G = A / K, D head_dim, B tokens per block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.attention_tiles import (
    KEYS,
    LANES,
    LOWEST,
    MAX_TILE_ROWS,
    score_tile,
    softmax_full,
    softmax_part,
    value_tile,
)
from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.simd import bits_to_float, elements_at, jit, narrow, take_item
from batch.kernels.vector_ir import VECTOR_BYTES, has_avx512_bf16

MAX_ROWS = 60  # (queries · G) per work item
PAIR_BYTES = 4
_U16, _F32, _I32, _I64 = np.uint16(0), np.float32(0), np.int32(0), np.int64(0)
_LOWEST = np.float32(LOWEST)
_LOG2_E = 1.4426950408889634

_score_64, _score_32 = score_tile(4), score_tile(2)
_mix_64, _mix_32 = value_tile(4), value_tile(2)
_softmax_full, _softmax_part = softmax_full(), softmax_part()


class _Shape(NamedTuple):
    """What is the same for all items of a call; `factor` is scale · log₂ e."""

    heads: int
    kv_heads: int
    group: int
    dim: int
    block_size: int
    block_bytes: int  # of all heads
    factor: np.float32


class _Local(NamedTuple):
    """Addresses of one thread's scratch, for up to MAX_ROWS rows: bfloat16 queries [rows, D], float32 mixed [rows, D],
    sums [rows, 16] and best [rows]; for one register tile: float32 scores [6, KEYS], bfloat16 weights [6, KEYS],
    float32 shrink [6]; int64 addresses of vectors of keys and of runs of values, pairs in each run, and how far ahead
    of it lies what is needed next; one pair of values [D, 2]."""

    queries: int
    mixed: int
    sums: int
    best: int
    scores: int
    weights: int
    shrink: int
    keys: int
    runs: int
    pairs: int
    ahead: int
    odd: int


@jit
def _scratch(start: Any, dim: Any) -> Any:
    """Divides `scratch_bytes(dim)` bytes at `start`, every part on cache lines of its own."""
    mixed = start + MAX_ROWS * 2 * dim
    sums = mixed + MAX_ROWS * 4 * dim
    best = sums + MAX_ROWS * VECTOR_BYTES
    scores = best + 4 * VECTOR_BYTES
    weights = scores + MAX_TILE_ROWS * 4 * KEYS
    shrink = weights + MAX_TILE_ROWS * 2 * KEYS
    keys = shrink + VECTOR_BYTES
    runs = keys + 2 * VECTOR_BYTES
    pairs = runs + 2 * VECTOR_BYTES
    ahead = pairs + 2 * VECTOR_BYTES
    return _Local(start, mixed, sums, best, scores, weights, shrink, keys, runs, pairs, ahead, ahead + 2 * VECTOR_BYTES)


@jit
def _scratch_bytes(dim: Any) -> Any:
    return MAX_ROWS * (6 * dim + VECTOR_BYTES) + MAX_TILE_ROWS * 6 * KEYS + 13 * VECTOR_BYTES + 4 * dim


@jit
def _locate_keys(at: Any, shape: Any, keys: Any, table: Any, first: Any, count: Any) -> None:
    """Addresses of vectors of 16 keys from position `first` on, in twos; the last one twice where one is missing."""
    vectors = (count + LANES - 1) // LANES
    for n in range(vectors):
        block, offset = (first + n * LANES) // shape.block_size, (first + n * LANES) % shape.block_size
        at[n] = keys + np.int64(table[block]) * shape.block_bytes + offset * PAIR_BYTES
    if vectors % 2:
        at[vectors] = at[vectors - 1]


@jit
def _locate_values(
    local: Any, shape: Any, keys: Any, values: Any, table: Any, first: Any, count: Any, last: Any
) -> Any:
    """Runs of pairs of keys first … first + count, one a block, and where the keys of the next tile lie, below `last`;
    returns how many. The last of an odd number of keys is copied, with zeros for a partner: weight 0 times what lies
    in the cache there might be NaN."""
    at, pairs, runs, done = elements_at(local.runs, _I64), elements_at(local.pairs, _I64), 0, 0
    ahead = elements_at(local.ahead, _I64)
    while done < count:
        block, offset = (first + done) // shape.block_size, (first + done) % shape.block_size
        following = min(first + done + KEYS, last - 1) // shape.block_size
        start = values + np.int64(table[block]) * shape.block_bytes + offset * 2 * shape.dim
        take = min(count - done, shape.block_size - offset)
        if take > 1:
            at[runs], pairs[runs] = start, take // 2
            done += take // 2 * 2
        else:
            words, alone = elements_at(start, _I32), elements_at(local.odd, _I32)
            for d in range(shape.dim):
                alone[d] = words[d] & np.int32(0xFFFF)
            at[runs], pairs[runs] = local.odd, 1
            done += 1
        ahead[runs] = keys - values + (np.int64(table[following]) - np.int64(table[block])) * shape.block_bytes
        runs += 1
    return runs


@jit
def _softmax_rows(local: Any, row: Any, rows: Any, first_visible: Any, ahead: Any, group: Any, factor: Any) -> None:
    """Scores of `rows` local rows from `row` on become weights. The row `ahead` rows before sees first_visible of the
    tile's keys, and every G rows see one more."""
    for i in range(rows):
        visible = first_visible + (ahead + i) // group
        scores, weights = local.scores + i * 4 * KEYS, local.weights + i * 2 * KEYS
        best, sums, shrink = local.best + 4 * (row + i), local.sums + VECTOR_BYTES * (row + i), local.shrink + 4 * i
        if visible >= KEYS:
            _softmax_full(scores, weights, best, sums, shrink, factor)
        else:
            last = min(first_visible + (ahead + rows - 1) // group, KEYS)
            size = (last + 31) // 32 * 2 * VECTOR_BYTES
            _softmax_part(scores, weights, best, sums, shrink, factor, max(visible, 0), size)


@jit
def _attend_tile(
    local: Any, shape: Any, table: Any, keys: Any, values: Any, first: Any, count: Any, row: Any, rows: Any,
    first_visible: Any, ahead: Any, last: Any,
) -> None:  # fmt: skip
    """Local rows row … row + rows take in the keys first … first + count, seen as `_softmax_rows` says; `last`: the
    block table has the blocks of so many keys."""
    q_bytes, pair_bytes = 2 * shape.dim, PAIR_BYTES * shape.block_size
    _locate_keys(elements_at(local.keys, _I64), shape, keys, table, first, count)
    done, queries = 0, local.queries + row * q_bytes
    while count - done > 32:
        _score_64(rows, queries, local.keys + done // 2, pair_bytes, q_bytes, values - keys, local.scores + 4 * done)
        done += 64
    if done < count:
        _score_32(rows, queries, local.keys + done // 2, pair_bytes, q_bytes, values - keys, local.scores + 4 * done)
    _softmax_rows(local, row, rows, first_visible, ahead, shape.group, shape.factor)
    runs = _locate_values(local, shape, keys, values, table, first, count, last)
    value_bytes, done = PAIR_BYTES * shape.dim, 0
    at, pairs, out = local.runs, local.pairs, local.mixed + row * value_bytes
    while done + 64 <= shape.dim:
        _mix_64(rows, local.weights, at, pairs, runs, value_bytes, 4 * done, local.ahead, local.shrink, out)
        done += 64
    if done < shape.dim:
        _mix_32(rows, local.weights, at, pairs, runs, value_bytes, 4 * done, local.ahead, local.shrink, out)


@jit
def _attend_keys(
    local: Any, shape: Any, table: Any, keys: Any, values: Any, begin: Any, end: Any, row: Any, rows: Any, seen: Any
) -> None:
    """Local rows row … row + rows take in the keys begin (a multiple of KEYS) … end of one block table. The first G
    rows see the first `seen` keys, every G rows one more, but none sees past `end`."""
    for first in range(begin, end, KEYS):
        for ahead in range(0, rows, MAX_TILE_ROWS):
            part = min(MAX_TILE_ROWS, rows - ahead)
            count = min(seen + (ahead + part - 1) // shape.group, end) - first
            if count > 0:
                visible = min(seen, end) - first
                _attend_tile(
                    local, shape, table, keys, values, first, min(count, KEYS), row + ahead, part, visible, ahead, end
                )


@jit
def _gather_rows(local: Any, shape: Any, q: Any, begin: Any, end: Any, head: Any, row: Any) -> None:
    """Queries begin … end of a kv head's G heads, to local rows from `row` on."""
    queries = elements_at(local.queries, _I32)
    words = shape.dim // 2
    for token in range(begin, end):
        source = (token * shape.heads + head * shape.group) * words
        target = (row + (token - begin) * shape.group) * words
        for i in range(shape.group * words):
            queries[target + i] = q[source + i]


@jit
def _store_rows(local: Any, shape: Any, out: Any, begin: Any, end: Any, head: Any, row: Any) -> None:
    """What the local rows from `row` on have mixed, divided by the sums of their weights, to queries begin … end."""
    mixed, sums = elements_at(local.mixed, _F32), elements_at(local.sums, _F32)
    for token in range(begin, end):
        for g in range(shape.group):
            total = np.float32(0.0)
            for i in range(LANES):
                total += sums[row * LANES + i]
            factor = np.float32(1.0) / total
            target = (token * shape.heads + head * shape.group + g) * shape.dim
            for d in range(shape.dim):
                out[target + d] = narrow(mixed[row * shape.dim + d] * factor, _U16)
            row += 1


@jit
def _clear(local: Any, shape: Any, rows: Any) -> None:
    mixed, sums, best = elements_at(local.mixed, _F32), elements_at(local.sums, _F32), elements_at(local.best, _F32)
    for i in range(rows * shape.dim):
        mixed[i] = 0
    for i in range(rows * LANES):
        sums[i] = 0
    for i in range(rows):
        best[i] = _LOWEST


@parallel.Kernel
def _attend(job: Any) -> None:
    """Item = (work item, kv head). Arguments: see `paged_attention`."""
    args = elements_at(job, _I64)
    items, q, out = args[1], elements_at(args[2], _I32), elements_at(args[5], _U16)
    first, shared = elements_at(args[8], _I32), elements_at(args[9], _I32)
    seqs, begins, ends = elements_at(args[10], _I32), elements_at(args[11], _I32), elements_at(args[12], _I32)
    last_row, cached = elements_at(args[13], _I32), elements_at(args[14], _I32)
    heads, kv_heads, dim, block_size = args[15], args[16], args[17], args[18]
    head_bytes = 2 * block_size * dim
    factor = bits_to_float(np.int32(args[19]))
    shape = _Shape(heads, kv_heads, heads // kv_heads, dim, block_size, kv_heads * head_bytes, factor)
    raw = np.empty(_scratch_bytes(dim) + VECTOR_BYTES, np.uint8)
    local = _scratch((raw.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES, dim)
    while True:
        item = take_item(job)
        if item >= items:
            return
        work, head = item // kv_heads, item % kv_heads
        keys, values, common = args[3] + head * head_bytes, args[4] + head * head_bytes, np.int64(shared[work])
        rows = 0
        for s in range(first[work], first[work + 1]):
            _gather_rows(local, shape, q, begins[s], ends[s], head, rows)
            rows += (ends[s] - begins[s]) * shape.group
        _clear(local, shape, rows)
        if common > 0:  # all segments' rows together
            table = elements_at(args[6] + 4 * seqs[first[work]] * args[7], _I32)
            _attend_keys(local, shape, table, keys, values, 0, common, 0, rows, common)
        row = 0
        for s in range(first[work], first[work + 1]):
            seq, queries = seqs[s], ends[s] - begins[s]
            table = elements_at(args[6] + 4 * seq * args[7], _I32)
            seen = cached[seq] - (last_row[seq] - begins[s]) + 1  # positions that the segment's first query sees
            rows = queries * shape.group
            _attend_keys(local, shape, table, keys, values, common, seen + queries - 1, row, rows, seen)
            _store_rows(local, shape, out, begins[s], ends[s], head, row)
            row += rows


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As `reference.paged_attention`: q [T, A, D] over a packed cache → [T, A·D]."""
    tokens, heads, dim = q.shape
    group, block_size = heads // cache.num_kv_heads, cache.block_size
    work = batch.work_items(queries_per_item(group), block_size, KEYS)
    out = q.new_empty((tokens, heads * dim))
    parallel.run(
        _attend, len(work) * cache.num_kv_heads, q, cache.k, cache.v, out, batch.block_table,
        batch.block_table.shape[1], work.first, work.shared, work.seq, work.begin, work.end, batch.query_start[1:],
        batch.cached_len, heads, cache.num_kv_heads, dim, block_size, parallel.float_bits(scale * _LOG2_E),
    )  # fmt: skip
    return out


def queries_per_item(group: int) -> int:
    """As many queries as MAX_ROWS rows hold; where possible so many that their rows fill whole register tiles."""
    most = MAX_ROWS // group
    return next((n for n in range(most, 0, -1) if n * group % MAX_TILE_ROWS == 0), most)


def packs(dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
    """True where this CPU is best served by packed caches, and these shapes are whole vectors."""
    return dtype == torch.bfloat16 and has_avx512_bf16() and block_size % LANES == 0 and head_dim % 32 == 0


def fits(q: torch.Tensor, cache: LayerCache) -> bool:
    """True where `paged_attention` can take these on the CPU."""
    whole = q.shape[1] // cache.num_kv_heads <= MAX_ROWS and q.is_contiguous()
    return cache.packed and q.dtype == torch.bfloat16 and q.device.type == "cpu" and whole
