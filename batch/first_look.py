"""What a first look at the input found, so that the second one hashes no line again."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from batch.jsonl import RawLine
from l4tool.core.errors import L4Error

AGAIN_HINT = "run the same command again when nobody writes to it"


@dataclass
class FirstLook:
    """What a first look at the lines found, line by line; `keys` (16 bytes each) and `checks` only of wanted ones."""

    is_wanted: bytearray = field(default_factory=bytearray)
    keys: bytearray = field(default_factory=bytearray)
    checks: array[int] = field(default_factory=lambda: array("I"))

    def wanted(self, lines: Iterator[RawLine]) -> Iterator[tuple[RawLine, bytes]]:
        """The wanted ones among these same lines, each with its key. Raises InputChanged."""
        number = 0
        for is_wanted, raw in zip(self.is_wanted, lines, strict=False):
            if is_wanted:
                if zlib.crc32(raw.data) != self.checks[number]:
                    raise InputChanged(f"line {raw.number} of the input changed while it was read", hint=AGAIN_HINT)
                yield raw, bytes(self.keys[16 * number : 16 * number + 16])
                number += 1


class InputChanged(L4Error):
    """Two looks at the input saw different lines."""
