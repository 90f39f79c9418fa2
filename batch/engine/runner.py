"""From a plan to logits: builds the model's StepInput and calls it. The only file of the engine that makes tensors.

Legend as in batch/model/inputs.py: T tokens, S sequences, P image rows, N rows of logits.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from batch.engine.blocks import BlockManager, BlockTable
from batch.engine.graphs import CaptureError, Capturer, DecodeGraphs, can_capture
from batch.engine.image_features import Encode, FeatureCache
from batch.engine.sequence import Piece, Sequence
from batch.model.head import LogitRows
from batch.model.inputs import PagedKind, StepInput
from batch.model.kv import KVCache
from batch.model.model import Model
from batch.requests import ImageTiles
from l4tool.core.console import note
from l4tool.core.errors import L4Error


class ImageEncodingError(Exception):
    """The vision tower failed on one sequence's images; nobody else is concerned."""

    def __init__(self, sequence: Sequence, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.sequence = sequence
        self.cause = cause


class Runner:
    """Runs steps of one model on one KV cache, of `max_seqs` sequences at most. Pictures are encoded through
    `features`."""

    def __init__(self, model: Model, blocks: BlockManager, features: FeatureCache, max_seqs: int) -> None:
        self.model = model
        self.blocks = blocks
        self.features = features
        self.kv: KVCache | None = model.allocate_kv(
            blocks.full.num_blocks, blocks.chunked.num_blocks, blocks.block_size
        )
        self.graphs: DecodeGraphs | None = None
        if model.device.type == "cuda" and can_capture(model, self.kv):
            self.graphs = DecodeGraphs(model, self.kv, blocks, max_seqs, Capturer())

    def close(self) -> None:
        """Drop the cache, and the graphs that write to it."""
        self.kv = self.graphs = None

    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits float32 [N, V] of the pieces that want them."""
        assert self.kv is not None, "the engine is closed"
        if self.graphs is not None and self.graphs.takes(step):
            try:
                return self.graphs.rows(step).logits()
            except CaptureError as error:
                note(f"{self.model.device} captures no steps ({error}): decoding launches every kernel by itself")
                self.graphs = None
        return self.model.forward(step, self.kv)

    def rows(self, step: StepInput) -> LogitRows:
        """The same rows before the head."""
        assert self.kv is not None, "the engine is closed"
        return self.model.rows(step, self.kv)

    def build(self, plan: list[Piece], token_ids: torch.Tensor | None = None) -> StepInput:
        """StepInput of a plan, on the CPU but for image features, and for `token_ids` int64 [T] where the host does not
        know them yet. Raises ImageEncodingError naming the sequence."""
        if token_ids is None:
            tokens: list[int] = []
            for p in plan:
                tokens += p.sequence.tokens[p.start : p.end]
            token_ids = torch.from_numpy(np.array(tokens, np.int64))
        starts, ends = np.array([(p.start, p.end) for p in plan]).T  # [S] each
        lengths = ends - starts
        query_start = np.zeros(len(plan) + 1, np.int64)
        np.cumsum(lengths, out=query_start[1:])
        owner = np.repeat(np.arange(len(plan)), lengths)  # [T], which piece a token belongs to
        positions = np.arange(len(owner)) + (starts - query_start[:-1])[owner]
        held = [p.sequence.held for p in plan]
        chunk_start = np.array([h.chunk_start for h in held])
        image_rows, image_features = self._images(plan, query_start)
        shifts = query_start[:-1] - starts
        wanted = [np.arange(p.logits_from, p.end) + shift for p, shift in zip(plan, shifts, strict=True)]

        return StepInput(
            token_ids=token_ids,
            positions=torch.from_numpy(positions),
            query_start=torch.from_numpy(query_start.astype(np.int32)),
            context_len=torch.from_numpy(ends.astype(np.int32)),
            full=self._kind([h.full for h in held], np.zeros_like(chunk_start), positions, owner),
            chunked=self._kind([h.chunked for h in held], chunk_start, positions, owner),
            logits_rows=torch.from_numpy(np.concatenate(wanted)),
            max_query_len=int(lengths.max()),
            max_context_len=int(ends.max()),
            image_rows=image_rows,
            image_features=image_features,
        )

    def _kind(
        self, tables: list[BlockTable], kv_start: np.ndarray, positions: np.ndarray, owner: np.ndarray
    ) -> PagedKind:
        """Block table and slots of one kind of layer."""
        size = self.blocks.block_size
        table = np.zeros((len(tables), max(t.length for t in tables)), np.int32)  # [S, max_blocks]
        for row, blocks in zip(table, tables, strict=True):
            row[: blocks.length] = blocks.ids
        block, within = np.divmod(positions - kv_start[owner], size)  # [T], within the cached part
        return PagedKind(
            block_table=torch.from_numpy(table),
            kv_start=torch.from_numpy(kv_start.astype(np.int32)),
            slots=torch.from_numpy(table[owner, block].astype(np.int64) * size + within),
        )

    def _images(self, plan: list[Piece], query_start: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """image_rows int64 [P] and image_features [P, H] of the step, or None twice."""
        shown = [
            (piece, min(piece.end, piece.sequence.prompt_len), images, first)
            for piece, first in zip(plan, query_start, strict=False)
            if (images := piece.sequence.images) is not None and piece.start < piece.sequence.prompt_len
        ]
        encode = self._together(
            [image for piece, end, images, _ in shown for image in images.missing(piece.start, end)]
        )
        rows: list[np.ndarray] = []
        features: list[torch.Tensor] = []
        for piece, end, images, first in shown:
            try:
                found, pieces = images.slice(piece.start, end, encode)
            except (L4Error, torch.AcceleratorError):
                raise  # the tower cannot be read, or the device is gone
            except Exception as error:
                raise ImageEncodingError(piece.sequence, error) from error
            rows.append(found + first)
            features += pieces
        if not features:
            return None, None
        return torch.from_numpy(np.concatenate(rows)), torch.cat(features)

    def _together(self, images: list[ImageTiles]) -> Encode:
        """Encode all pictures that a step lacks at once, whoever asked for them; the result looks them up. Where that
        fails, they are encoded sequence by sequence instead, to find out whose picture it is."""
        if len(images) > 1:
            with contextlib.suppress(Exception):
                ready = dict(zip(map(id, images), self.features.encode(images), strict=True))
                return lambda wanted: [ready[id(image)] for image in wanted]
        return self.features.encode
