"""What travels between the job and a backend: requests that are already tokens and pixels, and their results.

Ground floor of `batch`: plain dataclasses, no text, no JSON, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn.

    temperature 0 means greedy; top_k 0, top_p 1 and min_p 0 mean off. `seed` makes the draws a function of the
    request alone. `logprobs` None means off; k ≥ 0 asks for the chosen token's log-probability and the k best.
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


@dataclass(frozen=True)
class ImageTiles:
    """One picture, resized, padded and cut: uint8 [num_tiles, 3, S, S], tiles row by row, the global tile last.

    `grid` is (rows, columns); a 1×1 grid has no global tile, so num_tiles = 1, else rows · columns + 1.
    Pixels are not normalised yet: (pixel / 255 - 0.5) / 0.5 is the model's first step.
    """

    pixels: np.ndarray
    grid: tuple[int, int]


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
