"""Packed KV caches and shared beginnings: attention against reference.py, and each query's bits against it alone."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch.kernels import cpu, cpu_attention, cpu_fused, cpu_packed_attention, ops, reference
from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.sharing import Piece, group_pieces
from batch.kernels.vector_ir import has_avx512_bf16

needs_bf16 = pytest.mark.skipif(not has_avx512_bf16(), reason="packed caches are for CPUs with AVX512-BF16")
HEADS = [(4, 4, 64, 16), (16, 4, 64, 32), (10, 2, 32, 16), (40, 8, 128, 32), (8, 1, 96, 16), (64, 1, 32, 16)]
RAGGED = [(1, 1), (1, 2), (1, 33), (1, 129), (1, 200), (1, 331)]
PREFILL = [(1, 40), (7, 7), (65, 90), (33, 64), (200, 301), (3, 259)]
SHARED = [(1, 700)] * 9 + [(1, 701), (3, 650), (100, 640), (1, 513)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def doubled(cache):
    return LayerCache(cache.k.double(), cache.v.double(), cache.packed)


def paged(sequences, kv_heads, dim, block_size, dtype, packed, shared=0):
    """(cache, batch) for (queries, context) pairs, blocks scattered, the first `shared` blocks of all the same; what is
    not one of a sequence's keys is NaN."""
    width = -(-max(context for _, context in sequences) // block_size)
    num_blocks = width * len(sequences)
    shapes = LayerCache.shapes(block_size, kv_heads, dim, packed)
    cache = LayerCache(*(torch.full((num_blocks, *shape), torch.nan, dtype=dtype) for shape in shapes), packed)
    table = torch.randperm(num_blocks).reshape(len(sequences), width).int()
    table[:, :shared] = table[0, :shared]
    for row, (_, context) in zip(table.long(), sequences, strict=True):
        position = torch.arange(context)
        slots = row[position // block_size] * block_size + position % block_size
        cache.write(slots, *(torch.randn(context, kv_heads, dim).to(dtype) for _ in "kv"))
    starts = torch.tensor([0] + [queries for queries, _ in sequences]).cumsum(0).int()
    contexts = torch.tensor([context for _, context in sequences]).int()
    longest = max(queries for queries, _ in sequences), int(contexts.max())
    return cache, PagedBatch(table, starts, contexts, *longest)


def each_alone(kernels, q, cache, batch, scale):
    """The same with every sequence in a step of its own."""
    out = []
    for seq, (begin, end, context) in enumerate(batch.ranges()):
        starts, contexts = torch.tensor([0, end - begin]).int(), torch.tensor([context]).int()
        alone = PagedBatch(batch.block_table[seq : seq + 1].clone(), starts, contexts, end - begin, context)
        out.append(kernels.paged_attention(q[begin:end].contiguous(), cache, alone, scale))
    return torch.cat(out)


@needs_bf16
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), HEADS)
@pytest.mark.parametrize("sequences", [RAGGED, PREFILL])
def test_packed_attention(heads, kv_heads, dim, block_size, sequences):
    cache, batch = paged(sequences, kv_heads, dim, block_size, torch.bfloat16, packed=True)
    q = torch.randn(int(batch.query_start[-1]), heads, dim).bfloat16()
    exact = reference.paged_attention(q.double(), doubled(cache), batch, dim**-0.5)
    assert exact.isfinite().all()
    got = cpu.paged_attention(q, cache, batch, dim**-0.5)
    assert error(got, exact) < 4e-3
    assert cpu_packed_attention.fits(q, cache) == (heads // kv_heads <= cpu_packed_attention.MAX_ROWS)


@needs_bf16
def test_packed_attention_survives_extreme_scores():
    cache, batch = paged([(1, 300), (40, 40)], 2, 64, 16, torch.bfloat16, packed=True)
    q = (torch.randn(41, 4, 64) * 1e4).bfloat16()
    exact = reference.paged_attention(q.double(), doubled(cache), batch, 1.0)
    assert error(cpu_packed_attention.paged_attention(q, cache, batch, 1.0), exact) < 4e-3


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_bf16)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), HEADS[:4])
@pytest.mark.parametrize("shared", [1, 16, 32])
def test_a_shared_beginning_changes_no_bit(packed, heads, kv_heads, dim, block_size, shared):
    dtype = torch.bfloat16 if packed else torch.float32
    kernels = cpu_packed_attention if packed else cpu_attention
    shared = min(shared, 512 // block_size)
    cache, batch = paged(SHARED, kv_heads, dim, block_size, dtype, packed, shared)
    q = torch.randn(int(batch.query_start[-1]), heads, dim).to(dtype)
    got = kernels.paged_attention(q, cache, batch, dim**-0.5)
    assert torch.equal(got, each_alone(kernels, q, cache, batch, dim**-0.5))
    exact = reference.paged_attention(q.double(), doubled(cache), batch, dim**-0.5)
    assert error(got, exact) < (4e-3 if packed else 1e-6)
    (work,) = batch._items.values()
    tile = cpu_packed_attention.KEYS if packed else cpu_attention.KEYS
    assert work.shared.max() == shared * block_size // tile * tile


@pytest.mark.parametrize("packed", [False, True])
def test_caches_give_back_what_was_written(packed):
    shapes = LayerCache.shapes(16, 3, 32, packed)
    cache = LayerCache(*(torch.zeros(5, *shape) for shape in shapes), packed)
    assert (cache.block_size, cache.num_kv_heads, cache.head_dim) == (16, 3, 32)
    slots, k, v = torch.randperm(80)[:50], torch.randn(50, 3, 32), torch.randn(50, 3, 32)
    cache.write(slots, k, v)
    for got, written in zip(cache.read(torch.arange(5)), (k, v), strict=True):
        assert got.shape == (5, 16, 3, 32)
        assert torch.equal(got.flatten(0, 1)[slots], written) and got.count_nonzero() == written.count_nonzero()


@needs_bf16
@pytest.mark.parametrize("kind", ["rope", "nope"])
def test_store_qkv_packed(kind):
    tokens, heads, kv_heads, dim = 77, 6, 2, 32
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).bfloat16()
    angle = torch.rand(tokens, dim // 2) * 6
    rotation, eps = ((angle.cos(), angle.sin()), 1e-5) if kind == "rope" else (None, None)
    slots = torch.cat([torch.arange(5, 60), torch.randperm(40)[:22] + 90])  # a prefill, from an odd slot, and others
    caches = [
        LayerCache(*(torch.zeros(9, *s, dtype=torch.bfloat16) for s in LayerCache.shapes(16, 2, dim, packed)), packed)
        for packed in (False, True)
    ]
    q = [cpu_fused.store_qkv(qkv, heads, cache, slots, rotation, eps, None) for cache in caches]
    assert torch.equal(q[0], q[1])
    plain, packed = (cache.read(torch.arange(9)) for cache in caches)
    assert torch.equal(plain[0], packed[0]) and torch.equal(plain[1], packed[1])


@needs_bf16
def test_caches_are_packed_where_kernels_gain_by_it():
    cpu_device = torch.device("cpu")
    assert ops.packs_cache(cpu_device, torch.bfloat16, 16, 64)
    assert not ops.packs_cache(cpu_device, torch.float32, 16, 64)
    assert not ops.packs_cache(cpu_device, torch.float16, 16, 64)
    assert not ops.packs_cache(cpu_device, torch.bfloat16, 8, 64) and not ops.packs_cache(
        cpu_device, torch.bfloat16, 16, 40
    )
    assert not ops.packs_cache(torch.device("cuda"), torch.bfloat16, 16, 64)
    with ops.reference_only():
        assert not ops.packs_cache(cpu_device, torch.bfloat16, 16, 64)


@given(st.integers(0, 2**32), st.integers(2, 12), st.sampled_from([(4, 16), (16, 32), (12, 32), (16, 128)]))
def test_who_shares_what(seed, size, sizes):
    block_size, tile = sizes
    rng = random.Random(seed)
    families = [[rng.randrange(1000) for _ in range(40)] for _ in range(3)]
    pieces, rows = [], []
    for seq in range(rng.randrange(1, 30)):
        queries = rng.randrange(1, size)
        context = rng.randrange(queries, 40 * block_size)
        common = rng.randrange(0, 40)
        rows.append(rng.choice(families)[:common] + [rng.randrange(1000, 10**6) for _ in range(40 - common)])
        pieces.append(Piece(seq, 10 * seq, 10 * seq + queries, context))
    shares = group_pieces(pieces, torch.tensor(rows, dtype=torch.int32).numpy(), size, block_size, tile)
    assert sorted(piece for share in shares for piece in share.pieces) == pieces
    for share in shares:
        assert sum(piece.end - piece.begin for piece in share.pieces) <= size
        assert share.num_keys % tile == 0 and (share.num_keys > 0) == (len(share.pieces) > 1)
        blocks = -(-share.num_keys // block_size)
        for piece in share.pieces:
            assert rows[piece.seq][:blocks] == rows[share.pieces[0].seq][:blocks]
            assert share.num_keys <= piece.context - (piece.end - piece.begin) + 1
