"""The one dispatcher: CPU tensors go to the compiled kernels of cpu.py, everything else to reference.py.

Arguments and results are those of the functions of the same names in reference.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from batch.kernels import reference
from batch.kernels.linears import Experts, Linear
from batch.kernels.paging import LayerCache, PagedBatch

CPU_DTYPES = (torch.bfloat16, torch.float32)
_reference_only = False


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run everything through reference.py, as a device without kernels does."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


@functools.cache
def _cpu() -> Any:
    """Imported on first use: a GPU run does without numba."""
    from batch.kernels import cpu

    return cpu


def packer(device: torch.device, dtype: torch.dtype) -> Any:
    """panels.py where weights for activations of `dtype` on `device` are to be packed in panels, else None."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    from batch.kernels import panels, vector_ir

    return panels if vector_ir.has_avx512_bf16() else None


def _kernels(x: torch.Tensor) -> Any:
    if x.device.type == "cpu" and x.dtype in CPU_DTYPES and not _reference_only:
        return _cpu()
    return reference


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return _kernels(residual).add_rms_norm(residual, deltas, weight, eps)


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    kernels = _kernels(qkv)
    return kernels.store_qkv(qkv, num_heads, cache, slots, rotation, norm_eps, q_scale)


def paged_attention(q: torch.Tensor, cache: LayerCache, batch: PagedBatch, scale: float) -> torch.Tensor:
    return _kernels(q).paged_attention(q, cache, batch, scale)


def packs_cache(device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> bool:
    """Whether a KV cache of this kind is to be packed (see `LayerCache`): only where the kernels gain by it."""
    if device.type != "cpu" or dtype not in CPU_DTYPES or _reference_only:
        return False
    return bool(_cpu().packs_cache(dtype, block_size, head_dim))


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    return _kernels(x).linear(x, weight)


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    return _kernels(x).mlp(x, gate_up, down)


def moe(
    x: torch.Tensor, router: Linear, experts: Experts, shared_gate_up: Linear, shared_down: Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels(x).moe(x, router, experts, shared_gate_up, shared_down)
