"""One completion on its way: its tokens, how far its KV is computed, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batch.engine.blocks import SequenceBlocks
from batch.engine.logit_rules import LogitRules
from batch.requests import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from batch.engine.image_features import SequenceImages
    from batch.engine.prefix import PrefixKeys


@dataclass(eq=False)
class Sequence:
    """`tokens` is prompt then output; the KV of tokens[:num_computed] is in the cache.

    `handle` is the owner's, never looked at by the engine. `finish_reason` ('stop' or 'length') or `error`
    (code, message) is set when it is over. A preempted sequence keeps its tokens and starts again, so that what the
    cache has lost of prompt and output is prefilled anew.
    `score_from`: nothing is drawn; the logits behind token score_from - 1 and all later ones are wanted.
    `num_cached`: tokens whose KV the cache had when it was last asked, which is when the sequence started or since.
    """

    handle: object
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    max_len: int  # prompt + most output tokens
    stop_ids: frozenset[int]
    images: SequenceImages | None = None
    rules: LogitRules | None = None  # what the request asks of its logits
    keys: PrefixKeys | None = None  # None: shares nothing
    num_cached: int = 0
    num_cached_at_start: int = 0  # before any preemption
    num_computed: int = 0
    score_from: int | None = None
    is_resumed: bool = False  # was preempted
    passed_over: int = 0  # younger sequences that were admitted first
    held: SequenceBlocks = field(default_factory=SequenceBlocks)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: tuple[str, str] | None = None

    @property
    def num_left(self) -> int:
        """Tokens known but not computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def block_keys(self) -> list[bytes]:
        """Keys of its whole blocks, as far as its tokens are known."""
        return [] if self.keys is None else self.keys.of(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def is_over(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def append(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take a drawn token; sets finish_reason when it was the last one."""
        self.tokens.append(token)
        if self.rules is not None and not self.rules.accept(token):
            self.error = ("grammar_error", f"the grammar does not go on with token {token}")
            return
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.stop_ids or (self.rules is not None and self.rules.is_done):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_len:
            self.finish_reason = "length"


@dataclass(frozen=True)
class Piece:
    """What one sequence does in one step: computes tokens[start:end], all within one attention chunk. `ahead`: one
    token, which is drawn but has not reached the host yet."""

    sequence: Sequence
    start: int
    end: int
    ahead: bool = False

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def logits_from(self) -> int:
        """The first of its positions whose logits are wanted; `end` where none are."""
        sequence = self.sequence
        if sequence.score_from is not None:
            return min(max(self.start, sequence.score_from - 1), self.end)
        return self.end - self.wants_logits

    @property
    def wants_logits(self) -> bool:
        """The piece reaches the last known token, so the next one can be drawn."""
        return self.ahead or self.end == len(self.sequence.tokens)
