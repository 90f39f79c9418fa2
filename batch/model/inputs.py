"""One engine step as the model sees it: a flat list of tokens from many sequences, and where their KV lives.

Legend: T tokens in this step, S sequences in this step, B block size (tokens per KV block), P image-feature rows.

Rope layers look only at the token's own attention chunk (`position // attention_chunk_size`), NoPE layers at
everything. So there are two paged caches, "chunked" and "full", each with its own blocks. The scheduler never
gives one sequence tokens of two chunks in the same step, so in both kinds a query at position p sees exactly the
cached positions kv_start ≤ position ≤ p.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from batch.kernels.transfer import send

OF_KIND = ("block_table", "kv_start", "slots")
OWN = ("token_ids", "positions", "query_start", "context_len", "logits_rows", "image_rows", "image_features")


@dataclass(frozen=True)
class PagedKind:
    """Block bookkeeping of one kind of layer ("full" or "chunked") for one step.

    block_table: int32 [S, max_blocks]; row s lists sequence s's blocks in order, unused entries are 0.
    kv_start:    int32 [S]; position of the token in slot 0 of block_table[s, 0] (0 for "full", the chunk's start
                 for "chunked").
    slots:       int64 [T]; token t's K and V go to block slots[t] // B, offset slots[t] % B.
    """

    block_table: torch.Tensor
    kv_start: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class StepInput:
    """token_ids, positions: int64 [T].

    query_start: int32 [S+1], sequence s owns tokens query_start[s]:query_start[s+1].
    context_len: int32 [S], tokens known after this step (last position + 1).
    logits_rows: int64 [N], the tokens whose next-token logits are wanted.
    image_rows: int64 [P] and image_features [P, H]: rows whose embeddings are replaced; None without images.
    max_query_len, max_context_len: plain ints, so that nothing has to be read back from a device.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    full: PagedKind
    chunked: PagedKind
    logits_rows: torch.Tensor
    max_query_len: int
    max_context_len: int
    image_rows: torch.Tensor | None = None
    image_features: torch.Tensor | None = None

    def to(self, device: torch.device) -> StepInput:
        """The same step on a device; itself where it is there. Tokens drawn on the device are there before the rest."""
        if self.positions.device.type == device.type:
            return self
        own = [name for name in OWN if getattr(self, name) is not None]
        kinds = (self.full, self.chunked)
        tensors = [getattr(self, name) for name in own] + [getattr(kind, name) for kind in kinds for name in OF_KIND]
        there = send(tensors, device)
        moved = dict(zip(own, there, strict=False))
        full, chunked = (PagedKind(*there[first : first + 3]) for first in (len(own), len(own) + 3))
        return replace(self, full=full, chunked=chunked, **moved)  # type: ignore[arg-type]
