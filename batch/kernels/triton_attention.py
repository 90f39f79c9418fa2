"""Attention over a paged cache: prefill, also behind a cached beginning, and decoding with keys divided among programs.

A tile of queries holds all heads of one kv head's group: row r is query r // G, head r % G. Keys come from the block
table; how far back they go (attention chunks) is in the table and the lengths already: a query at place p of its
table's keys sees the keys 0 … p. Sequences are found on the device: a tile of queries looks for its own in query_start.
Sequences with one query are left to `_decode` in every step: alone in a tile they would keep one multiprocessor for as
long as their text is.

Legend: T tokens, A heads, K kv heads, G = A / K, D head_dim, S sequences, B tokens per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.triton_support import MULTIPROCESSORS, dot, is_wide, knows_fp8, power_of_two

LOG2_E = 1.4426950408889634
KEYS = 64  # of one tile
PROGRAMS = 8 * MULTIPROCESSORS  # for which a decoding step's keys are divided
FEWEST_SPLITS, MOST_SPLITS = 4, 64


@triton.jit
def _attend(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, blocks: tl.tensor, last: tl.tensor, first: tl.tensor, end: tl.tensor,
    whole: tl.tensor, kv_head: tl.tensor, kv_heads: tl.tensor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """q [ROWS, D], scaled to powers of two; row r sees the keys first … last[r]; those before `whole` every row sees.
    → sum of weights · values [ROWS, D], largest score and sum of weights [ROWS], all float32."""
    total = tl.zeros((ROWS, D), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    d = tl.arange(0, D)
    for begin in tl.range(first, end, KEYS, num_stages=STAGES):
        place = begin + tl.arange(0, KEYS)
        there = place < end
        block = tl.load(blocks + place // B, mask=there, other=0).to(tl.int64)
        where = ((block * B + place % B) * kv_heads + kv_head) * D
        keys = tl.load(k + where[None, :] + d[:, None], mask=there[None, :], other=0.0).to(q.dtype)  # [D, KEYS]
        scores = dot(q, keys, tl.zeros((ROWS, KEYS), tl.float32), WIDE)
        if begin + KEYS > whole:
            scores = tl.where(place[None, :] <= last[:, None], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        factor = tl.exp2(largest - base)
        parts = tl.exp2(scores - base[:, None])
        weights = weights * factor + tl.sum(parts, 1)
        values = tl.load(v + where[:, None] + d[None, :], mask=there[:, None], other=0.0).to(q.dtype)  # [KEYS, D]
        total = dot(parts.to(q.dtype), values, total * factor[:, None], WIDE)
        largest = higher
    return total, largest, weights


@triton.jit
def _load_queries(
    q: tl.tensor, token: tl.tensor, head: tl.tensor, there: tl.tensor, heads: tl.tensor, scale: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows [ROWS, D] of q, times a scale that makes powers of two of e's."""
    where = (token.to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    values = tl.load(q + where, mask=there[:, None], other=0.0).to(tl.float32) * scale
    return values.to(q.dtype.element_ty)


@triton.jit
def _prefill(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, table: tl.tensor, query_start: tl.tensor,
    cached_len: tl.tensor, num_seqs: tl.tensor, table_width: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries of one sequence that has several, one kv head. Tiles of sequence s begin at
    query_start[s] // queries + s."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    low, high = 0, num_seqs  # the sequence is the last whose tiles begin at this one or before
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    begin, end = tl.load(query_start + seq), tl.load(query_start + seq + 1)
    first = (tile - (begin // QUERIES + seq)) * QUERIES
    if (begin + first >= end) | (end - begin == 1):
        return
    row = tl.arange(0, ROWS)
    query = first + row // GROUP
    there = (row < QUERIES * GROUP) & (begin + query < end)
    context = tl.load(cached_len + seq)
    before = context - (end - begin)  # keys ahead of the first query
    head = kv_head * GROUP + row % GROUP
    rows = _load_queries(q, begin + query, head, there, heads, scale, D)
    total, _, weights = _attend(
        rows, k, v, table + seq * table_width, before + query, 0,
        min(before + first + QUERIES, context), before + first + 1, kv_head, kv_heads, ROWS, KEYS, D, B, STAGES, WIDE,
    )  # fmt: skip
    where = ((begin + query).to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + where, (total / weights[:, None]).to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _decode(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, partial: tl.tensor, table: tl.tensor, query_start: tl.tensor,
    cached_len: tl.tensor, table_width: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, scale: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """One sequence's only query, one kv head, one part of its keys → partial float32 [S, A, SPLITS, D + 2]."""
    seq, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) - query != 1:
        return
    context = tl.load(cached_len + seq)
    share = tl.cdiv(tl.cdiv(context, SPLITS), KEYS) * KEYS
    first, end = split * share, min(split * share + share, context)
    row = tl.arange(0, ROWS)
    head, there = kv_head * GROUP + row, row < GROUP
    rows = _load_queries(q, query + row * 0, head, there, heads, scale, D)
    total, largest, weights = _attend(
        rows, k, v, table + seq.to(tl.int64) * table_width, row * 0 + (context - 1), first, end, end,
        kv_head, kv_heads, ROWS, KEYS, D, B, STAGES, WIDE,
    )  # fmt: skip
    base = partial + ((seq.to(tl.int64) * heads + head) * SPLITS + split) * (D + 2)
    tl.store(base[:, None] + tl.arange(0, D)[None, :], total, mask=there[:, None])
    tl.store(base + D, largest, mask=there)
    tl.store(base + D + 1, weights, mask=there)


@triton.jit
def _join(
    partial: tl.tensor, out: tl.tensor, query_start: tl.tensor, heads: tl.tensor, D: tl.constexpr, SPLITS: tl.constexpr
) -> None:
    """One head of a sequence with one query: its parts → out [T, A, D]. A sequence without keys (what fills up a batch)
    gets 0."""
    seq, head = tl.program_id(0), tl.program_id(1)
    query = tl.load(query_start + seq)
    if tl.load(query_start + seq + 1) - query != 1:
        return
    base = partial + ((seq.to(tl.int64) * heads + head) * SPLITS + tl.arange(0, SPLITS)) * (D + 2)
    d = tl.arange(0, D)
    largest = tl.load(base + D)
    top = tl.max(largest, 0)
    factor = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    weights = tl.sum(factor * tl.load(base + D + 1), 0)
    total = tl.sum(tl.load(base[:, None] + d[None, :]) * factor[:, None], 0)
    where = (query.to(tl.int64) * heads + head) * D + d
    tl.store(out + where, (total / tl.where(weights == 0, 1.0, weights)).to(out.dtype.element_ty))


def fits(q: torch.Tensor, cache: LayerCache) -> bool:
    """Heads in tiles of a power of two dims; keys and values of q's dtype or e4m3, in a cache that is not packed."""
    known = cache.k.dtype == q.dtype or (cache.k.dtype == torch.float8_e4m3fn and knows_fp8(cache.k.device))
    return not cache.packed and q.shape[2] in (16, 32, 64, 128, 256) and known


def splits_for(sequences: int, kv_heads: int) -> int:
    """Programs per sequence and kv head. It depends on nothing that changes between steps of one batch size, so that a
    captured step stays right."""
    wanted = PROGRAMS // max(sequences * kv_heads, 1)
    return min(max(power_of_two(wanted + 1) // 2, FEWEST_SPLITS), MOST_SPLITS)


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As `reference.paged_attention`."""
    q = q.contiguous()
    tokens, heads, dim = q.shape
    group, seqs, wide = heads // cache.num_kv_heads, batch.cached_len.shape[0], is_wide(q)
    out, factor = torch.empty_like(q), scale * LOG2_E
    shared = {"GROUP": group, "KEYS": KEYS, "D": dim, "B": cache.block_size, "WIDE": wide}
    table, where = batch.block_table, (batch.query_start, batch.cached_len)
    lengths = (table.stride(0), heads, cache.num_kv_heads, factor)
    if batch.max_query_len == 1 or seqs > 1:
        splits = splits_for(seqs, cache.num_kv_heads)
        partial = torch.empty((seqs, heads, splits, dim + 2), dtype=torch.float32, device=q.device)
        _decode[(seqs, cache.num_kv_heads, splits)](
            q, cache.k, cache.v, partial, table, *where, *lengths, ROWS=max(power_of_two(group), 16), SPLITS=splits,
            STAGES=1 if wide else 3, num_warps=4, **shared,
        )  # fmt: skip
        _join[(seqs, heads)](partial, out, batch.query_start, heads, D=dim, SPLITS=splits, num_warps=4)
    if batch.max_query_len > 1:
        rows = max(128 if batch.max_query_len * group > 64 else 64, power_of_two(group))
        tiles = tokens // (rows // group) + seqs
        _prefill[(tiles, cache.num_kv_heads)](
            q, cache.k, cache.v, out, table, *where, seqs, *lengths, ROWS=rows, STAGES=1 if wide else 3,
            num_warps=rows // 16, **shared,
        )  # fmt: skip
    return out.flatten(1)  # [T, A·D]
