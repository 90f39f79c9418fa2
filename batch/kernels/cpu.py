"""The ops on CPU tensors, float32 and bfloat16: compiled kernels where shapes allow, else the reference.

Weights packed in panels, which bfloat16 models have on CPUs with AVX512-BF16, go to cpu_panels. float32 goes through
the tiled products whatever the number of rows, so that a token's result never depends on what else is in the step.
Other bfloat16 products leave many rows to torch's GEMM.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batch.kernels import (
    cpu_attention,
    cpu_fused,
    cpu_linear,
    cpu_packed_attention,
    cpu_panels,
    cpu_quant,
    cpu_routing,
    reference,
)
from batch.kernels.cpu_panels import Bank
from batch.kernels.linears import (
    DenseLinear,
    Experts,
    Fp8Linear,
    FusedLinear,
    Int4Linear,
    Linear,
    Panels,
)
from batch.kernels.paging import LayerCache, PagedBatch

# bfloat16 products of dense weights with more rows per group than this are torch's: measured at [8192, 5120] and
# [4096, 1024], the tiles are ahead below and a few per cent behind above.
MAX_TILED_ROWS = 96


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.add_rms_norm`."""
    if all(cpu_fused.fits(tensor) for tensor in (residual, *deltas)):
        return cpu_fused.add_rms_norm(residual, deltas, weight, eps)
    return reference.add_rms_norm(residual, deltas, weight, eps)


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `reference.store_qkv`."""
    kernels = cpu_fused if cpu_fused.fits(qkv) else reference
    return kernels.store_qkv(qkv, num_heads, cache, slots, rotation, norm_eps, q_scale)


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As `reference.paged_attention`."""
    for kernels in (cpu_packed_attention, cpu_attention):
        if kernels.fits(q, cache):
            return kernels.paged_attention(q, cache, batch, scale)
    return reference.paged_attention(q, cache, batch, scale)


packs_cache = cpu_packed_attention.packs


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    """As `reference.linear`."""
    if isinstance(weight, DenseLinear):
        return _dense(x, weight.weight)
    if isinstance(weight, Panels):
        if weight.gated or not cpu_panels.fits(x):
            return reference.linear(x, weight)
        return cpu_panels.product((x,), _bank(weight), cpu_routing.one_weight(*x.shape))
    if isinstance(weight, Int4Linear):
        return _dense(x, cpu_quant.expand_int4(weight, x.dtype))
    if isinstance(weight, Fp8Linear):
        return _fp8(x, weight)
    assert isinstance(weight, FusedLinear)
    return torch.cat([linear(x, part) for part in weight.parts], dim=-1)


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    """As `reference.mlp`."""
    if isinstance(gate_up, Panels) and gate_up.gated and cpu_panels.fits(x):
        hidden = cpu_panels.product((x,), _bank(gate_up), cpu_routing.one_weight(*x.shape), spread=True)
        return linear(hidden, down)
    grouped = _grouped(x, (gate_up,), [0, x.shape[0]], gated=True)
    return linear(cpu_fused.silu_mul(linear(x, gate_up)) if grouped is None else grouped, down)


def route(x: torch.Tensor, router: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.route`."""
    best, expert = linear(x, router).max(dim=-1)  # [T]
    return expert, reference.sigmoid(best).to(x.dtype)


def moe(
    x: torch.Tensor, router: Linear, experts: Experts, shared_gate_up: Linear, shared_down: Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.moe`; with weights in panels, and in a small step, the shared expert is one more group of the
    routed experts' two calls."""
    tokens = x.shape[0]
    banks = _moe_banks(experts, shared_gate_up, shared_down)
    if banks is not None and cpu_fused.fits(x) and cpu_panels.fits(x):
        score, order, groups = cpu_routing.dispatch(linear(x, router), banks.with_shared, banks.down.in_features)
        scaled = torch.empty_like(x)
        cpu_fused.gather_scaled(x, score, order, scaled)
        xs = (scaled, x) if banks.with_shared else (scaled,)
        hidden = cpu_panels.product(xs, banks.gate_up, groups, spread=True)  # [2T, I] or [T, I]
        out = cpu_panels.product((hidden,), banks.down, groups, order)  # [2T, H] or [T, H]
        return out[tokens:] if banks.with_shared else mlp(x, shared_gate_up, shared_down), out[:tokens]
    expert, score = route(x, router)
    if tokens <= MAX_TILED_ROWS and cpu_fused.fits(x):
        order, starts, inputs = _group_by_expert(x, expert, score, len(experts.down), copies=2)
        inputs[tokens:] = x
        hidden_or_none = _grouped(inputs, (*experts.gate_up, shared_gate_up), [*starts, 2 * tokens], gated=True)
        if hidden_or_none is not None:
            places = torch.cat([order, torch.arange(tokens, 2 * tokens)])
            both = _grouped(hidden_or_none, (*experts.down, shared_down), [*starts, 2 * tokens], order=places)
            if both is not None:
                return both[tokens:], both[:tokens]  # [T, H] each
    return mlp(x, shared_gate_up, shared_down), routed_experts(x, expert, score, experts)


def routed_experts(x: torch.Tensor, expert: torch.Tensor, score: torch.Tensor, weights: Experts) -> torch.Tensor:
    """As `reference.routed_experts`; a small step's experts are computed in two calls for all of them."""
    order, starts, scaled = _group_by_expert(x, expert, score, len(weights.down))
    hidden = _grouped(scaled, weights.gate_up, starts, gated=True)  # [T, I]
    if hidden is not None:
        out = _grouped(hidden, weights.down, starts, order=order)
        if out is not None:
            return out
    out = torch.empty_like(x)
    for index, (begin, end) in enumerate(itertools.pairwise(starts)):
        if end > begin:
            out[order[begin:end]] = mlp(scaled[begin:end], weights.gate_up[index], weights.down[index])
    return out


def _group_by_expert(
    x: torch.Tensor, expert: torch.Tensor, score: torch.Tensor, num_experts: int, copies: int = 1
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """(order int64 [T] by expert, first row of each expert and T, x · score in that order with room for more rows)."""
    order = expert.argsort(stable=True)
    starts = [0, *torch.bincount(expert, minlength=num_experts).cumsum(0).tolist()]
    scaled = x.new_empty((copies * x.shape[0], x.shape[1]))  # [copies · T, H]
    if cpu_fused.fits(x) and score.is_contiguous():
        cpu_fused.gather_scaled(x, score, order, scaled)
    else:
        scaled[: x.shape[0]] = (x * score[:, None])[order]
    return order, starts, scaled


def _grouped(
    x: torch.Tensor,
    weights: Sequence[Linear],
    starts: list[int],
    gated: bool = False,
    order: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Rows starts[g]:starts[g+1] of x times weights[g], in one call; None where no kernel does that well.

    gated: the weights are gate and up, the result silu(gate) · up. `order`: as in `cpu_linear.grouped_linear`.
    """
    rows = x.shape[0] / len(weights)
    dense = [weight.weight for weight in weights if isinstance(weight, DenseLinear)]
    size = weights[0].out_features // (2 if gated else 1)
    if len(dense) == len(weights) and _tiled(x, rows, size):
        return cpu_linear.grouped_linear(x, dense, starts, size, gated, order)
    return None


@dataclass(frozen=True)
class MoeBanks:
    """The panels of a layer's experts, and of its shared expert as one more where it is of the same kind."""

    gate_up: Bank
    down: Bank
    with_shared: bool


def _bank(weight: Panels) -> Bank:
    """The Bank of one weight, made once."""
    if "bank" not in weight.derived:
        weight.derived["bank"] = Bank.of([weight])
    bank: Bank = weight.derived["bank"]
    return bank


def _moe_banks(experts: Experts, shared_gate_up: Linear, shared_down: Linear) -> MoeBanks | None:
    """The Banks of a layer, made once; None where its experts are not in panels."""
    if "banks" not in experts.derived:
        experts.derived["banks"] = _make_moe_banks(experts, shared_gate_up, shared_down)
    banks: MoeBanks | None = experts.derived["banks"]
    return banks


def _make_moe_banks(experts: Experts, shared_gate_up: Linear, shared_down: Linear) -> MoeBanks | None:
    if not (cpu_panels.same_kind(experts.gate_up) and cpu_panels.same_kind(experts.down)):
        return None
    gate_ups, downs = (*experts.gate_up, shared_gate_up), (*experts.down, shared_down)
    if cpu_panels.same_kind(gate_ups) and cpu_panels.same_kind(downs):
        return MoeBanks(Bank.of(gate_ups), Bank.of(downs), True)
    return MoeBanks(Bank.of(experts.gate_up), Bank.of(experts.down), False)


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
