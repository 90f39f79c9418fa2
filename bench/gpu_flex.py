"""torch's FlexAttention over keys in pages, as it wants them: pages of 128 tokens in one row of memory, and for each
tile of queries the pages that it sees, those that need no mask apart.

Legend: S sequences, Q queries and C keys of each, A heads, K kv heads, D head_dim, N pages of P tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

PAGE, TILE = 128, 128  # tokens of a page, queries of a tile


def paged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, scale: float, page: int = PAGE, tile: int = TILE
) -> Callable[[], torch.Tensor]:
    """q [S, Q, A, D] on k and v [S, C, K, D], the last query at the last of `keys` = C → what computes [S · Q, A · D].
    The pages lie in random order."""
    seqs, queries = q.shape[:2]
    device, each = q.device, -(-keys // page)
    places = torch.randperm(seqs * each, device=device).view(seqs, each)  # page of each sequence's each-th tokens
    stored = [_stored(values, places, page) for values in (k, v)]
    logical = torch.full((seqs, seqs * each), -1, device=device)
    logical.scatter_(1, places, torch.arange(each, device=device).expand(seqs, -1))
    before = keys - queries

    def sees(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        number = logical[b, place // page]
        return (number >= 0) & (number * page + place % page <= before + row)

    mask = _mask(places, sees, queries, before, page, tile)
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    rows = q.transpose(1, 2).contiguous()  # [S, A, Q, D]

    def compute() -> torch.Tensor:
        out = run(rows, *stored, block_mask=mask, scale=scale, enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return compute


def _stored(values: torch.Tensor, places: torch.Tensor, page: int) -> torch.Tensor:
    """[S, C, K, D] → [1, K, N · P, D] with each page at its place; what fills up the last ones is 0."""
    seqs, keys, heads, dim = values.shape
    each = places.shape[1]
    whole = values.new_zeros(seqs, each * page, heads, dim)
    whole[:, :keys] = values
    out = torch.empty_like(whole).view(seqs * each, page, heads, dim)
    out[places.flatten()] = whole.view(seqs * each, page, heads, dim)
    return out.permute(2, 0, 1, 3).reshape(1, heads, -1, dim)


def _mask(
    places: torch.Tensor, sees: Callable[..., torch.Tensor], queries: int, before: int, page: int, tile: int
) -> BlockMask:
    """Which pages a tile of queries sees, in part or wholly."""
    seqs, each = places.shape
    first = tile * torch.arange(-(-queries // tile), device=places.device)  # of each tile
    last = (first + tile).clamp(max=queries) - 1
    seen = (before + last) // page + 1  # pages of which the tile sees anything
    whole = (before + first + 1) // page  # of which its first query sees all
    shape = (seqs, 1, len(first))
    order = torch.zeros((*shape, seqs * each), dtype=torch.int32, device=places.device)
    order[..., :each] = places[:, None, None]
    partial = torch.zeros_like(order)
    for number in range(len(first)):
        some = places[:, int(whole[number]) : int(seen[number])]
        partial[:, 0, number, : some.shape[1]] = some
    return BlockMask.from_kv_blocks(
        (seen - whole).int().expand(shape).contiguous(), partial, whole.int().expand(shape).contiguous(), order,
        BLOCK_SIZE=(tile, page), mask_mod=sees, seq_lengths=(queries, seqs * each * page), compute_q_blocks=False,
    )  # fmt: skip
