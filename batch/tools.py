"""Tools: what a request may say about them, and the calls that an answer makes, as OpenAI has them.

Llama 4 writes calls as JSON objects, {"name": …, "parameters": {…}}, one after another, or as a Python list of calls,
[f(a=1), g()]. Text is a call only if all of it is calls to tools of the request; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from batch.grammar_child import MAX_WHITESPACE
from batch.json_schemas import enforceable
from batch.schema import LineError, ToolCall

MAX_CALL_CHARS = 1 << 18  # a longer answer is text
MAX_CALLS = 128
_PYTHONIC = re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\(")
_GAP = re.compile(r"[\s;,]*")
_CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's spellings in Python's calls


class _NoCall(Exception):
    """The text is not calls, or not only."""


def tool_call_tag(tools: Sequence[dict[str, Any]], is_parallel: bool) -> dict[str, Any]:
    """xgrammar's structural tag for answers that are calls of these tools, one or (parallel) more. Raises LineError."""
    tags = []
    for tool in tools:
        function = tool["function"]
        schema = enforceable(function.get("parameters") or {"type": "object", "additionalProperties": True})
        begin = f'{{"name": {json.dumps(function["name"])}, "parameters": '
        content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}
        tags.append({"type": "tag", "begin": begin, "content": content, "end": "}"})
    several = {
        "type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True,
        "stop_after_first": not is_parallel,
    }  # fmt: skip
    return {"type": "structural_tag", "format": several}


def parse_tool_calls(text: str, names: frozenset[str]) -> list[tuple[str, str]] | None:
    """The calls that `text` consists of, as (name, arguments in JSON); None when it is anything else."""
    if not 2 <= len(text) <= MAX_CALL_CHARS:
        return None
    try:
        calls = _python_calls(text) if _PYTHONIC.match(text) else _json_calls(text)
        if not 0 < len(calls) <= MAX_CALLS or any(name not in names for name, _ in calls):
            return None
        return [(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)) for name, arguments in calls]
    except (_NoCall, ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _json_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    found: list[Any] = []
    place = _skip_gap(text, 0)
    while place < len(text):
        if text[place] not in "{[":
            raise _NoCall
        value, place = decoder.raw_decode(text, place)
        found += value if isinstance(value, list) else [value]
        place = _skip_gap(text, place)
    return [_json_call(value) for value in found]


def _json_call(value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise _NoCall
    if isinstance(value.get("function"), dict):
        value = value["function"]
    keys = value.keys() - {"type", "name", "id"}
    if len(keys) != 1 or not keys <= {"parameters", "arguments"}:
        raise _NoCall
    name, arguments = value.get("name"), value[keys.pop()]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise _NoCall
    return name, arguments


def _python_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in the answer's strings
        tree = ast.parse(text.strip(), mode="eval")
    if not isinstance(tree.body, ast.List):
        raise _NoCall
    return [_python_call(node) for node in tree.body.elts]


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise _NoCall
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise _NoCall
        arguments[keyword.arg] = _literal(keyword.value)
    return _dotted(node.func), arguments


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _NoCall


def _literal(node: ast.expr) -> Any:
    """A JSON value from Python's literals, and JSON's own constants."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise _NoCall
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise _NoCall
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _NoCall
        return -value if isinstance(node.op, ast.USub) else value
    raise _NoCall


def _skip_gap(text: str, place: int) -> int:
    match = _GAP.match(text, place)
    return match.end() if match else place


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def call_arguments(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call in the conversation, for the template. Raises LineError."""
    try:
        arguments = json.loads(call.arguments, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise LineError("invalid_request", f"tool_calls: the arguments of '{call.name[:64]}' are not a JSON object")
    return arguments


def forced_tools(tools: tuple[dict[str, Any], ...], choice: Any) -> tuple[dict[str, Any], ...] | None:
    """The tools of which the answer must call one; None when it may be text. Raises LineError."""
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise LineError("invalid_request", "tool_choice needs tools")
    if choice == "required":
        return tools
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        named = tuple(tool for tool in tools if tool["function"]["name"] == name)
        if named:
            return named[:1]
        raise LineError("invalid_request", f"tool_choice: no tool is named {str(name)[:64]!r}")
    raise LineError("invalid_request", "tool_choice: none, auto, required or one function by its name")
