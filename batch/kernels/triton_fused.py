"""Norms, and what happens between the q/k/v product and attention, each in one pass over its rows.

Legend: T tokens, H hidden, A heads, K kv heads, D head_dim, B tokens per KV block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch.kernels.paging import LayerCache
from batch.kernels.triton_support import knows_fp8, power_of_two


@triton.jit
def _add_rms_norm(
    residual: tl.tensor, first: tl.tensor, second: tl.tensor, weight: tl.tensor, out: tl.tensor, eps: tl.tensor,
    H: tl.constexpr, BLOCK: tl.constexpr, DELTAS: tl.constexpr,
) -> None:  # fmt: skip
    """One row; rounded wherever the reference rounds."""
    row, h = tl.program_id(0).to(tl.int64) * H, tl.arange(0, BLOCK)
    there = h < H
    x = tl.load(residual + row + h, mask=there, other=0.0)
    if DELTAS:
        delta = tl.load(first + row + h, mask=there, other=0.0).to(tl.float32)
        if DELTAS == 2:
            delta += tl.load(second + row + h, mask=there, other=0.0).to(tl.float32)
        delta = delta.to(x.dtype).to(tl.float32)
        x = (x.to(tl.float32) + delta).to(x.dtype)
        tl.store(residual + row + h, x, mask=there)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    scaled = wide.to(x.dtype).to(tl.float32) * tl.load(weight + h, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + h, scaled.to(x.dtype), mask=there)


@triton.jit
def _store_qkv(
    qkv: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_scale: tl.tensor, slots: tl.tensor, q: tl.tensor, k: tl.tensor,
    v: tl.tensor, eps: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ALL: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    NORMED: tl.constexpr, SCALED: tl.constexpr,
) -> None:  # fmt: skip
    """One token, all heads: q, then k, then v; ALL is a power of two. A slot below 0 is nobody's."""
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, ALL), tl.arange(0, D)
    where = head[:, None] * D + d[None, :]
    x = tl.load(
        qkv + token * (HEADS + 2 * KV_HEADS) * D + where, mask=(head < HEADS + 2 * KV_HEADS)[:, None], other=0.0
    )
    is_q, is_k = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    turned = x
    if ROTATED:
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (ALL, HALF, 2)))  # 2 × [ALL, D/2]
        half = token * HALF + tl.arange(0, HALF)
        c, s = tl.load(cos + half)[None, :], tl.load(sin + half)[None, :]
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ALL, D)).to(x.dtype)
        if NORMED:
            wide = turned.to(tl.float32)
            turned = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]).to(x.dtype)
    if SCALED:
        turned = tl.where(is_q[:, None], (x.to(tl.float32) * tl.load(q_scale + token)).to(x.dtype), x)
    tl.store(q + token * HEADS * D + where, turned, mask=is_q[:, None])
    slot = tl.load(slots + token + head * 0)  # one for each head: the interpreter's masks are made of tensors alone
    to = slot[:, None] * KV_HEADS * D + where - HEADS * D
    tl.store(k + to, _held(turned, k), mask=(is_k & (slot >= 0))[:, None])
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    tl.store(v + to - KV_HEADS * D, _held(x, v), mask=(is_v & (slot >= 0))[:, None])


@triton.jit
def _held(x: tl.tensor, cache: tl.tensor) -> tl.tensor:
    """As the cache holds it: e4m3 is cut off at its largest."""
    if cache.dtype.element_ty == tl.float8e4nv:
        wide = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        return wide.to(tl.float8e4nv)
    else:
        return x


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.add_rms_norm`; residual is contiguous."""
    assert residual.is_contiguous()
    first, second = (*(delta.contiguous() for delta in deltas), residual, residual)[:2]
    rows, hidden = residual.shape
    out = torch.empty_like(residual)
    if rows:
        block = power_of_two(hidden)
        _add_rms_norm[(rows,)](
            residual, first, second, weight, out, eps, H=hidden, BLOCK=block, DELTAS=len(deltas),
            num_warps=min(max(block // 1024, 1), 8),
        )  # fmt: skip
    return out


def fits(qkv: torch.Tensor, cache: LayerCache) -> bool:
    """Plain caches of q/k/v's own dtype or e4m3, with a power of two dims a head."""
    dim, held = cache.head_dim, cache.k.dtype
    known = held == qkv.dtype or (held == torch.float8_e4m3fn and knows_fp8(cache.k.device))
    return not cache.packed and dim == power_of_two(dim) and dim > 1 and known


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `reference.store_qkv`; keys and values with a slot below 0 are dropped."""
    qkv = qkv.contiguous()
    heads = num_heads + 2 * cache.num_kv_heads
    q = torch.empty((qkv.shape[0], num_heads, cache.head_dim), dtype=qkv.dtype, device=qkv.device)
    cos, sin = rotation if rotation is not None else (qkv, qkv)
    _store_qkv[(qkv.shape[0],)](
        qkv, cos, sin, qkv if q_scale is None else q_scale, slots, q, cache.k, cache.v, norm_eps or 0.0,
        HEADS=num_heads, KV_HEADS=cache.num_kv_heads, ALL=power_of_two(heads), HALF=cache.head_dim // 2,
        ROTATED=rotation is not None, NORMED=rotation is not None and norm_eps is not None,
        SCALED=rotation is None and q_scale is not None, num_warps=4,
    )  # fmt: skip
    return q
