"""Weights and KV cache of one model on N GPUs of a kind.

Tensor parallel over N GPUs: attention heads, experts' and MLPs' inner dimension and the vocabulary are split evenly;
router, norms, vision tower and projector are on every GPU. Key and value heads are split too; where there are fewer
of them than GPUs, each GPU holds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from l4tool.core.arch import Arch, TextArch
from quant import memory
from quant.gpus import GPUS, Gpu

MAX_GPUS = 1024
MORE_GPUS = (1, 2, 4, 8, 16, 32, 64)  # counts that `would_fit` tries
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_REPLICATED = re.compile(r"(^|\.)(vision_model|multi_modal_projector|router)\.|norm\.weight$")
_KEY_VALUE = re.compile(r"\.self_attn\.[kv]_proj\.")
_NOT_LOADED = ".weight_shape"  # of packed weights: the engine knows the shape from the packed tensor


@dataclass(frozen=True)
class Hardware:
    """`count` GPUs of one kind."""

    gpu: Gpu
    count: int

    def __str__(self) -> str:
        return f"{self.count} × {self.gpu.name}"


@dataclass(frozen=True)
class Demand:
    """What shall run: sequences of `context_tokens`, prompt and answer together, `concurrency` of them at once.
    `kv_dtype` "fp8": keys and values take a byte each, "auto": what the model's dtype takes."""

    context_tokens: int
    concurrency: int = 1
    kv_dtype: str = "auto"


@dataclass(frozen=True)
class Fitting:
    """One answer. Bytes and blocks are those of each GPU.

    `sequences`: how many of the demanded length the engine's two pools hold at once; `sequences_by_memory`: how many
    the same bytes would hold if the pools were divided for exactly this length; both at most the number that the
    engine runs at once (256, or the concurrency asked for).
    `obstacle`: why the model cannot be split over so many GPUs, or None.
    """

    obstacle: str | None
    weight_bytes: int
    reserved_bytes: int
    kv_bytes: int
    kv_bytes_per_sequence: int
    block_tokens: int
    full_blocks: int
    chunked_blocks: int
    longest_tokens: int
    sequences: int
    sequences_by_memory: int
    weights_fit: bool
    fits: bool


@dataclass(frozen=True)
class Weights:
    """Bytes as the engine loads them: split over the GPUs, split by key/value head, and whole on each GPU."""

    split: int
    key_value: int
    replicated: int

    def per_gpu(self, text: TextArch, count: int) -> int:
        """Bytes on each of `count` GPUs."""
        key_value = memory.ceil_div(self.key_value, min(count, text.num_kv_heads))
        return memory.ceil_div(self.split, count) + key_value + self.replicated


def weigh(arch: Arch, tensors: Iterable[tuple[str, int]]) -> Weights:
    """`tensors`: (canonical or stored name, bytes) of everything in the checkpoint. A tied lm_head is a second copy."""
    split = key_value = replicated = 0
    for name, nbytes in tensors:
        if name.endswith(_NOT_LOADED):
            continue
        if arch.text.tie_word_embeddings and name.endswith("embed_tokens.weight"):
            nbytes *= 2
        if _REPLICATED.search(name):
            replicated += nbytes
        elif _KEY_VALUE.search(name):
            key_value += nbytes
        else:
            split += nbytes
    return Weights(split, key_value, replicated)


def fit_on(arch: Arch, model: Weights, hardware: Hardware, demand: Demand) -> Fitting:
    """How the model, with these weights, lies on the hardware, and whether the demand is met."""
    count = hardware.count
    text = _per_gpu(arch.text, count)
    weights = model.per_gpu(arch.text, count)
    item_bytes, block = 1 if demand.kv_dtype == "fp8" else ITEM_BYTES[arch.dtype], memory.largest_block(text)
    room = memory.fit(text, weights, hardware.gpu.usable_bytes, item_bytes)
    need = memory.blocks_for(text, demand.context_tokens, block)
    seqs = max(memory.DEFAULT_MAX_SEQS, demand.concurrency)
    pools = memory.pools(text, room.kv_bytes, block, item_bytes, seqs, need) if room.kv_bytes else None
    held = min(pools.full // need.full, pools.chunked // need.chunked, seqs) if pools else 0
    each_bytes = memory.blocks_bytes(text, need, block, item_bytes)
    obstacle = cannot_split(arch.text, count)
    return Fitting(
        obstacle=obstacle,
        weight_bytes=weights,
        reserved_bytes=room.reserved_bytes,
        kv_bytes=room.kv_bytes,
        kv_bytes_per_sequence=each_bytes,
        block_tokens=block,
        full_blocks=pools.full if pools else 0,
        chunked_blocks=pools.chunked if pools else 0,
        longest_tokens=room.kv_tokens,
        sequences=held,
        sequences_by_memory=min(room.kv_bytes // each_bytes, seqs),
        weights_fit=room.weights_fit,
        fits=obstacle is None and held >= demand.concurrency,
    )


def cannot_split(text: TextArch, count: int) -> str | None:
    """What does not divide over `count` GPUs, or None."""
    if text.num_heads % count:
        return f"{text.num_heads} attention heads do not divide over {count} GPUs"
    if text.num_kv_heads % count and count % text.num_kv_heads:
        return f"{text.num_kv_heads} key/value heads do not divide over {count} GPUs"
    inner = [text.intermediate_size] if text.moe_layers else []
    inner += [text.intermediate_size_mlp] if len(text.moe_layers) < text.num_layers else []
    for size in inner:
        if size % count:
            return f"an inner dimension of {size} does not divide over {count} GPUs"
    return None


def would_fit(arch: Arch, model: Weights, hardware: Hardware, demand: Demand) -> list[Hardware]:
    """What to use instead: of this kind of GPU and of each larger one the fewest that do, at least as many as asked."""
    kinds = [hardware.gpu, *(gpu for gpu in GPUS if gpu.usable_bytes > hardware.gpu.usable_bytes)]
    counts = sorted({hardware.count, *(count for count in MORE_GPUS if count > hardware.count)})
    ways = ((Hardware(gpu, count) for count in counts) for gpu in kinds)
    found = [next((way for way in each if fit_on(arch, model, way, demand).fits), None) for each in ways]
    return [way for way in found if way is not None]


def _per_gpu(text: TextArch, count: int) -> TextArch:
    """The architecture as one GPU sees it, for the sizes of its KV cache."""
    return replace(text, num_kv_heads=memory.ceil_div(text.num_kv_heads, count))
