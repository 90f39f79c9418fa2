"""The form that a line asks of its answer: `response_format` as OpenAI has it, `structured_outputs` as vLLM has it.

No grammar yet, only its source: batch/grammars.py compiles it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from batch.json_schemas import check_pattern, enforceable
from batch.schema import Line, LineError
from batch.tools import forced_tools, tool_call_tag

MAX_SOURCE_CHARS = 1 << 16


@dataclass(frozen=True)
class Form:
    """What to compile: a JSON Schema, a regex, a grammar in EBNF or an xgrammar structural tag (JSON).

    `field` is the request's field, for messages. `strict`: no properties beside those that the schema names.
    `is_json`: the answer is JSON, in which control characters have no place.
    """

    kind: Literal["schema", "regex", "grammar", "tag"]
    source: str
    field: str
    strict: bool = True
    is_json: bool = False


def wanted_form(line: Line) -> Form | None:
    """The form of a line's answers, None when it asks for none. Raises LineError."""
    form = _form(line)
    if form is not None and len(form.source) > MAX_SOURCE_CHARS:
        raise LineError("invalid_grammar", f"{form.field}: longer than {MAX_SOURCE_CHARS:,} characters")
    if form is not None and line.sampling.min_tokens:
        raise LineError("invalid_request", f"min_tokens does not go with {form.field}")
    return form


def _form(line: Line) -> Form | None:
    fields = line.sampling
    asked = [name for name in ("response_format", "structured_outputs") if getattr(fields, name) is not None]
    if fields.response_format is not None and fields.response_format.type == "text":
        asked.remove("response_format")
    forced = forced_tools(line.tools, line.tool_choice)
    if forced is not None:
        asked.append("tool_choice")
    if len(asked) > 1:
        raise LineError("invalid_request", f"{asked[0]} does not go with {asked[1]}")
    if not asked:
        return None
    if forced is not None:
        return Form("tag", _dump(tool_call_tag(forced, line.parallel_tool_calls)), "tool_choice", is_json=True)
    return _response_format(fields.response_format) if asked == ["response_format"] else _structured(fields)


def _response_format(given: Any) -> Form:
    if given.type == "json_object":
        return _any_object("response_format")
    wanted = given.json_schema
    field = "response_format.json_schema.schema"
    if wanted.schema_ is None:
        return _any_object(field)
    return Form("schema", _dump(enforceable(wanted.schema_)), field, wanted.strict is not False, True)


def _structured(fields: Any) -> Form:
    ((kind, value),) = ((k, v) for k, v in fields.structured_outputs if v is not None)
    field = f"structured_outputs.{kind}"
    if kind == "json_object":
        return _any_object(field)
    if kind == "choice":
        options = [{"type": "const_string", "value": choice} for choice in value]
        shape = {"type": "or", "elements": options} if len(options) > 1 else options[0]
        return Form("tag", _dump({"type": "structural_tag", "format": shape}), field)
    if kind == "json_":
        return Form("schema", _dump(enforceable(_parsed(value))), "structured_outputs.json", is_json=True)
    if kind == "regex":
        check_pattern(value, in_json=False)
    return Form(kind, value, field)


def _any_object(field: str) -> Form:
    return Form("schema", '{"type":"object"}', field, strict=False, is_json=True)


def _parsed(value: Any) -> Any:
    """vLLM takes a schema as JSON text, too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise LineError("invalid_request", "structured_outputs.json is not valid JSON") from None


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
