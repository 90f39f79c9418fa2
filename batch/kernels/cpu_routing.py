"""Which rows meet which weights: top-1 routing of tokens to experts, in the form that `cpu_panels.product` takes.

Legend: T tokens, E experts, G groups.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.panel_tiles import MAX_ROWS
from batch.kernels.simd import elements_at, jit, narrow, widen

BLOCK_BYTES = 1 << 20  # of x that one group's rows have at most, so that they stay in the cache from panel to panel
_I64 = np.int64(0)


@dataclass(frozen=True)
class Groups:
    """Which rows meet which weights: table int64 [1 + 3·G], the number of groups with rows, then (weight, first row,
    rows) of each; `most` is what that number can be at most. Many rows of one weight are several groups."""

    table: torch.Tensor
    most: int


def block_rows(size: int) -> int:
    """Rows of K = size in one group at most."""
    return max(BLOCK_BYTES // (2 * size) // MAX_ROWS, 4) * MAX_ROWS


@functools.lru_cache(1024)
def one_weight(rows: int, size: int) -> Groups:
    """Groups of rows of K = size that all meet weight 0."""
    step = block_rows(size)
    entries = [n for first in range(0, rows, step) for n in (0, first, min(step, rows - first))]
    return Groups(torch.tensor([len(entries) // 3, *entries]), len(entries) // 3)


@jit
def _route(logits: Any, stride: Any, tokens: Any, experts: Any, score: Any, chosen: Any, first: Any) -> None:
    """Each token's best expert, the sigmoid of its logit, and in first[e + 1] the number of tokens of expert e."""
    for t in range(tokens):
        best, value = 0, widen(logits[t * stride])
        for e in range(1, experts):
            other = widen(logits[t * stride + e])
            if other > value:
                best, value = e, other
        chosen[t] = best
        first[best + 1] += 1
        score[t] = narrow(np.float32(1.0 / (1.0 + math.exp(-np.float64(value)))), np.uint16(0))


@jit
def _add_groups(table: Any, count: Any, weight: Any, begin: Any, rows: Any, most: Any) -> Any:
    """Groups of at most `most` rows; returns how many there are now."""
    for low in range(0, rows, most):
        entry = 1 + 3 * count
        table[entry], table[entry + 1], table[entry + 2] = weight, begin + low, min(most, rows - low)
        count += 1
    return count


@parallel.Kernel
def _dispatch(job: Any) -> None:
    """In one thread; the arguments are those that `dispatch` gives."""
    args = elements_at(job, _I64)
    tokens, experts, most = args[3], args[4], args[9]
    order, table = elements_at(args[6], _I64), elements_at(args[7], _I64)
    chosen, first = np.empty(tokens, np.int32), np.zeros(experts + 1, np.int64)
    logits, score = elements_at(args[2], np.uint16(0)), elements_at(args[5], np.uint16(0))
    _route(logits, args[10], tokens, experts, score, chosen, first)
    count = 0
    for e in range(experts):
        count = _add_groups(table, count, e, first[e], first[e + 1], most)
        first[e + 1] += first[e]
    for t in range(tokens):
        order[first[chosen[t]]] = t
        first[chosen[t]] += 1
    if args[8]:
        count = _add_groups(table, count, experts, tokens, tokens, most)
    table[0] = count


def dispatch(logits: torch.Tensor, with_shared: bool, size: int) -> tuple[torch.Tensor, torch.Tensor, Groups]:
    """Top-1 routing: router logits bfloat16 [T, E] → (score bfloat16 [T] = sigmoid of the best logit, order int64 [T]
    by expert, the experts' groups). with_shared: rows T … 2T - 1 are groups of weight E. `size`: largest K to come."""
    tokens, experts = logits.shape
    most = block_rows(size)
    groups = min(tokens, experts) + tokens // most + (-(-tokens // most) if with_shared else 0)
    score, order = logits.new_empty(tokens), torch.empty(tokens, dtype=torch.int64)
    table = torch.empty(1 + 3 * groups, dtype=torch.int64)
    stride = logits.stride(0)
    parallel.run(_dispatch, 1, logits, tokens, experts, score, order, table, int(with_shared), most, stride)
    return score, order, Groups(table, groups)
