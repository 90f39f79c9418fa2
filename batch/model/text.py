"""The language model over one step's flat tokens.

Legend: T tokens in the step, H hidden, A heads, K kv heads, D head_dim, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from batch.kernels import ops
from batch.kernels.linears import Linear
from batch.kernels.paging import PagedBatch
from batch.model.head import LogitRows
from batch.model.inputs import PagedKind, StepInput
from batch.model.kv import KVCache
from batch.model.rope import cos_sin, inverse_frequencies, temperature
from batch.model.slices import rows_of, slices
from batch.model.weights import LayerWeights, MlpWeights, MoeWeights
from l4tool.core.arch import TextArch


@dataclass(frozen=True)
class StepTables:
    """What every layer of a step shares: rotation cos/sin float32 [T, D/2], temperature [T], where the keys lie."""

    cos: torch.Tensor
    sin: torch.Tensor
    q_scale: torch.Tensor | None
    full: PagedBatch
    chunked: PagedBatch


class TextSource(Protocol):
    """Where the weights come from: TextWeights has them, StreamedText reads them when they are asked for.

    A step asks for layers 0 … L - 1 and then for the head, and lets go of each before it asks for the next.
    """

    @property
    def norm(self) -> torch.Tensor: ...

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def layer(self, index: int) -> LayerWeights: ...

    def head(self) -> Linear: ...


class TextModel:
    """Embedding, decoder layers, final norm and lm_head. Holds weights only; all state is in the KVCache."""

    def __init__(self, arch: TextArch, weights: TextSource) -> None:
        self.arch, self.weights = arch, weights
        self.scale = arch.head_dim**-0.5
        self.inverse = inverse_frequencies(arch).to(weights.norm.device)  # [D/2]

    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor:
        """One step: writes the tokens' keys and values into `kv`, returns logits float32 [N, V]."""
        return self.rows(step, kv).logits()

    def rows(self, step: StepInput, kv: KVCache) -> LogitRows:
        """One step, up to the head; it may lie on the host still.

        Each layer computes all tokens before the next begins, a slice of them at a time where they are many.
        """
        device = self.inverse.device
        cut = slices(step)  # on the host, where that does not wait for anything
        step = step.to(device)
        hidden = self._embed(step)  # [T, H]
        moved = [(part.rows, part.step.to(device) if len(cut) > 1 else step) for part in cut]
        parts = [(rows, part, self._tables(part)) for rows, part in moved]
        deltas: list[tuple[torch.Tensor, ...]] = [() for _ in parts]  # what the layer before still adds to `hidden`
        for index in range(self.arch.num_layers):
            layer = self.weights.layer(index)
            for n, (rows, part, tables) in enumerate(parts):
                deltas[n] = self._layer(index, layer, hidden[rows], deltas[n], part, tables, kv)
            del layer  # or it would stay in memory while the next is waited for
        chosen = [rows_of(part.logits_rows, hidden[rows], *deltas[n]) for n, (rows, part, _) in enumerate(parts)]
        last, *more = (torch.cat(tensors) for tensors in zip(*chosen, strict=True))  # [N, H] each
        last = ops.add_rms_norm(last, tuple(more), self.weights.norm, self.arch.rms_norm_eps)
        del hidden, deltas, chosen
        return LogitRows(last, self.weights.head())

    def _layer(
        self, index: int, layer: LayerWeights, hidden: torch.Tensor, deltas: tuple[torch.Tensor, ...],
        step: StepInput, tables: StepTables, kv: KVCache,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """One layer over the tokens of one slice: adds `deltas` and the attention to hidden [T, H], returns what the
        feed-forward adds, 1 or 2 × [T, H]."""
        normed = ops.add_rms_norm(hidden, deltas, layer.input_norm, self.arch.rms_norm_eps)  # [T, H]
        attended = self._attention(index, layer, normed, step, tables, kv)  # [T, H]
        normed = ops.add_rms_norm(hidden, (attended,), layer.post_norm, self.arch.rms_norm_eps)
        return feed_forward(normed, layer.feed_forward)

    def _embed(self, step: StepInput) -> torch.Tensor:
        hidden = self.weights.embedding(step.token_ids)  # [T, H]
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
