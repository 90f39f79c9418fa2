"""Block accounting of the two paged KV caches: who holds which block, and how many are left. No tensors here.

"full" blocks (NoPE layers) hold a sequence from its first token on. "chunked" blocks (rope layers) hold only the
attention chunk it is in, so a sequence never holds more than chunk_size / block_size of them.
Each sequence names its blocks in a table of its own; a block belongs to exactly one table. Sharing a prefix would
need a count per block in `BlockPool` and nothing else here.
"""

from __future__ import annotations

import numpy as np

from quant.memory import BlockNeed, ceil_div


class BlockPool:
    """Free list over block numbers 0 … num_blocks - 1; the lowest and the last freed go out first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks; asking for more than `num_free` is the caller's bug."""
        assert 0 <= count <= len(self._free), f"took {count} of {len(self._free)} free blocks"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._taken[block] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            assert self._taken[block], f"block {block} freed twice"
            self._taken[block] = 0
            self._free.append(block)


class BlockTable:
    """One sequence's blocks of one kind, in order, as an int32 array that doubles as it grows."""

    def __init__(self) -> None:
        self._ids = np.zeros(8, np.int32)
        self.length = 0

    @property
    def ids(self) -> np.ndarray:
        """int32 [length], a view."""
        return self._ids[: self.length]

    def extend(self, blocks: list[int]) -> None:
        end = self.length + len(blocks)
        if end > len(self._ids):
            grown = np.zeros(max(end, 2 * len(self._ids)), np.int32)
            grown[: self.length] = self.ids
            self._ids = grown
        self._ids[self.length : end] = blocks
        self.length = end

    def clear(self) -> list[int]:
        """Forget everything; returns the blocks that were held."""
        blocks = self.ids.tolist()
        self.length = 0
        return blocks


class SequenceBlocks:
    """What one sequence holds: its full blocks, its chunked blocks, and the position where its chunk starts."""

    def __init__(self) -> None:
        self.full = BlockTable()
        self.chunked = BlockTable()
        self.chunk_start = 0


class BlockManager:
    """Both pools of one engine. Lengths and positions are in tokens."""

    def __init__(self, num_full: int, num_chunked: int, block_size: int, chunk_size: int) -> None:
        assert chunk_size % block_size == 0, f"block size {block_size} does not divide the chunk {chunk_size}"
        self.full = BlockPool(num_full)
        self.chunked = BlockPool(num_chunked)
        self.block_size = block_size
        self.chunk_size = chunk_size

    def need(self, num_tokens: int) -> BlockNeed:
        """The most blocks that a sequence of `num_tokens` holds at any time of its life."""
        return BlockNeed(
            ceil_div(num_tokens, self.block_size), ceil_div(min(num_tokens, self.chunk_size), self.block_size)
        )

    def fits_alone(self, num_tokens: int) -> bool:
        need = self.need(num_tokens)
        return need.full <= self.full.num_blocks and need.chunked <= self.chunked.num_blocks

    def enter_chunk(self, held: SequenceBlocks, position: int) -> None:
        """The next token of this sequence is at `position`: free the blocks of a chunk it has left behind."""
        start = position - position % self.chunk_size
        if start != held.chunk_start:
            self.chunked.give_back(held.chunked.clear())
            held.chunk_start = start

    def room(self, held: SequenceBlocks, position: int) -> int:
        """How many tokens from `position` on fit into what is held plus what is free, within the chunk."""
        full_end = (held.full.length + self.full.num_free) * self.block_size
        chunk_end = (held.chunked.length + self.chunked.num_free) * self.block_size + held.chunk_start
        return min(full_end, chunk_end, held.chunk_start + self.chunk_size) - position

    def grow(self, held: SequenceBlocks, end: int) -> None:
        """Hold blocks for all positions before `end` (`room` said that they are there)."""
        full = ceil_div(end, self.block_size) - held.full.length
        if full > 0:
            held.full.extend(self.full.take(full))
        chunked = ceil_div(end - held.chunk_start, self.block_size) - held.chunked.length
        if chunked > 0:
            held.chunked.extend(self.chunked.take(chunked))

    def release(self, held: SequenceBlocks) -> None:
        self.full.give_back(held.full.clear())
        self.chunked.give_back(held.chunked.clear())
        held.chunk_start = 0
