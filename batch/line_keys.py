"""What makes an input line the same line again: its bytes, the pictures it names, and how often it stood before."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch.jsonl import BadJson, RawLine, parse_json
from batch.key_table import KEY_BYTES, KeyTable
from batch.local_files import local_path
from batch.schema import LineError
from l4tool.core.errors import UsageError

_MAYBE_IMAGE = b'"image'  # "image", "images", "image_url"
_ELSEWHERE = ("data:", "http:", "https:")
MAX_SHARDS = 100_000


@functools.lru_cache(maxsize=4096, typed=True)  # asked for when a line is taken and when it is answered
def id_key(line_id: str | int) -> bytes:
    """A line's id as 16 bytes; 1 and "1" differ."""
    return hashlib.blake2b(repr(line_id).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 1. Which part a line is in depends on its bytes alone, so equal lines share one."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """'3/8'. Raises UsageError."""
        index, _, count = text.strip().partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= MAX_SHARDS):
            raise UsageError(f"--shard {text}", hint="give I/N with I from 1 to N, such as 3/8")
        return cls(int(index), int(count))

    def has(self, content: bytes) -> bool:
        """Whether a line of this 16-byte digest is in it. The table of keys goes by the first 8 bytes: take others."""
        return int.from_bytes(content[8:], "little") % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class LineKeys:
    """Keys of the lines of one pass over the input, in input order. `digest` covers the bytes of all lines so far, of
    other shards too, and so is the same for all shards of an input; `lines` are the shard's own.

    A local picture counts by path, size and modification time: reading it would cost as much as preparing the line.
    Lines that are equal in all of this are told apart by their count.
    """

    def __init__(self, image_base: Path | None, shard: Shard | None = None) -> None:
        self._image_base, self._shard = image_base, shard
        self.lines = 0
        self._seen = KeyTable()
        self._repeats: dict[int, int] = {}
        self._digest = hashlib.blake2b(digest_size=KEY_BYTES)

    def key(self, raw: RawLine) -> bytes | None:
        """16 bytes, None for a line of another shard; ask once for every line, in order."""
        digest = hashlib.blake2b(raw.data, digest_size=KEY_BYTES)
        if raw.too_long:
            digest.update(b"\nlonger")
        content = digest.digest()
        self._digest.update(content)
        if self._shard is not None and not self._shard.has(content):
            return None
        self.lines += 1
        if _MAYBE_IMAGE in raw.data:
            for fact in self._pictures(raw.data):
                digest.update(fact.encode("utf-8", "surrogatepass"))
        key = digest.digest()
        number, is_new = self._seen.add(key)
        if not is_new:
            count = self._repeats[number] = self._repeats.get(number, 0) + 1
            key = hashlib.blake2b(key + count.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()
        return key

    def digest(self) -> bytes:
        """16 bytes over all lines so far."""
        return self._digest.digest()

    def _pictures(self, data: bytes) -> Iterator[str]:
        try:
            value = parse_json(data)
        except BadJson:
            return
        for source in image_sources(value):
            if self._image_base is None or source.startswith(_ELSEWHERE):
                continue
            try:
                stat = (self._image_base / local_path(source)).stat()
                yield f"\n{source}:{stat.st_size}:{stat.st_mtime_ns}"
            except (OSError, ValueError, LineError):
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
