"""Decoding steps captured in CUDA graphs, one for each size of batch: a replay costs the host some small copies and one
launch, where launching some twenty kernels for each layer would take longer than they run.

A step is put into buffers that stay where they are; rows that fill up a size have no slot, see no keys, and are
dropped. A size is captured with such rows alone. What is captured ends before the head, so that the graphs keep hidden
states only, not logits.

Legend as in batch/model/inputs.py: S sequences in the step, which has one token of each.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from batch.engine.blocks import BlockManager
from batch.kernels import ops
from batch.kernels.linears import Experts
from batch.kernels.transfer import pack, send, unpack
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


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for each stream that it was ever used on."""
    return torch.cuda.Stream()


class Capturer:
    """Captures in CUDA graphs that share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _capture_stream()

    def __call__(self, run: Callable[[], LogitRows]) -> tuple[Replay, LogitRows]:
        """`run` once to compile what it needs, once more to record it: (what runs it again, its result's place)."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                rows = run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
        return graph.replay, rows


class DecodeGraphs:
    """Decoding steps of `model` on `kv`, of at most `max_seqs` sequences that hold blocks of `blocks`. A size is
    captured when it is first met."""

    def __init__(self, model: Model, kv: KVCache, blocks: BlockManager, max_seqs: int, capture: Capture) -> None:
        self._model, self._kv, self._capture = model, kv, capture
        self._most = SIZES[bisect.bisect_left(SIZES, min(max_seqs, SIZES[-1]))]
        text, size = model.arch.text, blocks.block_size
        self._longest = text.max_position_embeddings
        longest, chunk = -(-self._longest // size), text.attention_chunk_size // size
        # One table of each kind for all sizes: as wide as the longest sequence may ever need.
        widths = (min(longest, blocks.full.num_blocks), min(longest, chunk, blocks.chunked.num_blocks))
        shapes = [(self._most, width) for width in widths]
        self._tables = [torch.zeros(shape, dtype=torch.int32, device=model.device) for shape in shapes]
        self._captured: dict[int, tuple[_Buffers, Replay, LogitRows]] = {}

    def takes(self, step: StepInput) -> bool:
        """One token of each sequence, all of which want logits, and no pictures."""
        tokens = step.token_ids.shape[0]
        decodes = step.max_query_len == 1 and step.image_rows is None and step.logits_rows.shape[0] == tokens
        return decodes and tokens <= self._most

    @torch.inference_mode()
    def rows(self, step: StepInput) -> LogitRows:
        """As `Model.rows`, of a step on the host; the result is good until the next step. Raises CaptureError."""
        count = step.token_ids.shape[0]
        size = SIZES[bisect.bisect_left(SIZES, count)]
        if not self._captured:
            self._add(self._most)  # first, so that all others find their memory in the pool
        if size not in self._captured:
            self._add(size)
        buffers, replay, rows = self._captured[size]
        buffers.fill(step)
        replay()
        return replace(rows, hidden=rows.hidden[:count])

    def _add(self, size: int) -> None:
        """Capture steps of one size, of nobody's tokens."""
        buffers = _Buffers(size, self._tables, self._longest)
        try:
            captured = self._capture(lambda: self._model.rows(buffers.step, self._kv))
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self._captured[size] = (buffers, *captured)


class _Buffers:
    """The step of `size` sequences that a graph reads. What changes in it from one to the next is a single copy, and
    one for each table."""

    def __init__(self, size: int, tables: list[torch.Tensor], longest: int) -> None:
        self._size = size
        device = tables[0].device
        nobody = torch.full((size,), -1)
        blank = [torch.zeros_like(nobody)] * 2 + [nobody] * 2 + [torch.zeros(size, dtype=torch.int32)] * 3
        self._packed = pack(blank, device).to(device, non_blocking=True)
        ids, positions, full_slots, chunked_slots, context_len, full_start, chunk_start = unpack(self._packed, blank)
        self._tables = [table[:size] for table in tables]
        places = torch.arange(size + 1, device=device)
        self.step = StepInput(
            ids, positions, query_start=places.int(), context_len=context_len,
            full=PagedKind(self._tables[0], full_start, full_slots),
            chunked=PagedKind(self._tables[1], chunk_start, chunked_slots),
            logits_rows=places[:size], max_query_len=1, max_context_len=longest,
        )  # fmt: skip

    def fill(self, step: StepInput) -> None:
        """Become a step that lies on the host, but for token ids that were drawn on the device; nobody is in the places
        behind it."""
        count, device = step.token_ids.shape[0], self._packed.device
        are_here = step.token_ids.device.type != "cpu"
        ids = torch.zeros(count, dtype=torch.int64) if are_here else step.token_ids
        vectors = (
            (ids, 0), (step.positions, 0), (step.full.slots, -1), (step.chunked.slots, -1), (step.context_len, 0),
            (step.full.kv_start, 0), (step.chunked.kv_start, 0),
        )  # fmt: skip
        filled_up = [F.pad(vector, (0, self._size - count), value=nobody) for vector, nobody in vectors]
        self._packed.copy_(pack(filled_up, device), non_blocking=True)
        if are_here:
            self.step.token_ids[:count].copy_(step.token_ids)
        tables = send([step.full.block_table, step.chunked.block_table], device)
        for mine, theirs in zip(self._tables, tables, strict=True):
            mine[:count, : theirs.shape[1]].copy_(theirs)
