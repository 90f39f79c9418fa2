"""The one output sink: data goes to stdout, everything else (progress, notes, errors) to stderr."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from l4tool.core.sizes import format_bytes, format_duration

LOG_INTERVAL_S = 30.0
BAR_INTERVAL_S = 0.2


def note(text: str) -> None:
    """One line for the person at the terminal or the cron mail."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Rows → aligned text; numbers and sizes line up on the right, the first column on the left."""
    cells = [[str(cell) for cell in row] for row in rows]
    if header is not None:
        cells.insert(0, list(header))
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])] + [cell.rjust(widths[i + 1]) for i, cell in enumerate(row[1:])]
        lines.append("  ".join(padded).rstrip())
    if header is not None:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


class Progress:
    """tqdm on a terminal; one log line every 30 s elsewhere. Counts bytes (`unit="B"`) or things.

    `suffix` is free text shown behind the rate (tokens/s, say). `line` makes it one of several bars on a terminal:
    that many lines below the first, gone when it is closed.
    """

    def __init__(
        self, label: str, total: int | None, unit: str = "B", initial: int = 0, line: int | None = None
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, initial
        self.initial = initial
        self._suffix: str | Callable[[], str] = ""
        self.started_s = self.logged_s = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()  # 80 × 24 where the terminal does not tell; tqdm would hide its bars
            self.bar = tqdm(
                total=total, initial=initial, desc=label, unit=unit, file=sys.stderr, ncols=size.columns,
                nrows=size.lines, unit_scale=unit == "B", unit_divisor=1024 if unit == "B" else 1000,
                position=line, leave=not line,
            )  # fmt: skip

    def advance(self, amount: int, suffix: str | Callable[[], str] | None = None) -> None:
        """Add `amount` units; thread-safe enough for one writer. A `suffix` that takes time to make is a function."""
        self.done += amount
        now_s = time.monotonic()
        if self.bar is None and now_s - self.logged_s < LOG_INTERVAL_S:
            self._suffix = suffix if suffix is not None else self._suffix
            return
        if suffix is not None:
            self._suffix = suffix
        if self.bar is not None:
            if suffix is not None and now_s - self.logged_s >= BAR_INTERVAL_S:
                self.logged_s = now_s
                self.bar.set_postfix_str(self.suffix, refresh=False)
            self.bar.update(amount)
        else:
            self.logged_s = now_s
            note(self._line())

    @property
    def suffix(self) -> str:
        """What is shown behind the rate."""
        return self._suffix if isinstance(self._suffix, str) else self._suffix()

    def _line(self) -> str:
        elapsed_s = max(time.monotonic() - self.started_s, 1e-9)
        rate = (self.done - self.initial) / elapsed_s
        show = format_bytes if self.unit == "B" else lambda n: f"{n:,.0f} {self.unit}"
        line = f"{self.label}: {show(self.done)}"
        if self.total:
            left_s = (self.total - self.done) / rate if rate > 0 else float("inf")
            eta = format_duration(left_s) if left_s != float("inf") else "?"
            line += f" of {show(self.total)} ({100 * self.done / self.total:.0f} %), {show(rate)}/s, ETA {eta}"
        else:
            line += f", {show(rate)}/s"
        return line + (f", {self.suffix}" if self.suffix else "")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
