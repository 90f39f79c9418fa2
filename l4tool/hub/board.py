"""What a person sees of a fetch: one bar for everything and one per big file on a terminal, log lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from l4tool.core.console import Progress, note
from l4tool.core.sizes import format_bytes

BIG_BYTES = 16 * 2**20  # smaller files get no bar and no line of their own


class Board:
    """Counts bytes of many threads."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self.label, self.total_bytes = label, total_bytes
        self.done_bytes = 0
        self._mutex = threading.Lock()
        self._lines: set[int] = set()  # taken by file bars
        self._overall: Progress | None = None

    def __enter__(self) -> Board:
        self._overall = Progress(self.label, self.total_bytes, line=0)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._mutex:
            if self._overall is not None:
                self._overall.close()
            self._overall = None

    def say(self, text: str) -> None:
        """A line for the reader, above the bars."""
        if self._overall is not None and self._overall.bar is not None:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            note(text)

    @contextlib.contextmanager
    def file(self, path: str, size: int) -> Iterator[Callable[[int], None]]:
        """Show one file while it is worked on; yields what counts its bytes."""
        bar, line = None, 0
        if size >= BIG_BYTES and sys.stderr.isatty():
            with self._mutex:
                line = next(number for number in range(1, len(self._lines) + 2) if number not in self._lines)
                self._lines.add(line)
                bar = Progress(f"  {path[-40:]}", size, line=line)

        def count(delta: int) -> None:
            with self._mutex:
                self.done_bytes += delta
                for progress in (self._overall, bar):
                    if progress is not None:
                        progress.advance(delta)

        try:
            yield count
            if bar is None and size >= BIG_BYTES:
                note(f"{path}: {format_bytes(size)}, checked")
        finally:
            with self._mutex:
                if bar is not None:
                    bar.close()
                    self._lines.discard(line)
