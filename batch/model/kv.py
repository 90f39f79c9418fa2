"""The paged KV cache: one pool of blocks for the NoPE ("full") layers, one for the rope ("chunked") layers.

Legend: B tokens per block, K kv heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from batch.kernels import ops
from batch.kernels.paging import LayerCache
from l4tool.core.arch import TextArch
from l4tool.core.pages import fresh_pages


@dataclass(frozen=True)
class KVCache:
    """Every layer's keys and values; block ids are per kind."""

    layers: tuple[LayerCache, ...]
    block_size: int

    @property
    def nbytes(self) -> int:
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)


def allocate(
    arch: TextArch, num_full_blocks: int, num_chunked_blocks: int, block_size: int,
    device: torch.device, dtype: torch.dtype,
) -> KVCache:  # fmt: skip
    """Zeroed caches: attention may multiply a never-written slot by weight 0, so it must not hold NaN."""
    packed = ops.packs_cache(device, dtype, block_size, arch.head_dim)
    k_shape, v_shape = LayerCache.shapes(block_size, arch.num_kv_heads, arch.head_dim, packed)
    layers = []
    for has_rope in arch.rope_layers:
        blocks = num_chunked_blocks if has_rope else num_full_blocks
        k, v = (_zeros((blocks, *shape), dtype, device) for shape in (k_shape, v_shape))
        layers.append(LayerCache(k, v, packed))
    return KVCache(tuple(layers), block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that on the CPU take memory only where a block is used, while torch.zeros touches every page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(fresh_pages(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
