"""The ops on CPU tensors, float32 and bfloat16: compiled kernels where shapes allow, else the reference.

float32 goes through the tiled products whatever the number of rows, so that a token's result never depends on what
else is in the step. bfloat16 leaves large products to torch's GEMM.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from batch.kernels import cpu_attention, cpu_fused, cpu_linear, cpu_quant, reference
from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, FusedLinear, Int4Linear, Linear
from batch.kernels.paging import PagedBatch

# bfloat16 products with more rows per group than this are torch's.
MAX_TILED_ROWS = 96


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.add_rms_norm`."""
    if all(cpu_fused.fits(tensor) for tensor in (residual, *deltas)):
        return cpu_fused.add_rms_norm(residual, deltas, weight, eps)
    return reference.add_rms_norm(residual, deltas, weight, eps)


def store_qkv(
    qkv: torch.Tensor, num_heads: int, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `reference.store_qkv`."""
    kernels = cpu_fused if cpu_fused.fits(qkv) else reference
    return kernels.store_qkv(qkv, num_heads, k_cache, v_cache, slots, rotation, norm_eps, q_scale)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: PagedBatch, scale: float
) -> torch.Tensor:
    """As `reference.paged_attention`."""
    kernels = cpu_attention if cpu_attention.fits(q, k_cache) else reference
    return kernels.paged_attention(q, k_cache, v_cache, batch, scale)


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    """As `reference.linear`."""
    if isinstance(weight, DenseLinear):
        return _dense(x, weight.weight)
    if isinstance(weight, Int4Linear):
        return _dense(x, cpu_quant.expand_int4(weight, x.dtype))
    if isinstance(weight, Fp8Linear):
        return _fp8(x, weight)
    assert isinstance(weight, FusedLinear)
    return torch.cat([linear(x, part) for part in weight.parts], dim=-1)


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    """As `reference.mlp`."""
    inner = down.in_features
    if isinstance(gate_up, DenseLinear) and _tiled(x, x.shape[0], inner):
        hidden = cpu_linear.grouped_linear(x, [gate_up.weight], [0, x.shape[0]], inner, gated=True)
    else:
        hidden = cpu_fused.silu_mul(linear(x, gate_up))
    return linear(hidden, down)


def route(x: torch.Tensor, router: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.route`."""
    best, expert = linear(x, router).max(dim=-1)  # [T]
    return expert, reference.sigmoid(best).to(x.dtype)


def routed_experts(x: torch.Tensor, expert: torch.Tensor, score: torch.Tensor, weights: Experts) -> torch.Tensor:
    """As `reference.routed_experts`; dense experts of a small step are computed in two calls for all of them."""
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=len(weights.down))
    starts = [0, *counts.cumsum(0).tolist()]
    scaled = (x * score[:, None])[order]  # [T, H]
    gate_up = [part.weight for part in weights.gate_up if isinstance(part, DenseLinear)]
    down = [part.weight for part in weights.down if isinstance(part, DenseLinear)]
    size, inner = x.shape[1], weights.down[0].in_features
    dense = len(gate_up) == len(down) == len(weights.down)
    if dense and _tiled(x, x.shape[0] / len(down), inner) and cpu_linear.fits(x, size):
        hidden = cpu_linear.grouped_linear(scaled, gate_up, starts, inner, gated=True)  # [T, I]
        return cpu_linear.grouped_linear(hidden, down, starts, size, order=order)
    out = torch.empty_like(x)
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end > begin:
            out[order[begin:end]] = mlp(scaled[begin:end], weights.gate_up[index], weights.down[index])
    return out


def _tiled(x: torch.Tensor, rows: float, out_features: int) -> bool:
    small = x.dtype == torch.float32 or rows <= MAX_TILED_ROWS
    return small and cpu_linear.fits(x, out_features)


def _dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if _tiled(x, x.shape[0], weight.shape[0]) and weight.is_contiguous():
        return cpu_linear.grouped_linear(x, [weight], [0, x.shape[0]], weight.shape[0])
    return F.linear(x, weight)


def _fp8(x: torch.Tensor, part: Fp8Linear) -> torch.Tensor:
    """As `reference.fp8_linear`, the e4m3 values expanded one linear at a time."""
    token_scale: torch.Tensor | float = 1.0
    if part.dynamic_activations:
        x, token_scale = reference.quantize_fp8_tokens(x)
    y = _dense(x, cpu_quant.expand_fp8(part, x.dtype))  # [T, N]
    return (y.float() * token_scale * part.scale.float().T).to(x.dtype)  # [T, N] · [T, 1] · [1, N]
