"""From a plan to logits: builds the model's StepInput and calls it. The only file of the engine that makes tensors.

Legend as in batch/model/inputs.py: T tokens, S sequences, P image rows, N rows of logits.
"""

from __future__ import annotations

import numpy as np
import torch

from batch.engine.blocks import BlockManager, BlockTable
from batch.engine.image_features import FeatureCache
from batch.engine.sequence import Piece, Sequence
from batch.model.inputs import PagedKind, StepInput
from batch.model.kv import KVCache
from batch.model.model import Model
from l4tool.core.errors import L4Error


class ImageEncodingError(Exception):
    """The vision tower failed on one sequence's images; nobody else is concerned."""

    def __init__(self, sequence: Sequence, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.sequence = sequence
        self.cause = cause


class Runner:
    """Runs steps of one model on one KV cache. Pictures are encoded through `features`."""

    def __init__(self, model: Model, blocks: BlockManager, features: FeatureCache) -> None:
        self.model = model
        self.blocks = blocks
        self.features = features
        self.kv: KVCache | None = model.allocate_kv(
            blocks.full.num_blocks, blocks.chunked.num_blocks, blocks.block_size
        )

    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits float32 [N, V] of the pieces that want them."""
        assert self.kv is not None, "the engine is closed"
        return self.model.forward(step, self.kv)

    def build(self, plan: list[Piece]) -> StepInput:
        """StepInput of a plan, on the model's device. Raises ImageEncodingError naming the sequence."""
        device = self.model.device
        tokens = np.concatenate([np.array(p.sequence.tokens[p.start : p.end], np.int64) for p in plan])
        lengths = np.array([p.length for p in plan])
        starts = np.array([p.start for p in plan])
        query_start = np.concatenate([[0], np.cumsum(lengths)])  # [S+1]
        owner = np.repeat(np.arange(len(plan)), lengths)  # [T], which piece a token belongs to
        positions = np.arange(len(tokens)) - query_start[owner] + starts[owner]
        full_start = np.zeros(len(plan), np.int64)
        chunk_start = np.array([p.sequence.held.chunk_start for p in plan])
        image_rows, image_features = self._images(plan, query_start)
        last_rows = (query_start[1:] - 1)[[p.wants_logits for p in plan]]
        context = starts + lengths

        return StepInput(
            token_ids=torch.from_numpy(tokens).to(device),
            positions=torch.from_numpy(positions).to(device),
            query_start=torch.from_numpy(query_start.astype(np.int32)).to(device),
            context_len=torch.from_numpy(context.astype(np.int32)).to(device),
            full=self._kind([p.sequence.held.full for p in plan], full_start, positions, owner),
            chunked=self._kind([p.sequence.held.chunked for p in plan], chunk_start, positions, owner),
            logits_rows=torch.from_numpy(last_rows.astype(np.int64)).to(device),
            max_query_len=int(lengths.max()),
            max_context_len=int(context.max()),
            image_rows=image_rows,
            image_features=image_features,
        )

    def _kind(
        self, tables: list[BlockTable], kv_start: np.ndarray, positions: np.ndarray, owner: np.ndarray
    ) -> PagedKind:
        """Block table and slots of one kind of layer."""
        size, device = self.blocks.block_size, self.model.device
        table = np.zeros((len(tables), max(t.length for t in tables)), np.int32)  # [S, max_blocks]
        for row, blocks in zip(table, tables, strict=True):
            row[: blocks.length] = blocks.ids
        offset = positions - kv_start[owner]  # [T], within the cached part
        slots = table[owner, offset // size].astype(np.int64) * size + offset % size
        return PagedKind(
            block_table=torch.from_numpy(table).to(device),
            kv_start=torch.from_numpy(kv_start.astype(np.int32)).to(device),
            slots=torch.from_numpy(slots).to(device),
        )

    def _images(self, plan: list[Piece], query_start: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """image_rows int64 [P] and image_features [P, H] of the step, or None twice."""
        rows: list[np.ndarray] = []
        features: list[torch.Tensor] = []
        for piece, first in zip(plan, query_start, strict=False):
            images = piece.sequence.images
            if images is None or piece.start >= piece.sequence.prompt_len:
                continue
            end = min(piece.end, piece.sequence.prompt_len)
            try:
                found, pieces = images.slice(piece.start, end, self.features.encode)
            except L4Error:
                raise  # the tower cannot be read
            except Exception as error:
                raise ImageEncodingError(piece.sequence, error) from error
            rows.append(found + first)
            features += pieces
        if not features:
            return None, None
        return torch.from_numpy(np.concatenate(rows)).to(self.model.device), torch.cat(features)
