"""Where the keys of one step's sequences lie, for one kind of layer, in the form that attention kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class QueryBlocks:
    """Work items of CPU attention: rows begin:end of q belong to sequence seq; int32 tensors of one length."""

    seq: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor


@dataclass
class PagedBatch:
    """Legend: S sequences in the step.

    block_table int32 [S, max_blocks]; query_start int32 [S+1] (rows of q per sequence); cached_len int32 [S]: cached
    positions that sequence s's last query sees, counted from slot 0 of block_table[s, 0].
    max_query_len, max_context_len (largest cached_len, or more): plain ints.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    cached_len: torch.Tensor
    max_query_len: int
    max_context_len: int
    _ranges: list[tuple[int, int, int]] | None = field(default=None, repr=False)
    _blocks: dict[int, QueryBlocks] = field(default_factory=dict, repr=False)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """(first row, end row, cached length) per sequence; read back from the device once per step."""
        if self._ranges is None:
            rows, cached = self.query_start.tolist(), self.cached_len.tolist()
            self._ranges = list(zip(rows, rows[1:], cached, strict=False))
        return iter(self._ranges)

    def query_blocks(self, size: int) -> QueryBlocks:
        """All sequences' rows cut into blocks of at most `size`, the longest contexts first."""
        if size not in self._blocks:
            cut = [
                (context, seq, row, min(row + size, end))
                for seq, (begin, end, context) in enumerate(self.ranges())
                for row in range(begin, end, size)
            ]
            cut.sort(reverse=True)
            columns = torch.tensor([item[1:] for item in cut], dtype=torch.int32).reshape(-1, 3).T.contiguous()
            self._blocks[size] = QueryBlocks(columns[0], columns[1], columns[2])
        return self._blocks[size]
