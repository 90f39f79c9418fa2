"""Every compiled CPU kernel against reference.py, over shapes that do and do not fill whole tiles."""

import pytest
import torch

from batch.kernels import cpu, cpu_attention, cpu_fused, cpu_linear, parallel, reference
from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, FusedLinear, Int4Linear
from batch.kernels.paging import LayerCache, PagedBatch

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 95, 97, 200])
@pytest.mark.parametrize("columns, inner", [(4, 32), (68, 96), (132, 256)])
def test_linear(dtype, rows, columns, inner):
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    got = cpu_linear.grouped_linear(x, [w], [0, rows], columns)
    assert error(got, x.double() @ w.double().T) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes_fall_back(dtype):
    x, w = torch.randn(3, 33).to(dtype), torch.randn(7, 33).to(dtype)
    assert not cpu_linear.fits(x, 7)
    torch.testing.assert_close(cpu.linear(x, DenseLinear(w)), reference.linear(x, DenseLinear(w)), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 600])
def test_routed_experts(dtype, tokens):
    experts, hidden, inner = 5, 64, 96
    gate_up = (torch.randn(experts, 2 * inner, hidden) * 0.1).to(dtype)
    down = (torch.randn(experts, hidden, inner) * 0.1).to(dtype)
    weights = Experts(tuple(map(DenseLinear, gate_up)), tuple(map(DenseLinear, down)))
    x, score = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens).to(dtype)
    expert = torch.randint(0, experts - 1, (tokens,))  # the last one never chosen
    got = cpu.routed_experts(x, expert, score, weights)
    torch.testing.assert_close(got, reference.routed_experts(x, expert, score, weights), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 30, 150])
def test_moe(dtype, tokens):
    experts, hidden, inner = 4, 64, 96
    gate_up = [DenseLinear((torch.randn(2 * inner, hidden) * 0.1).to(dtype)) for _ in range(experts + 1)]
    down = [DenseLinear((torch.randn(hidden, inner) * 0.1).to(dtype)) for _ in range(experts + 1)]
    router = DenseLinear(torch.randn(experts, hidden).to(dtype))
    routed = Experts(tuple(gate_up[1:]), tuple(down[1:]))
    x = torch.randn(tokens, hidden).to(dtype)
    got = cpu.moe(x, router, routed, gate_up[0], down[0])
    expected = reference.moe(x, router, routed, gate_up[0], down[0])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE[dtype])


def int4(rows, columns, group_size):
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32)
    return Int4Linear(packed, (torch.randn(rows, columns // group_size) * 0.01).bfloat16(), group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [128, 64])
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_routed_int4_experts(dtype, group_size, tokens):
    experts, hidden, inner = 3, 256, 384
    weights = Experts(
        tuple(FusedLinear((int4(inner, hidden, group_size), int4(inner, hidden, group_size))) for _ in range(experts)),
        tuple(int4(hidden, inner, group_size) for _ in range(experts)),
    )
    x, score = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens).to(dtype)
    expert = torch.randint(0, experts, (tokens,))
    got = cpu.routed_experts(x, expert, score, weights)
    exact = reference.routed_experts(x.double(), expert, score.double(), weights)
    assert error(got, exact) < (1e-5 if dtype == torch.float32 else 1e-2)


def paged(sequences, block_size, kv_heads, dim, dtype):
    """(plain cache, batch) for (queries, context) pairs, blocks scattered, unused slots full of noise."""
    width = -(-max(context for _, context in sequences) // block_size)
    shape = (width * len(sequences), block_size, kv_heads, dim)
    table = torch.randperm(shape[0]).reshape(len(sequences), width).int()
    starts = torch.tensor([0] + [queries for queries, _ in sequences]).cumsum(0).int()
    context = torch.tensor([context for _, context in sequences]).int()
    longest = max(queries for queries, _ in sequences), int(context.max())
    cache = LayerCache(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
    return cache, PagedBatch(table, starts, context, *longest)


def doubled(cache):
    return LayerCache(cache.k.double(), cache.v.double(), cache.packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim, block_size", [(4, 2, 64, 8), (10, 2, 32, 4), (40, 8, 128, 16)])
@pytest.mark.parametrize("sequences", [[(1, 1), (1, 33), (1, 200)], [(1, 40), (7, 7), (65, 90), (33, 64)]])
def test_attention(dtype, heads, kv_heads, dim, block_size, sequences):
    cache, batch = paged(sequences, block_size, kv_heads, dim, dtype)
    q = torch.randn(int(batch.query_start[-1]), heads, dim).to(dtype)
    exact = reference.paged_attention(q.double(), doubled(cache), batch, dim**-0.5)
    assert cpu_attention.fits(q, cache)
    got = cpu_attention.paged_attention(q, cache, batch, dim**-0.5)
    assert error(got, exact) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_attention_survives_extreme_scores():
    cache, batch = paged([(1, 70)], 8, 2, 64, torch.float32)
    q = torch.randn(1, 4, 64) * 1e4
    exact = reference.paged_attention(q.double(), doubled(cache), batch, 1.0)
    assert error(cpu_attention.paged_attention(q, cache, batch, 1.0), exact) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, size", [(1, 64), (9, 100), (33, 256)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_add_rms_norm(dtype, tokens, size, count):
    residual, weight = torch.randn(tokens, size).to(dtype), torch.randn(size).to(dtype)
    deltas = tuple(torch.randn(tokens, size).to(dtype) for _ in range(count))
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(expected_residual, deltas, weight, 1e-5)
    got = cpu_fused.add_rms_norm(residual, deltas, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(got, expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    gate_up = torch.cat([torch.linspace(-120, 120, 400), torch.randn(400)]).to(dtype).reshape(1, 800)
    torch.testing.assert_close(cpu_fused.silu_mul(gate_up), reference.silu_mul(gate_up), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rope", "rope+norm", "nope", "nope+scale"])
def test_store_qkv(dtype, kind):
    tokens, heads, kv_heads, dim = 19, 6, 2, 32
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angle = torch.rand(tokens, dim // 2) * 6
    rotation = (angle.cos(), angle.sin()) if kind.startswith("rope") else None
    eps = 1e-5 if kind == "rope+norm" else None
    q_scale = torch.rand(tokens) + 1 if kind == "nope+scale" else None
    slots = torch.randperm(40)[:tokens]
    caches = [LayerCache(*(torch.zeros(5, 8, kv_heads, dim, dtype=dtype) for _ in "kv")) for _ in range(2)]
    expected = reference.store_qkv(qkv, heads, caches[0], slots, rotation, eps, q_scale)
    got = cpu_fused.store_qkv(qkv, heads, caches[1], slots, rotation, eps, q_scale)
    torch.testing.assert_close(got, expected, **CLOSE[dtype])
    torch.testing.assert_close(caches[1].k, caches[0].k, **CLOSE[dtype])
    torch.testing.assert_close(caches[1].v, caches[0].v, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanding_quantized_weights_is_exact(dtype):
    packed = torch.randint(-(2**31), 2**31 - 1, (37, 32), dtype=torch.int32)
    part = Int4Linear(packed, torch.randn(37, 4).bfloat16(), 64)
    assert torch.equal(cpu.cpu_quant.expand_int4(part, dtype), reference.dequantize_int4(part, dtype))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(8, 32)
    fp8 = Fp8Linear(values, torch.rand(8, 1).bfloat16(), False)
    torch.testing.assert_close(cpu.cpu_quant.expand_fp8(fp8, dtype), values.to(dtype), equal_nan=True, rtol=0, atol=0)


def test_without_torchs_openmp_a_thread_pool_does_the_same(monkeypatch):
    x, w = torch.randn(5, 64), torch.randn(300, 64)
    expected = cpu_linear.grouped_linear(x, [w], [0, 5], 300)
    monkeypatch.setattr(parallel, "_gomp_parallel", lambda: None)
    parallel._team.cache_clear()
    try:
        assert torch.equal(cpu_linear.grouped_linear(x, [w], [0, 5], 300), expected)
    finally:
        parallel._team.cache_clear()
