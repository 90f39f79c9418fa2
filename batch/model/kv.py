"""The paged KV cache: one pool of blocks for the NoPE ("full") layers, one for the rope ("chunked") layers.

Legend: B tokens per block, K kv heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from l4tool.core.arch import TextArch

CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class KVCache:
    """Per layer: k[layer] and v[layer] [num_blocks, B, K, D] in the activation dtype; block ids are per kind."""

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    block_size: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))


def allocate(
    arch: TextArch, num_full_blocks: int, num_chunked_blocks: int, block_size: int,
    device: torch.device, dtype: torch.dtype,
) -> KVCache:  # fmt: skip
    """Zeroed caches: attention may multiply a never-written slot by weight 0, so it must not hold NaN."""
    pools: list[list[torch.Tensor]] = [[], []]
    for pool in pools:
        for has_rope in arch.rope_layers:
            blocks = num_chunked_blocks if has_rope else num_full_blocks
            shape = (blocks, block_size, arch.num_kv_heads, arch.head_dim)
            pool.append(_zeros(shape, dtype, device))
    return KVCache(tuple(pools[0]), tuple(pools[1]), block_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that on the CPU take memory only where a block is used: calloc, while torch.zeros touches every page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).view(shape)
