"""A large step cut into slices that pass through a layer one after the other, so that activations stay small.

A sequence may be cut: its later tokens see the keys and values that its earlier ones wrote a slice before.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from batch.model.inputs import PagedKind, StepInput
from quant.streaming import SLICE_TOKENS


@dataclass(frozen=True)
class Slice:
    """Tokens `rows` of a step as a step of their own, without pictures: those are in the embeddings by then."""

    rows: slice
    step: StepInput


def slices(step: StepInput, most: int = SLICE_TOKENS) -> list[Slice]:
    """The step, which lies on the host where it is larger, in slices of at most `most` tokens, in order."""
    tokens = step.token_ids.shape[0]
    if tokens <= most:
        return [Slice(slice(0, tokens), step)]
    starts, context = step.query_start.tolist(), step.context_len.tolist()
    return [_cut(step, starts, context, first, min(first + most, tokens)) for first in range(0, tokens, most)]


def _cut(step: StepInput, starts: list[int], context: list[int], first: int, end: int) -> Slice:
    """Tokens first … end - 1. `starts`, `context`: query_start and context_len as lists."""
    held = [s for s in range(len(context)) if starts[s] < end and starts[s + 1] > first]
    edges = [max(starts[held[0]], first), *(min(starts[s + 1], end) for s in held)]  # in the whole step
    lengths = [context[s] - max(starts[s + 1] - end, 0) for s in held]
    rows, where = slice(first, end), torch.tensor(held)
    wanted = step.logits_rows[(step.logits_rows >= first) & (step.logits_rows < end)]
    part = replace(
        step,
        token_ids=step.token_ids[rows],
        positions=step.positions[rows],
        query_start=step.query_start.new_tensor([edge - first for edge in edges]),
        context_len=step.context_len.new_tensor(lengths),
        full=_kind(step.full, rows, where),
        chunked=_kind(step.chunked, rows, where),
        logits_rows=wanted - first,
        max_query_len=max(b - a for a, b in itertools.pairwise(edges)),
        max_context_len=max(lengths),
        image_rows=None,
        image_features=None,
    )
    return Slice(rows, part)


def _kind(kind: PagedKind, rows: slice, sequences: torch.Tensor) -> PagedKind:
    return PagedKind(kind.block_table[sequences], kind.kv_start[sequences], kind.slots[rows])


def rows_of(rows: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same rows of each tensor."""
    return tuple(tensor[rows] for tensor in tensors)
