"""Paged attention against reference.py: chunked prefill behind a cached beginning, decoding, groups of heads."""

import pytest
import torch

from batch.kernels import reference
from batch.kernels.paging import LayerCache, PagedBatch

pytest.importorskip("triton")
from batch.kernels import triton_attention

DTYPES = [torch.float32, torch.bfloat16]
MOST = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
HEADS = [(4, 2, 64), (10, 2, 128), (3, 3, 32)]

pytestmark = pytest.mark.usefixtures("poisoned")


def error(got, exact):
    assert torch.isfinite(got.float()).all()
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def paged(sequences, block_size, kv_heads, dim, dtype, device):
    """(cache, batch) for (queries, context) pairs: blocks scattered, what lies behind a sequence's end is NaN."""
    width = -(-max(context for _, context in sequences) // block_size)
    shape = (width * len(sequences), block_size, kv_heads, dim)
    table = torch.randperm(shape[0]).reshape(len(sequences), width).int()
    starts = torch.tensor([0] + [queries for queries, _ in sequences]).cumsum(0).int()
    context = torch.tensor([context for _, context in sequences]).int()
    k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for row, (_, length) in zip(table, sequences, strict=True):
        for tensor in (k, v):
            kept = tensor[row.long()].flatten(0, 1)
            kept[length:] = float("nan")
            tensor[row.long()] = kept.unflatten(0, (width, block_size))
    longest = max(queries for queries, _ in sequences), int(context.max())
    cache = LayerCache(k.to(device), v.to(device))
    return cache, PagedBatch(table.to(device), starts.to(device), context.to(device), *longest)


def check(sequences, heads, kv_heads, dim, block_size, dtype, device):
    cache, batch = paged(sequences, block_size, kv_heads, dim, dtype, device)
    q = torch.randn(int(batch.query_start[-1]), heads, dim).to(device, dtype)
    exact = LayerCache(cache.k.double(), cache.v.double())
    expected = reference.paged_attention(q.double(), exact, batch, dim**-0.5)
    assert triton_attention.fits(q, cache)
    assert error(triton_attention.paged_attention(q, cache, batch, dim**-0.5), expected) < MOST[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", HEADS)
@pytest.mark.parametrize("sequences", [[(7, 7)], [(1, 40), (2, 130), (3, 3)], [(65, 90), (1, 1), (33, 64), (30, 200)]])
def test_prefill(dtype, heads, kv_heads, dim, sequences, device, monkeypatch):
    monkeypatch.setattr(triton_attention, "PROGRAMS", 1)
    check(sequences, heads, kv_heads, dim, 8, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", HEADS)
@pytest.mark.parametrize("contexts", [[1], [33, 1, 300], [64, 65, 63, 128, 5]])
def test_decode(dtype, heads, kv_heads, dim, contexts, device, monkeypatch):
    monkeypatch.setattr(triton_attention, "PROGRAMS", 1)  # a device of any size: the interpreter runs one at a time
    check([(1, context) for context in contexts], heads, kv_heads, dim, 16, dtype, device)


def test_a_row_that_fills_up_a_batch_gives_0(device):
    cache, batch = paged([(1, 20), (1, 9)], 8, 2, 64, torch.float32, device)
    batch.cached_len[1] = 0
    out = triton_attention.paged_attention(torch.randn(2, 4, 64, device=device), cache, batch, 0.125)
    assert torch.isfinite(out[0]).all() and (out[1] == 0).all()


def test_extreme_scores(device):
    cache, batch = paged([(1, 70), (1, 20)], 8, 2, 64, torch.float32, device)
    q = torch.randn(2, 4, 64, device=device) * 1e4
    expected = reference.paged_attention(q, cache, batch, 1.0)
    assert error(triton_attention.paged_attention(q, cache, batch, 1.0), expected) < 1e-3


@pytest.mark.parametrize("sequences, kv_heads, splits", [(1, 8, 64), (16, 8, 8), (64, 8, 4), (256, 8, 4), (8, 8, 16)])
def test_splits(sequences, kv_heads, splits):
    assert triton_attention.splits_for(sequences, kv_heads) == splits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [[(65, 90), (1, 1)], [(1, 33), (1, 100)]])
def test_keys_and_values_in_8_bits(dtype, sequences, device, monkeypatch):
    monkeypatch.setattr(triton_attention, "PROGRAMS", 1)
    cache, batch = paged(sequences, 8, 2, 64, torch.float32, device)
    held = LayerCache(cache.k.to(torch.float8_e4m3fn), cache.v.to(torch.float8_e4m3fn))
    q = torch.randn(int(batch.query_start[-1]), 4, 64).to(device, dtype)
    expected = reference.paged_attention(q.double(), held, batch, 0.125)
    assert triton_attention.fits(q, held)
    assert error(triton_attention.paged_attention(q, held, batch, 0.125), expected) < MOST[dtype]
