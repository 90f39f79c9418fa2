"""The specification of every kernel in plain torch, for any device and float dtype; fast kernels are tested against it.

Legend: T tokens, H hidden, I intermediate, A heads, K kv heads, D head_dim, S sequences, N/K out/in features,
B tokens per KV block, C cached positions of one sequence. Rounding points follow transformers' Llama 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from batch.kernels.linears import (
    PANEL_GROUP,
    DenseLinear,
    Experts,
    Fp8Linear,
    FusedLinear,
    Int4Linear,
    Linear,
    PanelFp8Linear,
    PanelInt4Linear,
    PanelLinear,
)
from batch.kernels.paging import FP8_MAX, LayerCache, PagedBatch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] normalised in float32, cast back, then times weight [H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual [T, H] += the sum of 0 to 2 deltas [T, H], in place; returns rms_norm(residual)."""
    if deltas:
        residual.add_(deltas[0] + deltas[1] if len(deltas) == 2 else deltas[0])
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I], gate first → silu(gate) · up [T, I]; silu is rounded before the product."""
    gate, up = gate_up.chunk(2, dim=-1)  # 2 × [T, I]
    return F.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on adjacent pairs: x [T, heads, D], cos and sin float32 [T, D/2] → float32 [T, heads, D]."""
    pairs = x.float().unflatten(-1, (-1, 2))  # [T, heads, D/2, 2]
    even, odd = pairs.unbind(-1)  # 2 × [T, heads, D/2]
    c, s = cos[:, None, :], sin[:, None, :]  # [T, 1, D/2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)  # [T, heads, D]


def l2_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Weightless RMS norm over head_dim: [..., D] in any float dtype, computed in float32, cast back."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """qkv [T, (A + 2K)·D] → q [T, A, D]; k and v go into the cache at slots int64 [T].

    Rope layers give `rotation` (cos, sin float32 [T, D/2]) and, for QK norm after it, `norm_eps`; NoPE layers give
    `q_scale` float32 [T] (temperature) or None.
    """
    q, k, v = split_qkv(qkv, num_heads, cache.num_kv_heads)
    if rotation is not None:
        q, k = rotate(q, *rotation).to(qkv.dtype), rotate(k, *rotation).to(qkv.dtype)
        if norm_eps is not None:
            q, k = l2_norm(q, norm_eps), l2_norm(k, norm_eps)
    elif q_scale is not None:
        q = (q * q_scale[:, None, None]).to(qkv.dtype)  # [T, A, D] · [T, 1, 1]
    cache.write(slots, k, v)
    return q.contiguous()


def split_qkv(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, (A + 2K)·D] → views q [T, A, D], k [T, K, D], v [T, K, D]."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))  # [T, A + 2K, D]
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return q, k, v


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """Causal attention of q [T, A, D] over each sequence's blocks → [T, A·D].

    A query at position p sees the cached positions kv_start ≤ position ≤ p of its own sequence.
    """
    if batch.max_query_len == 1:
        return _decode_attention(q, cache, batch, scale)
    out = torch.empty_like(q)
    for seq, (begin, end, context) in enumerate(batch.ranges()):
        if begin == end:
            continue
        k, v = cache.read(batch.block_table[seq, : -(-context // cache.block_size)].long())
        k, v = k.flatten(0, 1)[:context].to(q.dtype), v.flatten(0, 1)[:context].to(q.dtype)  # [C, K, D]
        out[begin:end] = causal_attention(q[begin:end], k, v, scale)
    return out.flatten(1)  # [T, A·D]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last Q positions of one sequence: q [Q, A, D], k and v [C, K, D] → [Q, A, D]."""
    queries, context = q.shape[0], k.shape[0]
    causal = queries == context
    mask = None
    if not causal and queries > 1:
        last = torch.arange(context - queries, context, device=q.device)  # the position of each query
        mask = torch.arange(context, device=q.device) <= last[:, None]  # [Q, C]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, A, Q, D]
        k.transpose(0, 1)[None],  # [1, K, C, D]
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal and queries > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)  # [Q, A, D]


def _decode_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """One query per sequence, all sequences padded to the longest in one call: q [S, A, D] → [S, A·D]."""
    num_blocks = -(-batch.max_context_len // cache.block_size)
    k, v = cache.read(batch.block_table[:, :num_blocks].long())
    k, v = k.flatten(1, 2).to(q.dtype), v.flatten(1, 2).to(q.dtype)  # [S, C, K, D], copies
    visible = torch.arange(k.shape[1], device=q.device) < batch.cached_len[:, None]  # [S, C]
    # Padding lies in other sequences' blocks: weight 0 times their NaN, should one have it, would be NaN here.
    k.masked_fill_(~visible[:, :, None, None], 0)
    v.masked_fill_(~visible[:, :, None, None], 0)
    out = F.scaled_dot_product_attention(
        q[:, :, None, :],  # [S, A, 1, D]
        k.transpose(1, 2),  # [S, K, C, D]
        v.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return out.flatten(1)  # [S, A·D]


def dequantize_int4(part: Int4Linear, dtype: torch.dtype) -> torch.Tensor:
    """INT4 groups → [N, K], each q · scale rounded to `dtype`, as compressed-tensors decompresses."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=part.packed.device)
    q = ((part.packed[:, :, None] >> shifts) & 15) - 8  # [N, K/8, 8], element 8j + k in nibble k
    groups = q.reshape(part.out_features, -1, part.group_size).to(dtype)  # [N, K/G, G]
    return (groups * part.scale[:, :, None].to(dtype)).flatten(1)  # [N, K]


def quantize_fp8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] → (e4m3 values held in x's dtype [T, K], float32 scale [T, 1] = absmax / 448)."""
    scale = x.abs().amax(-1, keepdim=True).float() / FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.to(x.dtype), scale


def quantize_int8_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] → (integers -127 … 127 as float32 [T, K], float32 scale [T, K/G] = absmax / 127)."""
    groups = x.float().unflatten(-1, (-1, group_size))  # [T, K/G, G]
    scale = groups.abs().amax(-1) / 127.0
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    return torch.round(groups * inverse[..., None]).flatten(1), scale


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    """x [T, K] · weightᵀ → [T, N]."""
    if isinstance(weight, DenseLinear):
        return F.linear(x, weight.weight)
    if isinstance(weight, Int4Linear):
        return F.linear(x, dequantize_int4(weight, x.dtype))
    if isinstance(weight, PanelInt4Linear) and weight.int8_activations:
        q, scale = quantize_int8_groups(x, PANEL_GROUP)
        exact = (q.unflatten(-1, (*scale.shape[1:], PANEL_GROUP)) * scale[..., None]).flatten(1)  # [T, K]
        return F.linear(exact, weight.dense().float()).to(x.dtype)
    if isinstance(weight, PanelFp8Linear):
        weight = weight.plain()
    if isinstance(weight, PanelLinear | PanelInt4Linear):
        return F.linear(x, weight.dense().to(x.dtype))
    if isinstance(weight, Fp8Linear):
        return fp8_linear(x, weight, weight.weight.to(x.dtype))
    assert isinstance(weight, FusedLinear)
    return torch.cat([linear(x, part) for part in weight.parts], dim=-1)


def fp8_linear(x: torch.Tensor, part: Fp8Linear, values: torch.Tensor) -> torch.Tensor:
    """`values` [N, K]: part.weight's e4m3 values in x's dtype, which holds them exactly; scales follow the product."""
    token_scale: torch.Tensor | float = 1.0
    if part.dynamic_activations:
        x, token_scale = quantize_fp8_tokens(x)
    y = F.linear(x, values)  # [T, N]
    return (y.float() * token_scale * part.scale.float().T).to(x.dtype)  # [T, N] · [T, 1] · [1, N]


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    """SwiGLU: [T, H] → [T, H]."""
    return linear(silu_mul(linear(x, gate_up)), down)


def sigmoid(logit: torch.Tensor) -> torch.Tensor:
    """float32 sigmoid, by way of float64: torch's float32 one depends, in the last bit, on the place in the tensor."""
    return logit.double().sigmoid().float()


def route(x: torch.Tensor, router: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 routing: x [T, H], router H → E; expert int64 [T], score [T] = sigmoid(logit) rounded to x's dtype."""
    best, expert = linear(x, router).max(dim=-1)  # [T]
    return expert, sigmoid(best).to(x.dtype)


def routed_experts(x: torch.Tensor, expert: torch.Tensor, score: torch.Tensor, weights: Experts) -> torch.Tensor:
    """Each token through its own expert only, the score scaling the expert's input: x [T, H] → [T, H]."""
    order = expert.argsort(stable=True)  # tokens grouped by expert
    counts = torch.bincount(expert, minlength=len(weights.down)).tolist()
    scaled = (x * score[:, None])[order]  # [T, H]
    out = torch.empty_like(x)
    begin = 0
    for index, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            out[order[rows]] = mlp(scaled[rows], weights.gate_up[index], weights.down[index])
            begin += count
    return out


def moe(
    x: torch.Tensor, router: Linear, experts: Experts, shared_gate_up: Linear, shared_down: Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] → the shared expert's output and each token's routed one, both [T, H]; their sum is the layer's."""
    expert, score = route(x, router)  # [T], [T]
    return mlp(x, shared_gate_up, shared_down), routed_experts(x, expert, score, experts)
