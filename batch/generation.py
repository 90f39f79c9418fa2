"""Where a request's sampling values come from: the line, then the command's options, then generation_config.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from batch.requests import SamplingParams
from batch.schema import Line
from l4tool.core.errors import CheckpointError

DEFAULT_MAX_TOKENS = 1024
GREEDY_BELOW = 1e-4  # lower temperatures overflow float32 logits and mean greedy anyway
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
}


@dataclass(frozen=True)
class SamplingOptions:
    """The command's own options; None means: not given."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplingDefaults:
    """What a line gets that says nothing. `end_token_ids` end every completion unless the line ignores them."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]
    end_token_ids: frozenset[int]

    @classmethod
    def build(cls, options: SamplingOptions, config: dict[str, Any], end_token_ids: Iterable[int]) -> SamplingDefaults:
        """Options over generation_config.json (`config`, {} when missing) over temperature 1. CheckpointError."""
        greedy = config.get("do_sample") is False
        pick = {
            "temperature": 0.0 if greedy else _number(config, "temperature", 1.0),
            "top_p": _number(config, "top_p", 1.0),
            "top_k": _number(config, "top_k", 0),
            "min_p": _number(config, "min_p", 0.0),
        }
        for name in pick:
            given = getattr(options, name)
            if given is not None:
                pick[name] = given
        return cls(
            max_tokens=options.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=float(pick["temperature"]),
            top_p=float(pick["top_p"]),
            top_k=max(int(pick["top_k"]), 0),
            min_p=float(pick["min_p"]),
            seed=options.seed,
            stop=options.stop,
            end_token_ids=frozenset(end_token_ids) | _end_tokens(config),
        )

    def params(self, line: Line, line_bytes: bytes, room: int) -> SamplingParams:
        """This line's SamplingParams; `room` is how many tokens the context has left after the prompt."""
        given = line.sampling
        limits = [n for n in (given.max_completion_tokens, given.max_tokens) if n is not None]
        top_k = self.top_k if given.top_k is None else max(given.top_k, 0)
        temperature = self.temperature if given.temperature is None else given.temperature
        stop_ids = frozenset(given.stop_token_ids or ())
        return SamplingParams(
            max_tokens=min(min(limits) if limits else self.max_tokens, room),
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=self.top_p if given.top_p is None else given.top_p,
            top_k=min(top_k, 2**31 - 1),
            min_p=self.min_p if given.min_p is None else given.min_p,
            seed=self.line_seed(line_bytes) if given.seed is None else given.seed % 2**63,
            stop_token_ids=stop_ids if given.ignore_eos else stop_ids | self.end_token_ids,
            logprobs=line.logprobs,
            presence_penalty=given.presence_penalty or 0.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (given.logit_bias or {}).items()),
            min_tokens=given.min_tokens,
        )

    def line_seed(self, line_bytes: bytes) -> int:
        """A seed from the command's seed and the line's own bytes, wherever the line stands in the file."""
        digest = hashlib.blake2b(line_bytes, digest_size=8, key=self.seed.to_bytes(16, "big", signed=True))
        return int.from_bytes(digest.digest(), "big") >> 1


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    low, high = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(f"generation_config.json: {name} {value!r} is not a number between {low} and {high:g}")
    return value


def _end_tokens(config: dict[str, Any]) -> frozenset[int]:
    found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise CheckpointError(f"generation_config.json: eos_token_id {found!r} is not a token id or a list of them")
    return frozenset(ids)
