"""Block accounting of the two paged KV caches: who holds which block, and how many are left. No tensors here.

"full" blocks (NoPE layers) hold a sequence from its first token on. "chunked" blocks (rope layers) hold only the
attention chunk it is in, so a sequence never holds more than chunk_size / block_size of them.
Each sequence names its blocks in a table of its own. Whole blocks that are computed get a key (see prefix.py) and may
then be in several tables; nobody writes to them any more. A block in no table stays findable by its key until it is
needed for something else.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from quant.memory import BlockNeed, ceil_div


class BlockPool:
    """Blocks 0 … num_blocks - 1, each with the number of its holders.

    Of blocks that nobody holds, those without a key go out first, the lowest and the last freed before the others;
    then those with a key ("idle"), the longest unused first, which lose it.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._holders = array("i", bytes(4 * num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, count: int) -> list[int]:
        """`count` blocks that nobody holds; asking for more than `num_free` is the caller's bug."""
        assert 0 <= count <= self.num_free, f"took {count} of {self.num_free} free blocks"
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """One holder more for blocks that have keys."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        """One holder less. The last block is idle for longest: a beginning is of more use than what follows it."""
        for block in reversed(blocks):
            assert self._holders[block], f"block {block} freed twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def find(self, keys: list[bytes]) -> list[int]:
        """The blocks of the first keys, up to one that is not there."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_held(self, blocks: list[int]) -> int:
        return sum(self._holders[block] > 0 for block in blocks)

    def publish(self, block: int, key: bytes) -> None:
        """From now on `block` is found by `key`, unless another one already is: then it stays its holder's own."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget(self, blocks: list[int]) -> None:
        """These blocks, which somebody holds, are not found any more."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self.forget([block])
        return block


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


@dataclass(frozen=True)
class PrefixHit:
    """The cached beginning of a sequence: all its full blocks, and the chunked ones from position `chunk_start` on,
    where the chunk of token `num_tokens` starts."""

    num_tokens: int
    chunk_start: int
    full: list[int]
    chunked: list[int]


NO_HIT = PrefixHit(0, 0, [], [])


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

    def lacking(self, held: SequenceBlocks, num_tokens: int) -> tuple[int, int]:
        """Blocks that are still to be taken (full, chunked) until a sequence holds the most that `num_tokens` need."""
        full = ceil_div(num_tokens, self.block_size) - held.full.length
        chunked = ceil_div(min(num_tokens, self.chunk_size), self.block_size) - held.chunked.length
        return max(full, 0), max(chunked, 0)

    def holds(self, held: SequenceBlocks, start: int, end: int) -> bool:
        """Whether positions start … end - 1 lie in blocks that are held already: so it is for most tokens drawn."""
        size, first = self.block_size, held.chunk_start
        return first <= start and end <= min(
            held.full.length * size, first + min(held.chunked.length * size, self.chunk_size)
        )

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

    def release(self, held: SequenceBlocks, keep: int | None = None) -> None:
        """Hold nothing any more. Of blocks with keys, those past the first `keep` tokens are not found again."""
        if keep is not None:
            first = keep // self.block_size
            self.full.forget(held.full.ids[first:].tolist())
            self.chunked.forget(held.chunked.ids[max(first - held.chunk_start // self.block_size, 0) :].tolist())
        self.full.give_back(held.full.clear())
        self.chunked.give_back(held.chunked.clear())
        held.chunk_start = 0

    # -- shared beginnings

    def find_prefix(self, keys: list[bytes], most: int) -> PrefixHit:
        """The longest cached beginning, in whole blocks, of at most `most` tokens.

        Rope layers need the blocks of its last chunk only; one that ends where a chunk does needs none of them.
        """
        full = self.full.find(keys[: most // self.block_size])
        first = len(full) - len(full) % (self.chunk_size // self.block_size)
        chunked = self.chunked.find(keys[first : len(full)])
        count = first + len(chunked)
        return PrefixHit(count * self.block_size, first * self.block_size, full[:count], chunked)

    def adopt(self, held: SequenceBlocks, hit: PrefixHit) -> None:
        """A sequence that holds nothing begins with these blocks."""
        self.full.share(hit.full)
        self.chunked.share(hit.chunked)
        held.full.extend(hit.full)
        held.chunked.extend(hit.chunked)
        held.chunk_start = hit.chunk_start

    def need_after(self, hit: PrefixHit, num_tokens: int) -> BlockNeed:
        """The most blocks that nobody else holds and that a sequence of `num_tokens` beginning with `hit` will hold
        at a time."""
        full = ceil_div(num_tokens, self.block_size) - self.full.count_held(hit.full)
        if num_tokens > hit.chunk_start + self.chunk_size:  # it goes on to chunks of its own
            return BlockNeed(full, self.need(num_tokens).chunked)
        chunked = ceil_div(num_tokens - hit.chunk_start, self.block_size)
        return BlockNeed(full, chunked - self.chunked.count_held(hit.chunked))

    def publish(self, held: SequenceBlocks, keys: list[bytes], start: int, end: int) -> None:
        """Tokens start … end - 1 of one chunk have been computed: the blocks that they complete can be shared."""
        before = held.chunk_start // self.block_size
        for i in range(start // self.block_size, end // self.block_size):
            self.full.publish(int(held.full.ids[i]), keys[i])
            self.chunked.publish(int(held.chunked.ids[i - before]), keys[i])
