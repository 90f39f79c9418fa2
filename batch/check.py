"""`batch --check`: every line prepared as a run would do it, and nothing run. Needs no weights."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch.inputs import Lines, open_input
from batch.job import BatchOptions, Front, load_front, make_preparer, require_consistent
from batch.jsonl import LineReader
from batch.key_table import KeyTable
from batch.line_keys import LineKeys, id_key
from batch.prepare import LineInfo, PreparingSource
from batch.requests import PreparedRequest
from batch.schema import LineError
from l4tool.core.console import Progress, table
from l4tool.core.errors import EXIT_ERROR_LINES, EXIT_OK, InputMissing
from l4tool.core.sizes import format_duration

SHOWN_ERRORS = 20


@dataclass(frozen=True)
class BadLine:
    """A line that would become an error line."""

    input: str
    line: int
    id: str | int | None
    code: str
    message: str


@dataclass
class Findings:
    """What a run over the inputs would have to do. `max_new_tokens`: if no answer ended by itself. `rate`: tokens out
    per second, where it is known, and where from."""

    lines: int = 0
    blank_lines: int = 0
    requests: int = 0
    images: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    max_new_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    shown: list[BadLine] = field(default_factory=list)
    rate: float | None = None
    rate_source: str = ""

    @property
    def exit_code(self) -> int:
        return EXIT_ERROR_LINES if self.errors else EXIT_OK

    @property
    def seconds(self) -> float | None:
        """An estimate of the most it can take; None without a rate."""
        return None if not self.rate else self.max_new_tokens / self.rate

    def as_table(self) -> str:
        rows = [("lines", f"{self.lines:,}"), ("requests that can run", f"{self.requests:,}")]
        rows += [(f"error: {code}", f"{count:,}") for code, count in sorted(self.errors.items())]
        if self.blank_lines:
            rows.append(("blank lines", f"{self.blank_lines:,}"))
        rows += [
            ("images", f"{self.images:,}"),
            ("prompt tokens", f"{self.prompt_tokens:,}"),
            ("longest prompt", f"{self.longest_prompt:,}"),
            ("new tokens at most", f"{self.max_new_tokens:,}"),
        ]
        if self.seconds is not None:
            rows.append((f"estimated at most, at {self.rate:,.0f} tokens/s out", format_duration(self.seconds)))
            rows.append(("  that rate is from", self.rate_source))
        text = table(rows)
        if self.shown:
            bad = [(f"{bad.input}:{bad.line}", bad.code, bad.message[:100]) for bad in self.shown]
            text += "\n\n" + "\n".join(": ".join(row) for row in bad)
            if (more := sum(self.errors.values()) - len(self.shown)) > 0:
                text += f"\n… and {more:,} more"
        return text

    def as_json(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "blank_lines": self.blank_lines,
            "requests": self.requests,
            "errors": sum(self.errors.values()),
            "errors_by_code": dict(sorted(self.errors.items())),
            "error_lines": [vars(bad) for bad in self.shown],
            "images": self.images,
            "prompt_tokens": self.prompt_tokens,
            "longest_prompt": self.longest_prompt,
            "max_new_tokens": self.max_new_tokens,
            "rate": self.rate,
            "rate_source": self.rate_source or None,
            "estimated_max_seconds": self.seconds,
        }


def check_inputs(inputs: list[str], options: BatchOptions, rate: float | None = None) -> Findings:
    """Prepare every line of the inputs. Raises L4Error for what would end a run before its first line."""
    require_consistent(options)
    front = load_front(options)
    found = Findings(rate=rate, rate_source="--rate" if rate else "")
    if rate is None and options.summary is not None and options.summary.exists():
        found.rate, found.rate_source = _recorded_rate(options.summary), str(options.summary)
    for name in inputs:
        _check_one(BatchOptions(**vars(options) | {"input": _source(name)}), name, front, found)
    return found


def _source(name: str) -> Path | str:
    return name if "://" in name else Path(name)


def _recorded_rate(path: Path) -> float | None:
    """Tokens out per second of the run that wrote this summary."""
    try:
        rate = json.loads(path.read_text())["completion_tokens_per_second"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputMissing(f"{path} is not the summary of a run", hint="give --rate instead") from error
    return float(rate) or None


def _check_one(options: BatchOptions, name: str, front: Front, found: Findings) -> None:
    source = open_input(options.input)
    ids = KeyTable()

    def on_request(info: LineInfo, request: PreparedRequest) -> None:
        found.requests += 1
        found.images += len(request.images)
        found.prompt_tokens += len(request.prompt)
        found.longest_prompt = max(found.longest_prompt, len(request.prompt))
        found.max_new_tokens += request.n * request.sampling.max_tokens
        progress.advance(1)

    def on_error(info: LineInfo, error: LineError) -> None:
        found.errors[error.code] += 1
        if len(found.shown) < SHOWN_ERRORS:
            found.shown.append(BadLine(name, info.number, info.id, error.code, error.message))
        progress.advance(1)

    def claim(info: LineInfo) -> LineError | None:
        if options.state.run_each or info.id is None or ids.add(id_key(info.id))[1]:
            return None
        return LineError("duplicate_id", f"the id {str(info.id)[:100]!r} occurs twice")

    with source.open() as file, Progress(f"checking {name}", None, unit="lines") as progress:
        lines = Lines(LineReader(file, options.max_line_bytes, options.limit), name)
        keys = LineKeys(None, options.shard)
        wanted = (raw for raw in lines if keys.key(raw) is not None)
        with contextlib.closing(
            PreparingSource(wanted, make_preparer(options, front), on_request, on_error, claim)
        ) as prepared:
            while prepared.take(wait=True) is not None:
                pass
        lines.raise_if_broken()
        found.lines += keys.lines
        found.blank_lines += lines.reader.blank_lines
