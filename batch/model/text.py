"""The language model over one step's flat tokens.

Legend: T tokens in the step, H hidden, A heads, K kv heads, D head_dim, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batch.kernels import ops
from batch.kernels.paging import PagedBatch
from batch.model.inputs import PagedKind, StepInput
from batch.model.kv import KVCache
from batch.model.rope import cos_sin, inverse_frequencies, temperature
from batch.model.weights import LayerWeights, MlpWeights, MoeWeights, TextWeights
from l4tool.core.arch import TextArch


@dataclass(frozen=True)
class StepTables:
    """What every layer of a step shares: rotation cos/sin float32 [T, D/2], temperature [T], where the keys lie."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None
    full: PagedBatch
    chunked: PagedBatch


class TextModel:
    """Embedding, decoder layers, final norm and lm_head. Holds weights only; all state is in the KVCache."""

    def __init__(self, arch: TextArch, weights: TextWeights) -> None:
        self.arch, self.weights = arch, weights
        self.scale = arch.head_dim**-0.5
        self.inverse = inverse_frequencies(arch).to(weights.embed.device)  # [D/2]

    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor:
        """One step: writes the tokens' keys and values into `kv`, returns logits float32 [N, V]."""
        hidden = self._embed(step)  # [T, H]
        tables = self._tables(step)
        deltas: tuple[torch.Tensor, ...] = ()  # what the layer before still has to add to `hidden`
        for index, layer in enumerate(self.weights.layers):
            normed = ops.add_rms_norm(hidden, deltas, layer.input_norm, self.arch.rms_norm_eps)  # [T, H]
            attended = self._attention(index, layer, normed, step, tables, kv)  # [T, H]
            normed = ops.add_rms_norm(hidden, (attended,), layer.post_norm, self.arch.rms_norm_eps)
            deltas = feed_forward(normed, layer.feed_forward)  # 1 or 2 × [T, H]
        rows = step.logits_rows
        last = ops.add_rms_norm(
            hidden[rows], tuple(delta[rows] for delta in deltas), self.weights.norm, self.arch.rms_norm_eps
        )  # [N, H]
        return ops.linear(last, self.weights.lm_head).float()  # [N, V]

    def _embed(self, step: StepInput) -> torch.Tensor:
        hidden = self.weights.embed[step.token_ids]  # [T, H]
        if step.image_rows is not None:
            assert step.image_features is not None
            hidden[step.image_rows] = step.image_features.to(hidden.dtype)  # [P, H]
        return hidden

    def _tables(self, step: StepInput) -> StepTables:
        cos, sin = cos_sin(step.positions, self.inverse)
        longest_chunk = min(step.max_context_len, self.arch.attention_chunk_size)
        return StepTables(
            cos=cos,
            sin=sin,
            q_scale=temperature(step.positions, self.arch),
            full=paged_batch(step, step.full, step.max_context_len),
            chunked=paged_batch(step, step.chunked, longest_chunk),
        )

    def _attention(
        self, index: int, layer: LayerWeights, x: torch.Tensor, step: StepInput, tables: StepTables, kv: KVCache
    ) -> torch.Tensor:
        arch = self.arch
        qkv = ops.linear(x, layer.qkv)  # [T, (A + 2K)·D]
        cache = kv.layers[index]
        if arch.rope_layers[index]:
            where, batch = step.chunked, tables.chunked
            eps = arch.rms_norm_eps if arch.use_qk_norm else None
            rotation = (tables.cos, tables.sin)
            q = ops.store_qkv(qkv, arch.num_heads, cache, where.slots, rotation, eps, None)  # [T, A, D]
        else:
            where, batch = step.full, tables.full
            q = ops.store_qkv(qkv, arch.num_heads, cache, where.slots, None, None, tables.q_scale)
        out = ops.paged_attention(q, cache, batch, self.scale)  # [T, A·D]
        return ops.linear(out, layer.o)  # [T, H]


def paged_batch(step: StepInput, kind: PagedKind, max_context_len: int) -> PagedBatch:
    """The kernels' view of one kind: lengths counted from slot 0 of each sequence's block table."""
    cached = step.context_len - kind.kv_start  # [S]
    return PagedBatch(kind.block_table, step.query_start, cached, step.max_query_len, max_context_len)


def feed_forward(x: torch.Tensor, weights: MoeWeights | MlpWeights) -> tuple[torch.Tensor, ...]:
    """x [T, H] → what to add to the residual, each [T, H]: one dense MLP's output, or the shared and the routed one."""
    if isinstance(weights, MlpWeights):
        return (ops.mlp(x, weights.gate_up, weights.down),)
    return ops.moe(x, weights.router, weights.experts, weights.shared_gate_up, weights.shared_down)
