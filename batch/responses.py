"""Results and errors → output lines: OpenAI's batch response object, and the short form (docs/batch-format.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batch.prepare import LineInfo
from batch.requests import Choice, GenerationResult, TokenLogprob

NO_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenNames(Protocol):
    """What this module needs of a tokenizer."""

    def token_bytes(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class ResponseWriter:
    """Builds output lines. `model` answers for lines that name none; `fingerprint` identifies the weights."""

    tokens: TokenNames
    model: str
    fingerprint: str
    created_s: int

    def success(self, info: LineInfo, result: GenerationResult) -> dict[str, Any]:
        """The output line of a result without an error."""
        usage = _usage(result)
        if not info.is_openai:
            return self._short(info, result.choices, usage)
        is_chat = info.endpoint == "chat"
        body = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + info.digest,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self.created_s,
            "model": info.model or self.model,
            "choices": [self._chat_choice(c) if is_chat else self._completion_choice(c) for c in result.choices],
            "usage": usage,
            "system_fingerprint": self.fingerprint,
        }
        response = {"status_code": 200, "request_id": "req_" + info.digest, "body": body}
        return {"id": "batch_req_" + info.digest, "custom_id": info.id, "response": response, "error": None}

    def error(self, info: LineInfo, code: str, message: str) -> dict[str, Any]:
        """The output line of a line that could not be answered. OpenAI itself answers a bad request with status 400 and
        keeps `error` for what went wrong outside the request; here both are set, so that either check finds it."""
        if not info.is_openai:
            return {"id": info.id, "line": info.number, "error": {"code": code, "message": _clean(message)}}
        text = _clean(f"line {info.number}: {message}")
        ours = code == "internal_error"
        kind = "server_error" if ours else "invalid_request_error"
        body = {"error": {"message": text, "type": kind, "param": None, "code": code}}
        return {
            "id": "batch_req_" + info.digest,
            "custom_id": info.id,
            "response": {"status_code": 500 if ours else 400, "request_id": "req_" + info.digest, "body": body},
            "error": {"code": code, "message": text},
        }

    def _short(self, info: LineInfo, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        line: dict[str, Any] = {"id": info.id}
        if info.id is None:
            line["line"] = info.number
        first = self._short_choice(choices[0])
        line |= first
        line["usage"] = usage
        if len(choices) > 1:
            line["choices"] = [{"index": choice.index, **self._short_choice(choice)} for choice in choices]
        return line

    def _short_choice(self, choice: Choice) -> dict[str, Any]:
        fields: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
        if choice.logprobs is not None:
            fields["logprobs"] = [self._token(item) for item in choice.logprobs]
        return fields

    def _chat_choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if choice.logprobs is not None:
            logprobs = {"content": [self._token(item) for item in choice.logprobs], "refusal": None}
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason,
        }  # fmt: skip

    def _completion_choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None if choice.logprobs is None else self._completion_logprobs(choice.logprobs)
        return {
            "index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason,
        }  # fmt: skip

    def _completion_logprobs(self, items: Sequence[TokenLogprob]) -> dict[str, Any]:
        names = [self._name(item.token_id) for item in items]
        offsets, place = [], 0
        for name in names:
            offsets.append(place)
            place += len(name)
        return {
            "tokens": names,
            "token_logprobs": [_finite(item.logprob) for item in items],
            "top_logprobs": [{self._name(i): _finite(p) for i, p in item.top} for item in items],
            "text_offset": offsets,
        }

    def _token(self, item: TokenLogprob) -> dict[str, Any]:
        top = [self._entry(index, logprob) for index, logprob in item.top]
        return {**self._entry(item.token_id, item.logprob), "top_logprobs": top}

    def _entry(self, index: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(index), "logprob": _finite(logprob), "bytes": list(self.tokens.token_bytes(index))}

    def _name(self, index: int) -> str:
        return self.tokens.token_bytes(index).decode("utf-8", "replace")


def _usage(result: GenerationResult) -> dict[str, int]:
    completion = sum(len(choice.token_ids) for choice in result.choices)
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": result.prompt_tokens + completion,
    }


def _finite(logprob: float) -> float:
    return round(logprob, 6) if math.isfinite(logprob) else NO_LOGPROB


def _clean(text: str) -> str:
    """Valid Unicode, whatever an error message quotes."""
    return text.encode("utf-8", "replace").decode("utf-8")
