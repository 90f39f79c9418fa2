"""The one dispatcher: CPU tensors go to the compiled kernels of cpu.py, CUDA tensors to the Triton kernels of cuda.py,
everything else to reference.py.

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
_only: str | None = None  # "reference" or "cuda": what everything goes through, whatever its device


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run everything through reference.py, as a device without kernels does."""
    with _everything_through("reference"):
        yield


@contextlib.contextmanager
def cuda_only() -> Iterator[None]:
    """Run CPU tensors through the kernels for CUDA, in Triton's interpreter: see triton_support.py."""
    with _everything_through("cuda"):
        yield


@contextlib.contextmanager
def _everything_through(kernels: str) -> Iterator[None]:
    global _only
    before, _only = _only, kernels
    try:
        yield
    finally:
        _only = before


@functools.cache
def _cpu() -> Any:
    """Imported on first use: a GPU run does without numba."""
    from batch.kernels import cpu

    return cpu


@functools.cache
def _cuda() -> Any:
    """Imported on first use: a CPU run does without Triton."""
    from batch.kernels import cuda

    return cuda


def packer(device: torch.device, dtype: torch.dtype) -> Any:
    """panels.py where weights for activations of `dtype` on `device` are to be packed in panels, else None."""
    if device.type != "cpu" or dtype != torch.bfloat16 or _only == "cuda":
        return None
    from batch.kernels import panels, vector_ir

    return panels if vector_ir.has_avx512_bf16() else None


def cuda_kernels(x: torch.Tensor) -> Any:
    """cuda.py where x goes through it, else None."""
    wanted = _only == "cuda" or (_only is None and x.is_cuda)
    return _cuda() if wanted and _cuda().runs_on(x) else None


def _kernels(x: torch.Tensor) -> Any:
    if _only == "reference":
        return reference
    kernels = cuda_kernels(x)
    if kernels is not None:
        return kernels
    if x.device.type == "cpu" and x.dtype in CPU_DTYPES:
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
    if device.type != "cpu" or dtype not in CPU_DTYPES or _only is not None:
        return False
    return bool(_cpu().packs_cache(dtype, block_size, head_dim))


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether tensors there go through cuda.py, whose kernels want linears over the same input in one tensor, while a
    CPU reads them where they are mapped."""
    return device.type == "cuda" or _only == "cuda"


def captures(experts: list[Experts], cache: LayerCache, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decoding steps of a model with these layers can be captured in CUDA graphs."""
    return has_cuda_kernels(device) and _only != "reference" and bool(_cuda().captures(experts, cache, dtype))


def linear(x: torch.Tensor, weight: Linear) -> torch.Tensor:
    return _kernels(x).linear(x, weight)


def mlp(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
    return _kernels(x).mlp(x, gate_up, down)


def moe(
    x: torch.Tensor, router: Linear, experts: Experts, shared_gate_up: Linear, shared_down: Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels(x).moe(x, router, experts, shared_gate_up, shared_down)
