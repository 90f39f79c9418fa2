"""Rows for the grouped products: sorted by expert, and in the form that a kind of weight is multiplied with.

Legend: T tokens, R rows, N out features, K in features, G group size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from batch.kernels.triton_banks import DENSE, FP8, FP8_TOKENS, INT4, Bank
from batch.kernels.triton_support import ceil_div, is_interpreted, power_of_two

MAX_EXPERTS = 256
MOST_ROWS, MOST_FLOAT32_ROWS = 128, 16  # of one tile


@triton.jit
def _dispatch(
    logits: tl.tensor, score: tl.tensor, order: tl.tensor, tiles: tl.tensor, num_tokens: tl.tensor,
    num_tiles: tl.tensor,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """One program. EXPERTS: a power of two; CHUNK tokens at a time."""
    e = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_tokens, CHUNK):
        chosen = _choose(logits, score, first, num_tokens, NUM_EXPERTS, EXPERTS, CHUNK, True)
        counts += tl.sum(chosen, 0)
    ends = tl.cumsum(counts, 0)
    following = ends - counts  # where the next token of each expert goes
    for first in range(0, num_tokens, CHUNK):
        chosen = _choose(logits, score, first, num_tokens, NUM_EXPERTS, EXPERTS, CHUNK, False)
        place = tl.sum(chosen * (following[None, :] + tl.cumsum(chosen, 0) - 1), 1)
        token = first + tl.arange(0, CHUNK)
        tl.store(order + place, token, mask=token < num_tokens)
        following += tl.sum(chosen, 0)
    count_tiles = (counts + ROWS - 1) // ROWS
    last_tile = tl.cumsum(count_tiles, 0)
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        mine = (tile[:, None] >= (last_tile - count_tiles)[None, :]) & (tile[:, None] < last_tile[None, :])
        within = tile[:, None] - (last_tile - count_tiles)[None, :]
        row = tl.sum(tl.where(mine, (ends - counts)[None, :] + within * ROWS, 0), 1)
        there = tile < num_tiles
        tl.store(tiles + tile, tl.sum(tl.where(mine, e[None, :] + 1, 0), 1) - 1, mask=there)
        tl.store(tiles + num_tiles + tile, row, mask=there)
        tl.store(tiles + 2 * num_tiles + tile, tl.sum(tl.where(mine, ends[None, :], 0), 1), mask=there)


@triton.jit
def _choose(
    logits: tl.tensor, score: tl.tensor, first: tl.tensor, num_tokens: tl.tensor,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, STORE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """int32 [CHUNK, EXPERTS]: 1 where a token chose an expert."""
    token, e = first + tl.arange(0, CHUNK), tl.arange(0, EXPERTS)
    there = token < num_tokens
    inside = there[:, None] & (e < NUM_EXPERTS)[None, :]
    values = tl.load(logits + token[:, None] * NUM_EXPERTS + e[None, :], mask=inside, other=0.0).to(tl.float32)
    values = tl.where((e < NUM_EXPERTS)[None, :], values, float("-inf"))
    if STORE:
        best = 1 / (1 + tl.exp(-tl.max(values, 1)))
        tl.store(score + token, best.to(score.dtype.element_ty), mask=there)
    chosen = tl.minimum(tl.argmax(values, 1), NUM_EXPERTS - 1)  # where all is NaN, any might come out
    return ((e[None, :] == chosen[:, None]) & there[:, None]).to(tl.int32)


@dataclass(frozen=True)
class Tiles:
    """`count` tiles of `rows` rows. table int32 [3, count]: each tile's expert (-1: none), first row, and the row at
    which its expert ends; None: there is one expert, for all rows."""

    table: torch.Tensor | None
    rows: int
    count: int


def rows_per_tile(rows: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of one tile: twice what an expert gets on average, so that most need one tile only. A device does
    products in float32 without tensor cores, from registers: more than a few rows would be spilled, by gigabytes over a
    whole card."""
    most = MOST_FLOAT32_ROWS if dtype == torch.float32 and not is_interpreted() else MOST_ROWS
    return min(max(power_of_two(2 * ceil_div(rows, experts)), 16), most)


def dispatch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Tiles]:
    """logits [T, E] → (score [T] = sigmoid of the best, order int32 [T] by expert and stable, tiles)."""
    tokens, experts = logits.shape
    assert experts <= MAX_EXPERTS
    rows = rows_per_tile(tokens, experts, logits.dtype)
    active = min(experts, tokens)
    num_tiles = (tokens - active) // rows + active
    score = torch.empty(tokens, dtype=logits.dtype, device=logits.device)
    order = torch.empty(tokens, dtype=torch.int32, device=logits.device)
    table = torch.empty((3, num_tiles), dtype=torch.int32, device=logits.device)
    chunk = min(max(power_of_two(tokens), 16), 128)
    _dispatch[(1,)](
        logits.contiguous(), score, order, table, tokens, num_tiles,
        NUM_EXPERTS=experts, EXPERTS=max(power_of_two(experts), 2), CHUNK=chunk, ROWS=rows, TILES=64, num_warps=8,
    )  # fmt: skip
    return score, order, Tiles(table, rows, num_tiles)


def one_expert(rows: int, dtype: torch.dtype) -> Tiles:
    """All rows, of `dtype`, to the only expert."""
    size = rows_per_tile(rows, 2, dtype)
    return Tiles(None, size, ceil_div(rows, size))


@triton.jit
def _prepare(
    x: tl.tensor, order: tl.tensor, score: tl.tensor, out: tl.tensor, extra: tl.tensor,
    K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, ROUTED: tl.constexpr,
) -> None:  # fmt: skip
    """One row. extra: bfloat16 [R, 3, BLOCK/G], three parts of -136 · the sum of each group, which make a float32
    (INT4); float32 [R], the scale, where 448 is the largest e4m3 (FP8_TOKENS)."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if ROUTED:
        source = tl.load(order + row).to(tl.int64)
    place = tl.arange(0, BLOCK)
    k = place
    if KIND == 1:
        within = place % GROUP
        k = place - within + within // 2 % (GROUP // 8) * 8 + within // (GROUP // 4) + within % 2 * 4
    values = tl.load(x + source * K + k, mask=place < K, other=0.0)
    if ROUTED:
        values = (values.to(tl.float32) * tl.load(score + source).to(tl.float32)).to(x.dtype.element_ty)
    if KIND == 3:
        wide = values.to(tl.float32)
        scale = tl.max(tl.abs(wide), 0) / 448.0
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(extra + row, scale)
        wide = tl.clamp(wide / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + row * K + place, wide.to(tl.float8e4nv), mask=place < K)
    else:
        tl.store(out + row * K + place, values, mask=place < K)
    if KIND == 1:
        rest = -136.0 * tl.sum(tl.reshape(values.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
        for third in tl.static_range(3):
            part = rest.to(tl.bfloat16)
            tl.store(extra + (row * 3 + third) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP), part)
            rest -= part.to(tl.float32)


@dataclass(frozen=True)
class Prepared:
    """Rows [R, K] as a product of one kind of weight takes them, and what goes with them (see `_prepare`)."""

    rows: torch.Tensor
    extra: torch.Tensor
    dtype: torch.dtype  # of the result


def prepare(
    x: torch.Tensor, bank: Bank, order: torch.Tensor | None = None, score: torch.Tensor | None = None
) -> Prepared:
    """x [R, K] for products with `bank`; with `order` int32 [R] and score [R]: row i is x[order[i]] · score[order[i]],
    rounded to x's dtype."""
    x, form = x.contiguous(), bank.form
    rows, columns = x.shape
    routed = order is not None
    if form.kind in (DENSE, FP8) and not routed:
        return Prepared(x, x, x.dtype)
    out, extra = torch.empty_like(x), x
    if form.kind == INT4:
        extra = torch.empty((rows, 3, form.num_sums), dtype=torch.bfloat16, device=x.device)
    elif form.kind == FP8_TOKENS:
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        extra = torch.empty(rows, dtype=torch.float32, device=x.device)
    _prepare[(rows,)](
        x, order if routed else x, score if routed else x, out, extra,
        K=columns, BLOCK=form.num_sums * form.group_size, GROUP=form.group_size, KIND=form.kind,
        ROUTED=routed, num_warps=8 if columns > 2048 else 4,
    )  # fmt: skip
    return Prepared(out, extra, x.dtype)
