"""Decoding steps captured in CUDA graphs, one for each size of batch: a replay costs the host some small copies and one
launch, where launching some twenty kernels for each layer would take longer than they run.

A step is put into buffers that stay where they are; rows that fill up a size have no slot, see no keys, and are
dropped. What is captured ends before the head, so that the graphs keep hidden states only, not logits.

Legend as in batch/model/inputs.py: S sequences in the step, which has one token of each.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace

import torch

from batch.engine.blocks import BlockManager
from batch.kernels import ops
from batch.kernels.linears import Experts
from batch.model.head import LogitRows
from batch.model.inputs import PagedKind, StepInput
from batch.model.kv import KVCache
from batch.model.model import Model
from batch.model.weights import MoeWeights

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
Replay = Callable[[], None]
Capture = Callable[[Callable[[], LogitRows]], tuple[Replay, LogitRows]]


class CaptureError(Exception):
    """The device does not capture what it runs, or has no memory left for a graph."""


def can_capture(model: Model, kv: KVCache) -> bool:
    """Whether decoding steps of this model can be captured: see `ops.captures`."""
    layers = [model.text.weights.layer(index).feed_forward for index in range(model.arch.text.num_layers)]
    experts: list[Experts] = [layer.experts for layer in layers if isinstance(layer, MoeWeights)]
    return ops.captures(experts, kv.layers[0], model.device, model.dtype)


class Capturer:
    """Captures in CUDA graphs that share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], LogitRows]) -> tuple[Replay, LogitRows]:
        """`run` once to compile what it needs, once more to record it: (what runs it again, its result's place)."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                rows = run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
        return graph.replay, rows


class DecodeGraphs:
    """Decoding steps of `model` on `kv`, of at most `max_seqs` sequences that hold blocks of `blocks`. A size is
    captured when it is first met."""

    def __init__(self, model: Model, kv: KVCache, blocks: BlockManager, max_seqs: int, capture: Capture) -> None:
        self._model, self._kv, self._capture = model, kv, capture
        self._most = most = SIZES[bisect.bisect_left(SIZES, min(max_seqs, SIZES[-1]))]
        text = model.arch.text
        self._longest = text.max_position_embeddings
        longest = -(-self._longest // blocks.block_size)
        chunk = text.attention_chunk_size // blocks.block_size

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        def kind(width: int) -> PagedKind:
            return PagedKind(ints(most, width), ints(most), ints(most, dtype=torch.int64))

        self._step = StepInput(
            token_ids=ints(most, dtype=torch.int64),
            positions=ints(most, dtype=torch.int64),
            query_start=torch.arange(most + 1, dtype=torch.int32, device=model.device),
            context_len=ints(most),
            full=kind(min(longest, blocks.full.num_blocks)),
            chunked=kind(min(longest, chunk, blocks.chunked.num_blocks)),
            logits_rows=torch.arange(most, device=model.device),
            max_query_len=1,
            max_context_len=self._longest,
        )
        self._captured: dict[int, tuple[Replay, LogitRows]] = {}

    def takes(self, step: StepInput) -> bool:
        """One token of each sequence, all of which want logits, and no pictures."""
        tokens = step.token_ids.shape[0]
        decodes = step.max_query_len == 1 and step.image_rows is None and step.logits_rows.shape[0] == tokens
        return decodes and tokens <= self._most

    @torch.inference_mode()
    def rows(self, step: StepInput) -> LogitRows:
        """As `Model.rows`; the result is good until the next step. Raises CaptureError."""
        count = step.token_ids.shape[0]
        size = SIZES[bisect.bisect_left(SIZES, count)]
        self._fill(step, count, size)
        if size not in self._captured:
            self._captured[size] = self._capture_size(size)
        replay, rows = self._captured[size]
        replay()
        return replace(rows, hidden=rows.hidden[:count])

    def _capture_size(self, size: int) -> tuple[Replay, LogitRows]:
        try:
            return self._capture(lambda: self._model.rows(self._part(size), self._kv))
        except RuntimeError as error:
            raise CaptureError(str(error)) from error

    def _fill(self, step: StepInput, count: int, size: int) -> None:
        """Put the step's `count` sequences into the buffers, and nobody into those up to `size`."""
        mine = self._step
        mine.token_ids[:count].copy_(step.token_ids, non_blocking=True)
        mine.positions[:count].copy_(step.positions, non_blocking=True)
        mine.context_len[:count].copy_(step.context_len, non_blocking=True)
        for ours, theirs in ((mine.full, step.full), (mine.chunked, step.chunked)):
            ours.block_table[:count, : theirs.block_table.shape[1]].copy_(theirs.block_table, non_blocking=True)
            ours.kv_start[:count].copy_(theirs.kv_start, non_blocking=True)
            ours.slots[:count].copy_(theirs.slots, non_blocking=True)
            ours.slots[count:size].fill_(-1)
            ours.kv_start[count:size].zero_()
        mine.token_ids[count:size].zero_()
        mine.positions[count:size].zero_()
        mine.context_len[count:size].zero_()

    def _part(self, size: int) -> StepInput:
        """The buffers of `size` sequences."""
        mine = self._step

        def kind(of: PagedKind) -> PagedKind:
            return PagedKind(of.block_table[:size], of.kv_start[:size], of.slots[:size])

        return replace(
            mine, token_ids=mine.token_ids[:size], positions=mine.positions[:size],
            query_start=mine.query_start[: size + 1], context_len=mine.context_len[:size],
            full=kind(mine.full), chunked=kind(mine.chunked), logits_rows=mine.logits_rows[:size],
        )  # fmt: skip
