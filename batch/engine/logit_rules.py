"""What a request asks of its logits before a token is drawn: penalties, biases, a least length, a grammar.

Every row by itself, so an answer does not depend on what else is in the batch; rows without rules are not touched.
Order: repetition penalty, presence and frequency penalty, logit_bias, min_tokens, grammar.
Legend: N rows, V vocabulary, R rows under a grammar.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from batch.kernels.transfer import send
from batch.requests import SamplingParams, TokenMask


@dataclass(eq=False)
class LogitRules:
    """One sequence's rules, and what they need to know of its tokens. `drawn` counts the tokens drawn so far."""

    sampling: SamplingParams
    stop_ids: frozenset[int]
    mask: TokenMask | None
    prompt_ids: frozenset[int]
    drawn: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, prompt: list[int], sampling: SamplingParams, stop_ids: frozenset[int], mask: TokenMask | None
    ) -> LogitRules | None:
        """The rules of a new sequence, None when it has none."""
        p = sampling
        repetition = p.repetition_penalty != 1
        if not (mask or repetition or p.presence_penalty or p.frequency_penalty or p.logit_bias or p.min_tokens):
            return None
        return cls(sampling, stop_ids, mask, frozenset(prompt) if repetition else frozenset())

    @property
    def is_done(self) -> bool:
        return self.mask is not None and self.mask.is_done

    def accept(self, token: int) -> bool:
        """Take note of a drawn token; False when the grammar does not go on with it."""
        self.drawn[token] += 1
        return self.mask is None or self.mask.accept(token)

    def change(self, row: torch.Tensor, step: int) -> None:
        """Penalties, biases and least length, in place, on float32 [V]; `step` counts the tokens drawn."""
        p = self.sampling
        if p.repetition_penalty != 1:
            seen = _index(sorted(self.prompt_ids | self.drawn.keys()), row)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if self.drawn and (p.presence_penalty or p.frequency_penalty):
            counts = torch.tensor(list(self.drawn.values()), dtype=row.dtype)
            seen, counts = send([torch.tensor(list(self.drawn)), counts], row.device)
            row[seen] -= p.presence_penalty + p.frequency_penalty * counts
        if p.logit_bias:
            places, biases = zip(*p.logit_bias, strict=True)
            where, added = send([torch.tensor(places), torch.tensor(biases, dtype=row.dtype)], row.device)
            row[where] += added
        if step < p.min_tokens and self.stop_ids:
            row[_index(sorted(self.stop_ids), row)] = -math.inf


def apply_rules(logits: torch.Tensor, rules: list[LogitRules | None], steps: list[int]) -> torch.Tensor:
    """Logits float32 [N, V] as the rows' rules want them: a copy, or `logits` itself where no row has any."""
    if not any(rules):
        return logits
    logits = logits.clone()
    masked: list[tuple[int, TokenMask]] = []
    for place, (rule, step) in enumerate(zip(rules, steps, strict=True)):
        if rule is not None:
            rule.change(logits[place], step)
            if rule.mask is not None:
                masked.append((place, rule.mask))
    if masked:
        index = _index([place for place, _ in masked], logits)
        allowed = _allowed([mask for _, mask in masked], logits.shape[1], logits.device)
        logits[index] = logits[index].masked_fill(~allowed, -math.inf)
    return logits


def _allowed(masks: list[TokenMask], vocab: int, device: torch.device) -> torch.Tensor:
    """Bool [R, V]: the masks' bits, unpacked on the device."""
    rows = np.zeros((len(masks), math.ceil(vocab / 32)), np.int32)
    for row, mask in zip(rows, masks, strict=True):
        mask.fill(row)
    (packed,) = send([torch.from_numpy(rows.view(np.uint8))], device)  # [R, 4 · ceil(V / 32)], little-endian
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1  # [R, bytes, 8]
    return bits.view(len(masks), -1)[:, :vocab].bool()


def _index(places: list[int], like: torch.Tensor) -> torch.Tensor:
    return send([torch.tensor(places, dtype=torch.int64)], like.device)[0]
