"""Watches one completion for its stop strings, whichever tokens these fall into."""

from __future__ import annotations

from collections.abc import Callable

Decode = Callable[[list[int]], str]

SPARE_CHARS = 16
FIRST_TAIL = 16  # tokens: a tail of this length is the first to be tried in half


class StopWatcher:
    """Decodes only a tail of the tokens at each step, long enough for the longest stop string.

    A tail may begin or end inside a UTF-8 character: that shows as U+FFFD at its edge and matches nothing. What the
    tail finds is then looked up in the whole text, so a tail never decides alone.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...]) -> None:
        self._decode = decode
        self._stop = stop
        self._needed_chars = max(map(len, stop)) + SPARE_CHARS
        self._tail = 0  # first token of the tail
        self._shorten_at = FIRST_TAIL  # tail length in tokens at which a shorter one is tried

    def find(self, output: list[int]) -> str | None:
        """Called once per new token with all tokens so far: the text before the first stop string, or None."""
        tail = self._decode(output[self._tail :])
        if any(stop in tail for stop in self._stop):
            text = self._decode(output)
            places = [at for at in map(text.find, self._stop) if at >= 0]
            if places:
                return text[: min(places)]
        if len(output) - self._tail >= self._shorten_at:
            middle = (self._tail + len(output)) // 2
            if len(self._decode(output[middle:])) >= self._needed_chars:
                self._tail = middle
            else:  # short tokens, or some without text: look again when there are twice as many
                self._shorten_at *= 2
        return None
