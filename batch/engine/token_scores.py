"""Numbers for tokens from logits: their negative log-likelihood, and how far two models' distributions are apart.

Legend: M models (1 or 2), n rows, V vocabulary. All logarithms are natural, all figures in nats and float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BINS_PER_OCTAVE = 16  # of KL: a bin is 4.4 % wide
LOWEST_BIN = -40 * BINS_PER_OCTAVE  # 1e-12 and everything below
WORK_BYTES = 64 << 20  # of float64 copies of logits at a time


@dataclass(frozen=True)
class RowScores:
    """Of n rows: `nll` [M, n] of the tokens that follow; with two models KL(second ‖ first) [n], and whether both have
    the same best token, bool [n]."""

    nll: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray


@torch.inference_mode()
def score_rows(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> RowScores:
    """logits: M × float32 [n, V]; targets int64 [n]. What is not finite in the logits is not finite in the scores."""
    count, size = logits[0].shape
    step = max(1, WORK_BYTES // (8 * 2 * len(logits) * size))
    parts = [_score([each[i : i + step] for each in logits], targets[i : i + step]) for i in range(0, count, step)]
    return RowScores(
        np.concatenate([part.nll for part in parts], axis=1),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.same_top for part in parts]),
    )


def _score(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> RowScores:
    logs = [each.double().log_softmax(-1) for each in logits]  # M × [n, V]
    nll = -torch.stack([log.gather(1, targets[:, None])[:, 0] for log in logs])  # [M, n]
    kl, same = torch.zeros_like(nll[0]), torch.ones_like(targets, dtype=torch.bool)
    if len(logs) > 1:
        # A sum of float64 roundings can end just below 0, which no divergence is.
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).clamp(min=0)  # [n]
        same = logits[0].argmax(-1) == logits[1].argmax(-1)
    return RowScores(nll.cpu().numpy(), kl.cpu().numpy(), same.cpu().numpy())


def kl_bin(kl: float) -> int:
    """The bin of one token's KL: bin b begins at 2^(b / 16)."""
    return max(math.floor(BINS_PER_OCTAVE * math.log2(kl)), LOWEST_BIN) if kl > 0 else LOWEST_BIN


def bin_middle(number: int) -> float:
    """The KL that stands for a bin, at most 2.2 % off; 0 for the lowest."""
    return 0.0 if number <= LOWEST_BIN else 2 ** ((number + 0.5) / BINS_PER_OCTAVE)
