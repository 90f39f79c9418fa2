"""Where the keys of one step's sequences lie, for one kind of layer, in the form that attention kernels take.

Legend: N blocks, B tokens per block, K kv heads, D head_dim, S sequences in the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from batch.kernels.sharing import Piece, Share, group_pieces

FP8_MAX = 448.0  # largest float8_e4m3fn


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values.

    Plain: k and v [N, B, K, D]. Packed: k [N, K, D/2, B, 2] and v [N, K, B/2, D, 2], so that a vector holds pairs of
    dims of 16 keys, or pairs of keys at 16 dims, which is what the CPU multiplies pairs of bfloat16 in.
    A plain one may be float8_e4m3fn: values as they are, cut off at ±448.
    """

    k: torch.Tensor
    v: torch.Tensor
    packed: bool = False

    @staticmethod
    def shapes(
        block_size: int, num_kv_heads: int, head_dim: int, packed: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one block's keys and values."""
        if packed:
            return (num_kv_heads, head_dim // 2, block_size, 2), (num_kv_heads, block_size // 2, head_dim, 2)
        return (block_size, num_kv_heads, head_dim), (block_size, num_kv_heads, head_dim)

    @property
    def block_size(self) -> int:
        return self.k.shape[3 if self.packed else 1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1 if self.packed else 2]

    @property
    def head_dim(self) -> int:
        return self.v.shape[3]

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [*shape of blocks, B, K, D] of int64 block ids, copied."""
        if self.k.dtype == torch.float8_e4m3fn:
            k, v = (held.view(torch.uint8)[blocks].view(held.dtype) for held in (self.k, self.v))
            return k, v
        k, v = self.k[blocks], self.v[blocks]
        if not self.packed:
            return k, v
        k = k.movedim(-2, -4).flatten(-2)  # [..., K, D/2, B, 2] → [..., B, K, D/2, 2] → [..., B, K, D]
        return k, v.movedim(-3, -4).movedim(-1, -3).flatten(-4, -3)  # → [..., B/2, 2, K, D] → [..., B, K, D]

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k and v [T, K, D] go to slots int64 [T] (block · B + offset)."""
        if self.k.dtype == torch.float8_e4m3fn:
            for mine, new in ((self.k, k), (self.v, v)):
                held = new.clamp(-FP8_MAX, FP8_MAX).to(mine.dtype).view(torch.uint8)
                mine.view(torch.uint8).flatten(0, 1)[slots] = held  # [N · B, K, D]
            return
        if not self.packed:
            self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots] = k, v  # [N · B, K, D]
            return
        block, offset = slots // self.block_size, slots % self.block_size
        self.k.movedim(3, 1)[block, offset] = k.unflatten(-1, (-1, 2))  # [N, B, K, D/2, 2]
        self.v.permute(0, 2, 4, 1, 3)[block, offset // 2, offset % 2] = v  # [N, B/2, 2, K, D]


@dataclass(frozen=True)
class WorkItems:
    """Work of CPU attention, the dearest items first; int32 tensors.

    Item i is the segments first[i]:first[i + 1]. A segment is the rows begin:end of q, which belong to sequence seq.
    The first shared[i] keys of all an item's segments are the same, and before all its queries.
    """

    first: torch.Tensor
    shared: torch.Tensor
    seq: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    def __len__(self) -> int:
        return len(self.shared)


@dataclass
class PagedBatch:
    """block_table int32 [S, max_blocks]; query_start int32 [S+1] (rows of q per sequence); cached_len int32 [S]: cached
    positions that sequence s's last query sees, counted from slot 0 of block_table[s, 0].
    max_query_len, max_context_len (largest cached_len, or more): plain ints.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    cached_len: torch.Tensor
    max_query_len: int
    max_context_len: int
    _ranges: list[tuple[int, int, int]] | None = field(default=None, repr=False)
    _items: dict[tuple[int, int, int], WorkItems] = field(default_factory=dict, repr=False)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(first row, end row, cached length) per sequence; read back from the device once per step."""
        if self._ranges is None:
            rows, cached = self.query_start.tolist(), self.cached_len.tolist()
            self._ranges = list(zip(rows, rows[1:], cached, strict=False))
        return iter(self._ranges)

    def work_items(self, size: int, block_size: int, tile: int) -> WorkItems:
        """All sequences' rows cut into items of at most `size` queries; sequences with fewer share items with others
        whose block tables begin alike, as far as that goes in whole tiles of `tile` keys."""
        key = (size, block_size, tile)
        if key not in self._items:
            self._items[key] = self._cut(*key)
        return self._items[key]

    def _cut(self, size: int, block_size: int, tile: int) -> WorkItems:
        short, shares = [], []
        for seq, (begin, end, context) in enumerate(self.ranges()):
            if 0 < end - begin < size:
                short.append(Piece(seq, begin, end, context))
                continue
            for row in range(begin, end, size):
                last = min(row + size, end)
                shares.append(Share([Piece(seq, row, last, context - (end - last))], 0))
        shares += group_pieces(short, self.block_table.numpy(), size, block_size, tile)
        shares.sort(key=lambda share: share.cost, reverse=True)
        firsts = [0]
        for share in shares:
            firsts.append(firsts[-1] + len(share.pieces))
        pieces = [(piece.seq, piece.begin, piece.end) for share in shares for piece in share.pieces]
        columns = torch.tensor(pieces, dtype=torch.int32).reshape(-1, 3).T.contiguous()
        first = torch.tensor(firsts, dtype=torch.int32)
        shared = torch.tensor([share.num_keys for share in shares], dtype=torch.int32)
        return WorkItems(first, shared, columns[0], columns[1], columns[2])
