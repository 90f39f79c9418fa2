"""Norms, rope and writing of keys against reference.py: odd sizes, every combination of what may be absent."""

import pytest
import torch

from batch.kernels import reference
from batch.kernels.paging import LayerCache

pytest.importorskip("triton")
from batch.kernels import triton_fused

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deltas", [0, 1, 2])
@pytest.mark.parametrize("rows, hidden", [(1, 64), (5, 100), (3, 5120), (0, 64)])
def test_add_rms_norm(dtype, deltas, rows, hidden, device):
    residual, *more = (torch.randn(rows, hidden).to(device, dtype) for _ in range(1 + deltas))
    weight, theirs = torch.randn(hidden).to(device, dtype), residual.clone()
    expected = reference.add_rms_norm(theirs, tuple(more), weight, 1e-5)
    got = triton_fused.add_rms_norm(residual, tuple(more), weight, 1e-5)
    torch.testing.assert_close(residual, theirs, rtol=0, atol=0)
    torch.testing.assert_close(got, expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (10, 2, 128), (3, 3, 16)])
@pytest.mark.parametrize("rope, norm, scaled", [
    (True, True, False), (True, False, False), (False, False, True), (False, True, False),
])  # fmt: skip
def test_store_qkv(dtype, heads, kv_heads, dim, rope, norm, scaled, device):
    tokens, block = 7, 4
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(device, dtype)
    caches = [LayerCache(*torch.zeros(2, 5, block, kv_heads, dim, device=device, dtype=dtype)) for _ in range(2)]
    slots = torch.randperm(20)[:tokens].to(device)
    angles = torch.randn(tokens, dim // 2, device=device)
    rotation, eps = (angles.cos(), angles.sin()) if rope else None, 1e-5 if norm else None
    q_scale = torch.rand(tokens, device=device) + 1 if scaled else None
    expected = reference.store_qkv(qkv, heads, caches[0], slots, rotation, eps, q_scale)
    assert triton_fused.fits(qkv, caches[1])
    got = triton_fused.store_qkv(qkv, heads, caches[1], slots, rotation, eps, q_scale)
    torch.testing.assert_close(got, expected, **CLOSE[dtype])
    torch.testing.assert_close(caches[1].k, caches[0].k, **CLOSE[dtype])
    torch.testing.assert_close(caches[1].v, caches[0].v, rtol=0, atol=0)


def test_rows_without_a_slot_are_not_kept(device):
    cache = LayerCache(*torch.zeros(2, 2, 4, 2, 16, device=device))
    qkv, slots = torch.randn(3, 6 * 16, device=device), torch.tensor([-1, 5, -1], device=device)
    q = triton_fused.store_qkv(qkv, 2, cache, slots, None, None, None)
    assert torch.equal(q, qkv[:, :32].view(3, 2, 16))
    k = cache.k.flatten(0, 1)
    assert torch.equal(k[5], qkv[1, 32:64].view(2, 16)) and not k[[0, 1, 2, 3, 4, 6, 7]].any()


def test_packed_caches_are_not_for_these_kernels(device):
    cache = LayerCache(torch.zeros(1, 2, 8, 4, 2, device=device), torch.zeros(1, 2, 2, 16, 2, device=device), True)
    assert not triton_fused.fits(torch.zeros(1, 96, device=device), cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_in_8_bits(dtype, device):
    caches = [LayerCache(*torch.zeros(2, 5, 4, 2, 16, device=device).to(torch.float8_e4m3fn)) for _ in range(2)]
    qkv, slots = torch.randn(7, 6 * 16).to(device, dtype) * 300, torch.randperm(20)[:7].to(device)  # some past 448
    assert triton_fused.fits(qkv, caches[0])
    for kernels, cache in zip((reference, triton_fused), caches, strict=True):
        kernels.store_qkv(qkv, 2, cache, slots, None, None, None)
    for ours, theirs in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert caches[0].k.float().abs().max() == 448
