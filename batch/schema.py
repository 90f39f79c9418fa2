"""The request line, once for the whole project: the OpenAI batch form and the short form (docs/batch-format.md).

`parse_line` turns a parsed JSON value into a `Line`; whatever does not fit raises `LineError` with a code and a
message that names the field.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from batch.line_models import (
    BODIES,
    ENDPOINTS,
    IGNORED_FIELDS,
    INSTEAD,
    MAX_STOP,
    UNSUPPORTED_FIELDS,
    UNSUPPORTED_IN_MESSAGES,
    Envelope,
    ImagePart,
    Message,
    SamplingFields,
    ShortLine,
    StrictModel,
    TextPart,
)


class LineError(Exception):
    """One input line that cannot run. `code` is a short stable word for programs, `message` is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class ImageRef:
    """A picture by local path or data: URI, not read yet."""

    source: str


@dataclass(frozen=True)
class ToolCall:
    """A call that an assistant made earlier in the conversation; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Turn:
    """One message: text and pictures in order, then tool calls. `tool_call_id`: which call a tool's result answers."""

    role: str
    parts: tuple[str | ImageRef, ...]
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Line:
    """A valid request line. A chat has `turns`; a completion has `prompt` (text or token ids) and no turns.

    `logprobs`: None off, else how many alternatives per token. `parse_special`: completions only, special tokens
    spelled in the prompt become those tokens. `tools` are those the model is told of, as they stand in the line;
    `tool_choice` is 'required' or a named function where a call must come, else None.
    """

    form: Literal["openai", "short"]
    endpoint: Literal["chat", "completion"]
    id: str | int | None
    model: str | None
    turns: tuple[Turn, ...]
    prompt: str | list[int] | None
    parse_special: bool
    sampling: SamplingFields
    stop: tuple[str, ...] | None
    logprobs: int | None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    @property
    def images(self) -> list[ImageRef]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, ImageRef)]


def is_openai(value: dict[str, Any]) -> bool:
    """True for the OpenAI batch form (whole or not), False for the short form."""
    return any(key in value for key in ("custom_id", "method", "url", "body"))


def line_id(value: Any) -> str | int | None:
    """The id to answer under, from a line that may be wrong in every other way."""
    if not isinstance(value, dict):
        return None
    found = value.get("custom_id") if is_openai(value) else value.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int):
        return None
    return found


def parse_line(value: Any) -> Line:
    """A parsed JSON value → Line. Raises LineError."""
    if not isinstance(value, dict):
        raise LineError("invalid_line", "a line must be a JSON object")
    if is_openai(value):
        envelope = validate(Envelope, value, "")
        endpoint = ENDPOINTS.get(envelope.url)
        if endpoint is None:
            why = ": a model that writes text gives no embeddings" if envelope.url.endswith("/embeddings") else ""
            message = f"url: '{_short(envelope.url)}' is not answered here{why}; {' and '.join(ENDPOINTS)} are"
            raise LineError("unsupported_endpoint", message)
        return _openai_line(envelope.custom_id, endpoint, envelope.body)
    return _short_line(value)


def _openai_line(custom_id: str, endpoint: str, raw: dict[str, Any]) -> Line:
    body = validate(BODIES[endpoint], _known_fields(raw, "body."), "body.")
    _check_together(body)
    if endpoint == "chat":
        return Line(
            "openai", "chat", custom_id, body.model, _turns(body.messages), None, False, body, _stop(body.stop),
            _chat_logprobs(body), *_tools(body, raw),
        )  # fmt: skip
    return Line(
        "openai", "completion", custom_id, body.model, (), body.prompt, body.parse_special, body, _stop(body.stop),
        body.logprobs,
    )  # fmt: skip


def _short_line(raw: dict[str, Any]) -> Line:
    body = validate(ShortLine, _known_fields(raw, ""), "")
    _check_together(body)
    if (body.prompt is None) == (body.messages is None):
        raise LineError("invalid_request", "give either 'prompt' or 'messages'")
    raw_prompt = body.raw or isinstance(body.prompt, list)
    if body.images and body.prompt is None:
        raise LineError("invalid_request", "'images' goes with 'prompt'; with 'messages', put them among the content")
    if body.images and raw_prompt:
        raise LineError("invalid_request", "'images' needs a chat turn; it does not go with 'raw' or token ids")
    if body.raw and body.prompt is None:
        raise LineError("invalid_request", "'raw' goes with 'prompt'")
    if body.parse_special and not raw_prompt:
        raise LineError("invalid_request", "'parse_special' goes with 'raw': in a chat, user text stays text")
    tools = _tools(body, raw)
    if raw_prompt and (tools[0] or tools[1]):
        raise LineError("invalid_request", "'tools' needs a chat turn; it does not go with 'raw' or token ids")
    common = (body.parse_special, body, _stop(body.stop), _chat_logprobs(body), *tools)
    if raw_prompt:
        return Line("short", "completion", body.id, body.model, (), body.prompt, *common)
    if body.messages is not None:
        turns = _turns(body.messages)
    else:
        turns = (Turn("user", (*(ImageRef(image) for image in body.images or ()), body.prompt)),)
    return Line("short", "chat", body.id, body.model, turns, None, *common)


def _known_fields(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields left to validate: without nulls and ignored ones; refuses what is known but not supported."""
    known = {}
    for key, value in raw.items():
        if value is None or key in IGNORED_FIELDS:
            continue
        if key in UNSUPPORTED_FIELDS:
            _refuse_unless_neutral(where + key, key, value)
            continue
        known[key] = value
    if isinstance(known.get("messages"), list):
        known["messages"] = [
            _known_message(message, f"{where}messages.{index}.") if isinstance(message, dict) else message
            for index, message in enumerate(known["messages"])
        ]
    prompt = known.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) != 1 or not isinstance(prompt[0], str | list):
            raise LineError("invalid_request", f"{where}prompt: one prompt per line: write a line for each")
        known["prompt"] = prompt[0]
    return known


def _known_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    for key in UNSUPPORTED_IN_MESSAGES:
        if message.get(key) is not None:
            _refuse_unless_neutral(where + key, key, message[key])
    return {k: v for k, v in message.items() if v is not None and k not in UNSUPPORTED_IN_MESSAGES}


def _refuse_unless_neutral(path: str, key: str, value: Any) -> None:
    neutral = UNSUPPORTED_FIELDS[key]
    if any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral):
        return
    raise LineError("unsupported_field", f"{path}: {INSTEAD.get(key, 'not supported; leave it out')}")


def validate(model: type[StrictModel], value: dict[str, Any], where: str) -> Any:
    """`value` as a `model`, whose fields lie below `where` in the line. Raises LineError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    except RecursionError:
        raise LineError("invalid_request", "nested too deeply") from None
    path = where + ".".join(str(part) for part in first["loc"] if not str(part).startswith("#"))
    path = path.rstrip(".")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        near = difflib.get_close_matches(name[:64], model.model_fields, n=1)
        meant = f"; did you mean '{near[0]}'?" if near else ""
        raise LineError("unknown_field", f"unknown field '{_short(path)}'{meant}")
    if first["type"] == "missing":
        raise LineError("invalid_request", f"the field '{_short(path)}' is missing")
    if first["type"] == "union_tag_not_found":
        raise LineError("invalid_request", f"{path}: a content part needs a type: text, image_url or image")
    raise LineError("invalid_request", f"{_short(path)}: {first['msg'][:300]}")


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "…"


def _tools(body: Any, raw: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], Any, bool]:
    """The tools to tell of (none where none may be called), the choice of them, and whether calls may be several."""
    choice = body.tool_choice
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise LineError("invalid_request", "tool_choice: none, auto, required or one function by its name")
    names = [tool.function.name for tool in body.tools or ()]
    for name in names:
        if names.count(name) > 1:
            raise LineError("invalid_request", f"two tools are named '{name}'")
    tools = tuple(raw.get("tools") or ()) if choice != "none" else ()
    return tools, choice if choice not in ("none", "auto") else None, body.parallel_tool_calls


def _turns(messages: list[Message]) -> tuple[Turn, ...]:
    turns = []
    for place, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or ())
        if calls and role != "assistant":
            raise LineError("invalid_request", f"messages.{place}.tool_calls: only the assistant calls tools")
        if message.content is None and not calls:
            raise LineError("invalid_request", f"the field 'messages.{place}.content' is missing")
        if message.content is None or isinstance(message.content, str):
            text = () if message.content is None else (message.content,)
            turns.append(Turn(role, text, message.name, calls, message.tool_call_id))
            continue
        parts: list[str | ImageRef] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                parts.append(ImageRef(part.image if isinstance(part, ImagePart) else part.image_url.url))
        turns.append(Turn(role, tuple(parts), message.name))
    return tuple(turns)


def _check_together(fields: SamplingFields) -> None:
    """What the fields' own models cannot see."""
    limits = [n for n in (fields.max_tokens, fields.max_completion_tokens) if n is not None]
    if limits and fields.min_tokens > min(limits):
        raise LineError("invalid_request", "min_tokens is more than max_tokens")
    response = fields.response_format
    if response is not None and response.type == "json_schema" and response.json_schema is None:
        raise LineError("invalid_request", "the field 'response_format.json_schema' is missing")
    form = fields.structured_outputs
    if form is not None and sum(value is not None for _, value in form) != 1:
        raise LineError(
            "invalid_request", "structured_outputs: exactly one of json, regex, choice, grammar, json_object"
        )


def _stop(stop: str | list[str] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOP:
        raise LineError("invalid_request", f"stop: at most {MAX_STOP} strings")
    if any(not string for string in strings):
        raise LineError("invalid_request", "stop: an empty string would stop everything")
    return strings


def _chat_logprobs(body: Any) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise LineError("invalid_request", "top_logprobs needs logprobs: true")
    return (body.top_logprobs or 0) if body.logprobs else None
