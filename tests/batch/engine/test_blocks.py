"""Block accounting: pools conserve blocks, chunked blocks are bounded, memory is split as documented."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.engine.blocks import BlockManager, BlockPool, BlockTable, SequenceBlocks
from quant.memory import BlockNeed, split_memory


def test_pool_hands_out_each_block_once_and_takes_it_back():
    pool = BlockPool(4)
    first, second = pool.take(3), pool.take(1)
    assert sorted(first + second) == [0, 1, 2, 3] and pool.num_free == 0
    with pytest.raises(AssertionError):
        pool.take(1)
    pool.give_back(first)
    assert pool.num_free == 3 and pool.num_used == 1
    with pytest.raises(AssertionError):
        pool.give_back(first[:1])


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=30), max_size=8))
def test_block_table_is_a_growing_list(parts):
    table, expected = BlockTable(), []
    for part in parts:
        table.extend(part)
        expected += part
        assert np.array_equal(table.ids, expected)
    assert table.clear() == expected and table.length == 0


def test_chunked_blocks_of_a_sequence_stay_bounded_while_full_ones_grow():
    blocks = BlockManager(num_full=100, num_chunked=3, block_size=16, chunk_size=32)
    held = SequenceBlocks()
    for position in range(0, 1600):
        blocks.enter_chunk(held, position)
        assert blocks.room(held, position) > 0
        blocks.grow(held, position + 1)
        assert held.full.length == position // 16 + 1
        assert held.chunked.length == position % 32 // 16 + 1
        assert held.chunk_start == position // 32 * 32
    blocks.release(held)
    assert blocks.full.num_used == blocks.chunked.num_used == 0


def test_room_ends_at_the_chunk_and_at_the_free_blocks():
    blocks = BlockManager(num_full=5, num_chunked=9, block_size=8, chunk_size=32)
    held = SequenceBlocks()
    assert blocks.room(held, 0) == 32  # the chunk's end
    blocks.grow(held, 32)
    blocks.enter_chunk(held, 32)
    assert blocks.room(held, 32) == 8  # one full block is left
    other = SequenceBlocks()
    blocks.grow(other, 1)
    assert blocks.room(held, 32) == 0


def test_split_gives_equal_counts_until_chunked_blocks_cannot_be_used():
    most = BlockNeed(10**6, 2048)
    need = BlockNeed(1, 1)
    assert split_memory(4000, 1, 3, most, need) == BlockNeed(1000, 1000)
    # 2048 chunked blocks are enough for everyone: the rest is full blocks.
    assert split_memory(100_000, 1, 3, most, need) == BlockNeed(100_000 - 3 * 2048, 2048)


def test_split_shifts_towards_a_request_that_equal_counts_would_not_hold():
    most = BlockNeed(10**6, 2048)
    assert split_memory(4000, 1, 3, most, BlockNeed(2500, 100)) == BlockNeed(2500, 500)
    assert split_memory(4000, 1, 3, most, BlockNeed(3900, 100)) is None
    assert split_memory(3, 1, 3, most, BlockNeed(1, 1)) is None


@given(
    kv_bytes=st.integers(0, 10**6), full=st.integers(0, 50), chunked=st.integers(0, 50),
    most=st.builds(BlockNeed, st.integers(50, 10**4), st.integers(50, 10**4)),
    at_least=st.builds(BlockNeed, st.integers(1, 50), st.integers(1, 50)),
)  # fmt: skip
def test_split_never_exceeds_its_bytes_and_finds_a_split_where_there_is_one(kv_bytes, full, chunked, most, at_least):
    split = split_memory(kv_bytes, full, chunked, most, at_least) if full + chunked else most
    if split is None:
        assert at_least.full * full + at_least.chunked * chunked > kv_bytes
    elif full + chunked:
        assert split.full * full + split.chunked * chunked <= kv_bytes
        assert at_least.full <= split.full <= most.full and at_least.chunked <= split.chunked <= most.chunked
