"""JSONL in: a streaming reader with bounded memory, and strict JSON (no NaN, no duplicate keys, no lone surrogates)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 64 * 2**20
HEAD_BYTES = 4096
MAX_PARTS = 1_000_000  # strings, keys, arrays and objects in a line: each costs up to 50 times its bytes in memory
MAX_KEYS = 10_000  # in one object
_SKIP_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"
_SEPARATORS = [(chr(code), f"\\u{code:04x}") for code in (0x85, 0x2028, 0x2029)]
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class BadJson(ValueError):
    """A line that is not one strict JSON value; the message says why."""


@dataclass(frozen=True)
class RawLine:
    """One non-blank line without its line ending. `number` counts from 1, blank lines included.

    `too_long`: the line passed the byte limit; `data` is then only its first HEAD_BYTES bytes. `key` is what the
    journal knows it by (`line_keys`).
    """

    number: int
    data: bytes
    too_long: bool = False
    key: bytes = b""


class LineReader:
    """Iterates over the lines of a binary file, never holding more than one line of at most `max_line_bytes`.

    CRLF endings, a UTF-8 byte order mark and a missing final newline are all fine. Whitespace-only lines are
    skipped and counted in `blank_lines`.
    """

    def __init__(self, file: BinaryIO, max_line_bytes: int = MAX_LINE_BYTES, limit: int | None = None) -> None:
        self._file = file
        self._max_line_bytes = max_line_bytes
        self._limit = limit
        self.lines = 0
        self.blank_lines = 0
        self._number = 0

    def __iter__(self) -> Iterator[RawLine]:
        while self._limit is None or self.lines < self._limit:
            raw = self._file.readline(self._max_line_bytes + 1)
            if not raw:
                return
            self._number += 1
            too_long = len(raw) > self._max_line_bytes and not raw.endswith(b"\n")
            if too_long:
                raw = raw[:HEAD_BYTES]
                self._skip_rest_of_line()
            if self._number == 1 and raw.startswith(_BOM):
                raw = raw[len(_BOM) :]
            data = raw.strip(b" \t\r\n")
            if not data and not too_long:
                self.blank_lines += 1
                continue
            self.lines += 1
            yield RawLine(self._number, data, too_long)

    def _skip_rest_of_line(self) -> None:
        while chunk := self._file.readline(_SKIP_BYTES):
            if chunk.endswith(b"\n"):
                return


def _no_constant(name: str) -> Any:
    raise BadJson(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise BadJson(f"an object with more than {MAX_KEYS:,} keys")
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadJson(f"the key {twice[:100]!r} appears twice in one object")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def parse_json(data: bytes) -> Any:
    """Strict JSON from UTF-8 bytes. Raises BadJson: never RecursionError, UnicodeError or a plain ValueError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"not valid UTF-8 at byte {error.start}") from None
    if len(data) > MAX_PARTS:
        _refuse_too_many_parts(data)
    try:
        value = _DECODER.decode(text)
    except BadJson:
        raise
    except json.JSONDecodeError as error:
        raise BadJson(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadJson(f"not valid JSON: {error}") from None
    if _SURROGATE_ESCAPE.search(data):
        _refuse_lone_surrogates(value)
    return value


def _refuse_too_many_parts(data: bytes) -> None:
    """Before anything is built: 64 MiB of `[],[],…` would become gigabytes."""
    if data.count(b'"') // 2 + sum(map(data.count, (b"[", b"{"))) <= MAX_PARTS:
        return
    strings = parts = 0
    place = 0
    for match in _STRING.finditer(data):
        strings += 1
        parts += data.count(b"[", place, match.start()) + data.count(b"{", place, match.start())
        place = match.end()
        if strings + parts > MAX_PARTS:
            break
    if strings + parts + data.count(b"[", place) + data.count(b"{", place) > MAX_PARTS:
        raise BadJson(f"more than {MAX_PARTS:,} strings, arrays and objects")


def _refuse_lone_surrogates(value: Any) -> None:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise BadJson("a string contains half of a surrogate pair") from None
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump_line(value: dict[str, Any]) -> bytes:
    """One output line: compact UTF-8 JSON with its newline; text stays readable, NaN is our own bug.

    The line separators that are not "\\n" are escaped, so that no reader splits a line at them.
    """
    text = _ENCODER.encode(value)
    for separator, escape in _SEPARATORS:
        if separator in text:
            text = text.replace(separator, escape)
    return text.encode("utf-8") + b"\n"


def count_lines(path: Path, max_bytes: int) -> int | None:
    """Number of lines by counting newlines; beyond `max_bytes` an estimate from the part that was read."""
    size = path.stat().st_size
    counted = seen = 0
    last = b"\n"
    with open(path, "rb") as file:
        while seen < max_bytes and (chunk := file.read(2**20)):
            counted += chunk.count(b"\n")
            seen += len(chunk)
            last = chunk[-1:]
    if seen >= size:
        return counted + (last != b"\n")
    return max(1, round(counted * size / seen)) if seen else None
