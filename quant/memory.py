"""What fits on a GPU: weights, KV cache, and what is set aside. Bytes throughout; one H100 as the yardstick."""

from __future__ import annotations

from dataclasses import dataclass

from l4tool.core.arch import Arch

H100_USABLE_BYTES = int(79.1 * 2**30)
RESERVED_BYTES = 2 * 2**30  # CUDA context and activations of one prefill chunk
KV_ITEM_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Fit:
    """`kv_tokens`: length of the one sequence whose cache fills what is left; 0 when the weights do not fit."""

    fits: bool
    left_bytes: int
    kv_tokens: int


def kv_bytes(arch: Arch, num_tokens: int, item_bytes: int = KV_ITEM_BYTES) -> int:
    """KV cache of one sequence of `num_tokens`: a rope layer keeps at most its current attention chunk."""
    text = arch.text
    per_layer = 2 * text.num_kv_heads * text.head_dim * item_bytes  # keys and values of one token
    chunked = sum(text.rope_layers)
    full = text.num_layers - chunked
    return per_layer * (full * num_tokens + chunked * min(num_tokens, text.attention_chunk_size))


def kv_tokens(arch: Arch, num_bytes: int, item_bytes: int = KV_ITEM_BYTES) -> int:
    """The longest sequence whose KV cache fits `num_bytes`, at most the model's context length."""
    low, high = 0, arch.text.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes(arch, middle, item_bytes) <= num_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def fit(arch: Arch, weight_bytes: int, device_bytes: int = H100_USABLE_BYTES) -> Fit:
    """Do weights of `weight_bytes` fit a device of `device_bytes`, and how long a sequence beside them?"""
    left = device_bytes - RESERVED_BYTES - weight_bytes
    tokens = kv_tokens(arch, left) if left > 0 else 0
    return Fit(left > 0 and tokens > 0, max(left, 0), tokens)
