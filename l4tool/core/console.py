"""The one output sink: data goes to stdout, everything else (progress, notes, errors) to stderr."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from l4tool.core.sizes import format_bytes, format_duration

LOG_INTERVAL_S = 30.0
MAX_LOG_INTERVAL_S = 900.0  # a night's cron mail stays short
BAR_INTERVAL_S = 0.2


@dataclass
class _Style:
    """How everything but data is said; `configure` sets it for the process."""

    is_json: bool = False
    is_quiet: bool = False


_style = _Style()


def configure(is_json: bool | None = None, is_quiet: bool | None = None) -> None:
    """One JSON object per line instead of text; only errors."""
    _style.is_json = _style.is_json if is_json is None else is_json
    _style.is_quiet = _style.is_quiet if is_quiet is None else is_quiet


def log_line(text: str, level: str = "info", event: str = "note", **fields: Any) -> str:
    """`text` as it goes to stderr, line end included; as JSON it has ts (UTC), level, event, message and `fields`."""
    if not _style.is_json:
        return text + "\n"
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = {"ts": now, "level": level, "event": event, "message": text, **fields}
    return json.dumps(line, ensure_ascii=False, default=str) + "\n"


def note(text: str, event: str = "note", **fields: Any) -> None:
    """One line for the person at the terminal or the cron mail; `fields` are for programs (--log-format json)."""
    if not _style.is_quiet:
        sys.stderr.write(log_line(text, "info", event, **fields))
        sys.stderr.flush()


def report_error(message: str, hint: str | None, exit_code: int) -> None:
    """The one error that ends a command."""
    fields = {} if hint is None else {"hint": hint}
    text = message if _style.is_json or hint is None else f"{message}\n  hint: {hint}"
    sys.stderr.write(log_line(text, "error", "error", exit_code=exit_code, **fields))
    sys.stderr.flush()


def is_json() -> bool:
    """Whether --log-format json was asked for."""
    return _style.is_json


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
    """tqdm on a terminal; elsewhere a log line after 30 s, then ever more rarely, and every 30 s as JSON. Counts bytes
    (`unit="B"`) or things.

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
        self._interval_s = LOG_INTERVAL_S
        if sys.stderr.isatty() and not _style.is_json and not _style.is_quiet:
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
        if self.bar is None and now_s - self.logged_s < self._interval_s:
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
            if not _style.is_json:
                self._interval_s = min(2 * self._interval_s, MAX_LOG_INTERVAL_S)
            fields = {"label": self.label, "done": self.done, "total": self.total, "unit": self.unit}
            note(self._line(), "progress", **fields, seconds=round(now_s - self.started_s, 1))

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
