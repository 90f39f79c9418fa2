"""What fits on a GPU: weights, the two paged KV caches, and what is set aside. Bytes throughout.

The engine sizes its cache with these functions and `plan` predicts it with them, so the two cannot drift apart.
Full blocks (NoPE layers) hold a sequence from its first token on; chunked blocks (rope layers) hold only the
attention chunk it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from l4tool.core.arch import TextArch

H100_USABLE_BYTES = int(79.1 * 2**30)
CONTEXT_BYTES = 512 * 2**20  # CUDA context, kernels and library workspaces of one process
DEVICE_SHARE = 0.9  # of what the weights leave free; the rest is for the allocator's fragments
KV_ITEM_BYTES = 2  # bfloat16
LARGEST_BLOCK = 32  # tokens
CPU_BLOCK = 16  # tokens; a shared beginning is computed again from its last whole block on, which a CPU feels
DEFAULT_MAX_BATCH_TOKENS = 2048
DEFAULT_MAX_SEQS = 256
MAX_POOL_BLOCKS = 1 << 20  # bounds the bookkeeping where a kind of layer is absent and its blocks cost nothing

Kind = Literal["full", "chunked"]


@dataclass(frozen=True)
class BlockNeed:
    """Numbers of blocks of each kind."""

    full: int
    chunked: int


@dataclass(frozen=True)
class Fit:
    """One device's memory. `kv_bytes` is what the KV cache gets; `kv_tokens` the longest sequence that it holds.

    `reserved_bytes`: CUDA context, one step's activations, and the share kept free for fragmentation.
    """

    weights_fit: bool
    reserved_bytes: int
    kv_bytes: int
    kv_tokens: int

    @property
    def fits(self) -> bool:
        return self.weights_fit and self.kv_tokens > 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def layers_of_kind(text: TextArch, kind: Kind) -> int:
    """How many layers keep their keys in the pool `kind`."""
    rope = sum(text.rope_layers)
    return rope if kind == "chunked" else text.num_layers - rope


def bytes_per_block(text: TextArch, kind: Kind, block_size: int, item_bytes: int = KV_ITEM_BYTES) -> int:
    """Bytes that one block of `kind` takes over all its layers, K and V."""
    return 2 * layers_of_kind(text, kind) * block_size * text.num_kv_heads * text.head_dim * item_bytes


def largest_block(text: TextArch, most: int = LARGEST_BLOCK) -> int:
    """Tokens per block: the largest power of two up to `most` (one itself) that divides the attention chunk."""
    size = most
    while text.attention_chunk_size % size:
        size //= 2
    return size


def blocks_for(text: TextArch, num_tokens: int, block_size: int) -> BlockNeed:
    """The most blocks that one sequence of `num_tokens` holds at any time of its life."""
    chunk = min(num_tokens, text.attention_chunk_size)
    return BlockNeed(ceil_div(num_tokens, block_size), ceil_div(chunk, block_size))


def blocks_bytes(text: TextArch, blocks: BlockNeed, block_size: int, item_bytes: int = KV_ITEM_BYTES) -> int:
    """Bytes of so many blocks."""
    full = blocks.full * bytes_per_block(text, "full", block_size, item_bytes)
    return full + blocks.chunked * bytes_per_block(text, "chunked", block_size, item_bytes)


def kv_bytes(text: TextArch, num_tokens: int, item_bytes: int = KV_ITEM_BYTES, block_size: int = 1) -> int:
    """KV cache of one sequence of `num_tokens`: a rope layer keeps at most its current attention chunk."""
    return blocks_bytes(text, blocks_for(text, num_tokens, block_size), block_size, item_bytes)


def kv_tokens(text: TextArch, num_bytes: int, item_bytes: int = KV_ITEM_BYTES, block_size: int = 1) -> int:
    """The longest sequence whose KV cache fits `num_bytes`, at most the model's context length."""
    low, high = 0, text.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes(text, middle, item_bytes, block_size) <= num_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def step_bytes(text: TextArch, max_batch_tokens: int = DEFAULT_MAX_BATCH_TOKENS) -> int:
    """A generous bound on one step's own tensors: a dozen activations a token in float32, three copies of logits."""
    widest = max(text.hidden_size, text.intermediate_size, text.intermediate_size_mlp)
    return max_batch_tokens * 4 * (12 * widest) + 3 * 4 * text.vocab_size * min(max_batch_tokens, DEFAULT_MAX_SEQS)


def device_kv_bytes(free_bytes: int, num_step_bytes: int) -> int:
    """What the KV cache gets of a device on which `free_bytes` are free once the weights are there."""
    return max(int(free_bytes * DEVICE_SHARE) - num_step_bytes, 0)


def split_memory(
    kv_bytes: int, full_block_bytes: int, chunked_block_bytes: int, most: BlockNeed, at_least: BlockNeed
) -> BlockNeed | None:
    """Divide `kv_bytes` over the two pools; None when it cannot hold `at_least`.

    A sequence no longer than one attention chunk needs as many blocks of one kind as of the other, so the pools
    get equal counts N = kv_bytes / (full + chunked bytes). Chunked blocks past `most` (every sequence with a whole
    chunk) could never be used: what they would cost goes to full blocks, which grow with the text. `at_least` (the
    longest request so far) shifts the balance where equal counts would not hold it.
    """
    if at_least.full * full_block_bytes + at_least.chunked * chunked_block_bytes > kv_bytes:
        return None
    pair_bytes = full_block_bytes + chunked_block_bytes
    chunked = min(kv_bytes // pair_bytes, most.chunked) if chunked_block_bytes else most.chunked
    chunked = max(chunked, at_least.chunked)
    left_bytes = kv_bytes - chunked * chunked_block_bytes
    full = min(left_bytes // full_block_bytes, most.full) if full_block_bytes else most.full
    if full < at_least.full and full_block_bytes and chunked_block_bytes:
        full = at_least.full
        chunked = min((kv_bytes - full * full_block_bytes) // chunked_block_bytes, most.chunked)
    return BlockNeed(full, chunked)


def pools(
    text: TextArch, kv_bytes: int, block_size: int, item_bytes: int, max_seqs: int, at_least: BlockNeed
) -> BlockNeed | None:
    """The engine's two pools in `kv_bytes` for `max_seqs` sequences; None when they cannot hold `at_least`."""
    each = blocks_for(text, text.max_position_embeddings, block_size)
    most = BlockNeed(
        max(min(max_seqs * each.full, MAX_POOL_BLOCKS), at_least.full),
        max(min(max_seqs * each.chunked, MAX_POOL_BLOCKS), at_least.chunked),
    )
    full_bytes = bytes_per_block(text, "full", block_size, item_bytes)
    return split_memory(kv_bytes, full_bytes, bytes_per_block(text, "chunked", block_size, item_bytes), most, at_least)


def fit(
    text: TextArch, weight_bytes: int, device_bytes: int = H100_USABLE_BYTES, item_bytes: int = KV_ITEM_BYTES
) -> Fit:
    """Weights of `weight_bytes` on a device of `device_bytes`: what is left for the KV cache, and what it holds.

    The model: CUDA context, weights, `device_kv_bytes` of what is then free.
    """
    free_bytes = device_bytes - CONTEXT_BYTES - weight_bytes
    kv = device_kv_bytes(free_bytes, step_bytes(text))
    tokens = kv_tokens(text, kv, item_bytes, largest_block(text)) if kv else 0
    kept_free = max(free_bytes, 0) - int(max(free_bytes, 0) * DEVICE_SHARE)
    return Fit(free_bytes > 0, CONTEXT_BYTES + step_bytes(text) + kept_free, kv, tokens)
