"""What travels between the job and a backend: requests that are already tokens and pixels, and their results.

Ground floor of `batch`: plain dataclasses, no text, no JSON, no torch.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn.

    temperature 0 means greedy; top_k 0, top_p 1 and min_p 0 mean off. `seed` makes the draws a function of the
    request alone. `logprobs` None means off; k ≥ 0 asks for the chosen token's log-probability and the k best.
    Presence and frequency penalties look at the tokens drawn, the repetition penalty also at the prompt (1 is off).
    `logit_bias` is (token, added to its logit); no stop token is drawn before `min_tokens`.
    Stop strings live in `PreparedRequest`: the engine sees tokens only.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0


class TokenMask(Protocol):
    """Which tokens one answer may go on with; it follows that answer alone, token by token."""

    def fill(self, row: np.ndarray) -> None:
        """Write a bit per token, 1 for allowed, the lowest first, into int32 [ceil(V / 32)]."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token that was drawn. False when it was not allowed."""
        ...

    @property
    def is_done(self) -> bool:
        """The answer is complete and its stop token is drawn."""
        ...


class Grammar(Protocol):
    """The form that every answer to a request must have."""

    def start(self) -> TokenMask:
        """The mask of a new answer."""
        ...


@dataclass(frozen=True)
class ImageTiles:
    """One picture, resized, padded and cut: uint8 [num_tiles, 3, S, S], tiles row by row, the global tile last.

    `grid` is (rows, columns); a 1×1 grid has no global tile, so num_tiles = 1, else rows · columns + 1.
    Pixels are not normalised yet: (pixel / 255 - 0.5) / 0.5 is the model's first step.
    """

    pixels: np.ndarray
    grid: tuple[int, int]

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the picture: pixels, tiles and grid. Hashed once, at about 1 ms per MB."""
        hashed = blake2b(repr((self.pixels.shape, self.grid)).encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(self.pixels).data)
        return hashed.digest()


@dataclass(frozen=True)
class PreparedRequest:
    """One input line, ready to run. `key` is the job's own handle and comes back in the result.

    Every `image_token_id` in `prompt` stands for one image feature row; `images` fills them in order.
    """

    key: int
    prompt: list[int]
    sampling: SamplingParams
    images: tuple[ImageTiles, ...] = ()
    stop: tuple[str, ...] = ()
    n: int = 1
    echo_special: bool = False  # keep special tokens in the text
    grammar: Grammar | None = None


@dataclass(frozen=True)
class ScoredRequest(PreparedRequest):
    """A request whose reference is known. `reference` are the tokens that should follow the prompt; an answer is right
    if it is one of `accepted`, white space at the ends aside. () : nothing is generated."""

    reference: tuple[int, ...] = ()
    accepted: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        return text.strip() in {answer.strip() for answer in self.accepted}


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of one drawn token, and of the best alternatives, best first: (id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Choice:
    """One completion. finish_reason: 'stop' (stop token or string) or 'length'."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


@dataclass
class GenerationResult:
    """What became of a PreparedRequest: choices, or an error (`error_code`, `error_message`) and none."""

    key: int
    choices: list[Choice] = field(default_factory=list)
    prompt_tokens: int = 0
    error_code: str | None = None
    error_message: str | None = None
    cached_tokens: int = 0  # of the prompt, taken from what another request had computed


@dataclass
class TokenScores:
    """What models make of one reference, summed over its tokens, in nats. `nll` of each model.

    With two models: `kl` and `kl_max` of KL(second ‖ first), how many tokens fall in each of `kl_bins`, and for how
    many both have the same best token.
    """

    tokens: int = 0
    nll: list[float] = field(default_factory=list)
    kl: float = 0.0
    kl_max: float = 0.0
    kl_bins: Counter[int] = field(default_factory=Counter)
    same_top: int = 0


@dataclass
class ScoredResult(GenerationResult):
    """What became of a ScoredRequest: its choice, where an answer was asked for, the other model's, and the scores."""

    request: ScoredRequest | None = None
    other: Choice | None = None
    scores: TokenScores = field(default_factory=TokenScores)
