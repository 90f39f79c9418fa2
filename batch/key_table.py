"""A set of 128-bit keys that numbers its members, some 30 bytes each: a million lines must fit beside the model."""

from __future__ import annotations

import struct
from array import array

import numpy as np

KEY_BYTES = 16
_FIRST_SLOTS = 1 << 12
_CHUNK = 1 << 16  # keys placed at a time
_WORDS = struct.Struct("<QQ")


class KeyTable:
    """Keys → 0, 1, 2, … in the order they are added. Open addressing over flat arrays; keys are never removed."""

    def __init__(self) -> None:
        self._words = array("Q")  # two per key
        self._resize(_FIRST_SLOTS)

    def __len__(self) -> int:
        return len(self._words) // 2

    def find(self, key: bytes) -> int | None:
        """The key's number, None if it was never added."""
        if not self._words:
            return None
        number = self._slots[self._slot(*_WORDS.unpack(key))]
        return number - 1 if number else None

    def add(self, key: bytes) -> tuple[int, bool]:
        """(the key's number, whether it is new)."""
        low, high = _WORDS.unpack(key)
        slot = self._slot(low, high)
        number = self._slots[slot]
        if number:
            return number - 1, False
        words = self._words
        words.append(low)
        words.append(high)
        self._slots[slot] = count = len(words) // 2
        if 2 * count > self._mask:
            self._resize(4 * count)
        return count - 1, True

    def extend(self, keys: np.ndarray) -> None:
        """Add many different new keys at once: uint64 [count, 2]."""
        self._words.frombytes(np.ascontiguousarray(keys, dtype="<u8").tobytes())
        self._resize(max(4 * len(self), _FIRST_SLOTS))

    def _slot(self, low: int, high: int) -> int:
        """Where the key is, or the empty slot where it would be."""
        slots, words, mask = self._slots, self._words, self._mask
        at = low & mask
        while number := slots[at]:
            if words[2 * number - 2] == low and words[2 * number - 1] == high:
                break
            at = (at + 1) & mask
        return at

    def _resize(self, wanted: int) -> None:
        """Room for `wanted` slots or a little more, and every key put in its place again."""
        self._mask = mask = (1 << (wanted - 1).bit_length()) - 1
        table = np.zeros(mask + 1, np.uint32)
        for first in range(0, len(self), _CHUNK):
            self._place(table, first)
        self._slots = array("I")
        self._slots.frombytes(table.tobytes())

    def _place(self, table: np.ndarray, start: int) -> None:
        """Put some keys, from number `start` on, into the table."""
        waiting = np.arange(start, min(start + _CHUNK, len(self)), dtype=np.int64)
        lows = np.frombuffer(self._words, np.uint64)[2 * start : 2 * start + 2 * len(waiting) : 2]
        mask = self._mask
        at = (lows & np.uint64(mask)).astype(np.int64)
        while waiting.size:  # each round: one key into every free slot that some key asks for, the others move on
            asked = np.flatnonzero(table[at] == 0)
            _, first = np.unique(at[asked], return_index=True)
            placed = asked[first]
            table[at[placed]] = waiting[placed] + 1
            left = np.ones(waiting.size, bool)
            left[placed] = False
            waiting, at = waiting[left], (at[left] + 1) & mask
