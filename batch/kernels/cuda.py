"""The ops on CUDA tensors: Triton kernels where they know the kind and shape of the weights, torch's product for dense
linears, else the reference. Nothing here waits for the device, but for what `captures` says no to.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F

from batch.kernels import (
    reference,
    triton_attention,
    triton_experts,
    triton_fused,
    triton_sampling,
    triton_support,
)
from batch.kernels.linears import DenseLinear, Experts, FusedLinear, Linear
from batch.kernels.paging import LayerCache, PagedBatch
from batch.kernels.triton_banks import Bank
from batch.kernels.triton_rows import MAX_EXPERTS

BESIDE_ROWS = 1024  # tokens of a step up to which the experts' weights take longer to read than to compute with

runs_on = triton_support.runs_on
add_rms_norm = triton_fused.add_rms_norm
draw = triton_sampling.draw


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `reference.store_qkv`."""
    kernels = triton_fused if triton_fused.fits(qkv, cache) else reference
    return kernels.store_qkv(qkv, num_heads, cache, slots, rotation, norm_eps, q_scale)


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    """As `reference.paged_attention`."""
    kernels = triton_attention if triton_attention.fits(q, cache) else reference
    return kernels.paged_attention(q, cache, batch, scale)


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    """As `reference.linear`."""
    if isinstance(weight, DenseLinear):
        return F.linear(x, weight.weight)
    if isinstance(weight, FusedLinear):
        return torch.cat([linear(x, part) for part in weight.parts], dim=-1)
    bank = _bank(weight, gated=False)
    return reference.linear(x, weight) if bank is None else triton_experts.linear(x, bank)


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    """As `reference.mlp`."""
    bank = None if isinstance(gate_up, DenseLinear) else _bank(gate_up, gated=True)
    if bank is None:
        return linear(reference.silu_mul(linear(x, gate_up)), down)
    return linear(triton_experts.linear(x, bank), down)


def moe(
    x: torch.Tensor, router: Linear, experts: Experts, shared_gate_up: Linear, shared_down: Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.moe`; in small steps the shared expert, which computes, runs beside the routed ones, which read."""
    try:
        with _beside(x):
            shared = mlp(x, shared_gate_up, shared_down)
        banks = moe_banks(experts)
        if banks is None:
            expert, score = reference.route(x, router)
            routed = reference.routed_experts(x, expert, score, experts)
        else:
            routed = triton_experts.routed_experts(x, linear(x, router), *banks)
    finally:
        _join(x)  # a capture that ends before would leave torch's allocator capturing
    return shared, routed


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """What is launched in it need not come before what follows, up to `_join`. Memory is safe without further marks:
    whatever runs on the side waits for all that was launched before, the last readers of what it allocated included."""
    if not x.is_cuda or x.shape[0] > BESIDE_ROWS:
        return contextlib.nullcontext()
    side = _side_stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    return torch.cuda.stream(side)


def _join(x: torch.Tensor) -> None:
    if x.is_cuda and x.shape[0] <= BESIDE_ROWS:
        torch.cuda.current_stream(x.device).wait_stream(_side_stream(x.device))


def captures(experts: list[Experts], cache: LayerCache, dtype: torch.dtype) -> bool:
    """Whether a decoding step of a model with such layers can be captured in a graph: nothing in it waits for the
    device, and no launch depends on lengths."""
    q = torch.empty((1, 1, cache.head_dim), dtype=dtype, device="meta")
    fits = triton_attention.fits(q, cache) and triton_fused.fits(q, cache)
    return fits and all(moe_banks(layer) is not None for layer in experts)


def _bank(weight: Linear, gated: bool) -> Bank | None:
    """The Bank of one weight, made once."""
    name = "gated bank" if gated else "bank"
    if name not in weight.derived:
        weight.derived[name] = Bank.of([weight], gated)
    bank: Bank | None = weight.derived[name]
    return bank


def moe_banks(experts: Experts) -> tuple[Bank, Bank] | None:
    """The Banks of a layer's experts, made once; None where the kernels do not know them."""
    if "banks" not in experts.derived:
        gate_up, down = Bank.of(experts.gate_up, gated=True), Bank.of(experts.down, gated=False)
        known = gate_up is not None and down is not None and len(experts.down) <= MAX_EXPERTS
        experts.derived["banks"] = (gate_up, down) if known else None
    banks: tuple[Bank, Bank] | None = experts.derived["banks"]
    return banks
