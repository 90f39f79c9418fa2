"""What makes an input line the same line again: its bytes, the pictures it names, and how often it stood before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch.jsonl import BadJson, RawLine, parse_json
from batch.key_table import KEY_BYTES, KeyTable

_MAYBE_IMAGE = b'"image'  # "image", "images", "image_url"
_ELSEWHERE = ("data:", "http:", "https:")


def id_key(line_id: str | int) -> bytes:
    """A line's id as 16 bytes; 1 and "1" differ."""
    return hashlib.blake2b(repr(line_id).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class LineKeys:
    """Keys of the lines of one pass over the input, in input order. `digest` covers all of them so far.

    A local picture counts by path, size and modification time: reading it would cost as much as preparing the line.
    Lines that are equal in all of this are told apart by their count.
    """

    def __init__(self, image_base: Path) -> None:
        self._image_base = image_base
        self._seen = KeyTable()
        self._repeats: dict[int, int] = {}
        self._digest = hashlib.blake2b(digest_size=KEY_BYTES)

    def key(self, raw: RawLine) -> bytes:
        """16 bytes; ask once for every line, in order."""
        digest = hashlib.blake2b(raw.data, digest_size=KEY_BYTES)
        if raw.too_long:
            digest.update(b"\nlonger")
        if _MAYBE_IMAGE in raw.data:
            for fact in self._pictures(raw.data):
                digest.update(fact.encode("utf-8", "surrogatepass"))
        key = digest.digest()
        number, is_new = self._seen.add(key)
        if not is_new:
            count = self._repeats[number] = self._repeats.get(number, 0) + 1
            key = hashlib.blake2b(key + count.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()
        self._digest.update(key)
        return key

    def digest(self) -> bytes:
        """16 bytes over the keys of all lines so far."""
        return self._digest.digest()

    def _pictures(self, data: bytes) -> Iterator[str]:
        try:
            value = parse_json(data)
        except BadJson:
            return
        for source in image_sources(value):
            if source.startswith(_ELSEWHERE):
                continue
            try:
                stat = (self._image_base / source.removeprefix("file://")).stat()
                yield f"\n{source}:{stat.st_size}:{stat.st_mtime_ns}"
            except (OSError, ValueError):
                yield f"\n{source}:missing"


def image_sources(value: Any) -> Iterator[str]:
    """Every string in a parsed line that may name a picture, in order."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            for key, inner in item.items():
                if key in ("image", "url") and isinstance(inner, str):
                    yield inner
                elif key == "images" and isinstance(inner, list):
                    yield from (each for each in inner if isinstance(each, str))
                else:
                    stack.append(inner)
