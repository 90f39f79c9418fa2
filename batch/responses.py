"""Results and errors → output lines: OpenAI's batch response object, and the short form (docs/batch-format.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batch.prepare import LineInfo
from batch.requests import Choice, GenerationResult, TokenLogprob
from batch.tools import parse_tool_calls

NO_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


PYTHON_END = "<|python_end|>"  # Llama 4 may close a text with it before its calls


class TokenNames(Protocol):
    """What this module needs of a tokenizer."""

    control_tokens: dict[str, int]

    def token_bytes(self, index: int) -> bytes: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Answer:
    """A choice's text, or the calls it makes (id, name, arguments as JSON text) and the text before them."""

    text: str
    finish_reason: str
    calls: tuple[dict[str, Any], ...] = ()


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
            "choices": [self._chat_choice(info, c) if is_chat else self._completion_choice(c) for c in result.choices],
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

    def _short(self, info: LineInfo, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"id": info.id}
        if info.id is None:
            line["line"] = info.number
        first = self._short_choice(info, choices[0])
        line |= first
        line["usage"] = usage
        if len(choices) > 1:
            line["choices"] = [{"index": choice.index, **self._short_choice(info, choice)} for choice in choices]
        return line

    def _answer(self, info: LineInfo, choice: Choice) -> Answer:
        """What a choice says or calls."""
        if info.tool_names:
            before, rest = "", choice.text
            python_end = self.tokens.control_tokens.get(PYTHON_END)
            if python_end in choice.token_ids:
                before = self.tokens.decode(choice.token_ids[: choice.token_ids.index(python_end)])
                rest = choice.text.removeprefix(before)
            for text, calls in ((before, rest), ("", choice.text)):
                if found := parse_tool_calls(calls, info.tool_names):
                    reason = "tool_calls" if choice.finish_reason == "stop" else choice.finish_reason
                    return Answer(text, reason, tuple(self._call(info, choice, i, *c) for i, c in enumerate(found)))
        return Answer(choice.text, choice.finish_reason)

    def _call(self, info: LineInfo, choice: Choice, place: int, name: str, arguments: str) -> dict[str, Any]:
        return {
            "id": f"call_{info.digest}{choice.index:02x}{place:02x}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _short_choice(self, info: LineInfo, choice: Choice) -> dict[str, Any]:
        answer = self._answer(info, choice)
        fields: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason}
        if answer.calls:
            fields["tool_calls"] = list(answer.calls)
        if choice.logprobs is not None:
            fields["logprobs"] = [self._token(item) for item in choice.logprobs]
        return fields

    def _chat_choice(self, info: LineInfo, choice: Choice) -> dict[str, Any]:
        answer, logprobs = self._answer(info, choice), None
        if choice.logprobs is not None:
            logprobs = {"content": [self._token(item) for item in choice.logprobs], "refusal": None}
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": list(answer.calls)}
        return {
            "index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason,
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


def _usage(result: GenerationResult) -> dict[str, Any]:
    completion = sum(len(choice.token_ids) for choice in result.choices)
    usage: dict[str, Any] = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": result.prompt_tokens + completion,
    }
    if result.cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": result.cached_tokens}
    return usage


def _finite(logprob: float) -> float:
    return round(logprob, 6) if math.isfinite(logprob) else NO_LOGPROB


def _clean(text: str) -> str:
    """Valid Unicode, whatever an error message quotes."""
    return text.encode("utf-8", "replace").decode("utf-8")
