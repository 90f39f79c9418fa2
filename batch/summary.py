"""What a run did: counts, speed, and what it ran on; as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from batch.state import Totals
from converters.origin import Origin
from l4tool import __version__
from l4tool.core import licence
from l4tool.core.atomic import write_file
from l4tool.core.console import table
from l4tool.core.errors import EXIT_ERROR_LINES, EXIT_OK, L4Error, UsageError
from l4tool.core.sizes import format_duration

_COUNTED = ("num_errors", "lines_done", "prompt_tokens", "completion_tokens")
_PACKAGES = ("torch", "tokenizers", "jinja2", "pillow", "pydantic", "numba", "numpy", "safetensors")


@dataclass(frozen=True)
class MaxErrors:
    """When a run gives up: after more than `count` error lines, or more than `percent` of its lines once there are
    `MIN_LINES`."""

    count: int | None = None
    percent: float | None = None

    MIN_LINES: ClassVar[int] = 100

    @classmethod
    def parse(cls, text: str) -> MaxErrors:
        """'20' or '5%'. Raises UsageError."""
        number = text.strip().removesuffix("%")
        try:
            value = float(number) if "%" in text else int(number)
        except ValueError:
            value = -1
        if not 0 <= value < float("inf") or ("%" in text and value > 100):
            raise UsageError(f"--max-errors {text}", hint="give a number of lines, such as 20, or a share, such as 5%")
        return cls(percent=value) if "%" in text else cls(count=int(value))

    def check(self, summary: Summary) -> None:
        """Raises TooManyErrors. Only this run's lines count."""
        errors, lines = summary.new("num_errors"), summary.new("lines_done")
        too_many = self.count is not None and errors > self.count
        if self.percent is not None and lines >= self.MIN_LINES:
            too_many = too_many or 100 * errors > self.percent * lines
        if too_many:
            raise TooManyErrors(
                f"{errors:,} of {lines:,} lines are errors, more than --max-errors allows",
                hint="see the error lines; the same command carries on, --retry-errors redoes them",
            )


class TooManyErrors(L4Error):
    exit_code = EXIT_ERROR_LINES


@dataclass
class Summary:
    """One job as it stands after this run. `totals` counts earlier runs too; seconds are this run's: `seconds` from
    the first line to the last, `load_seconds` for the model. Tokens: of answered lines."""

    input: str
    output: str
    model: str
    fingerprint: str
    license: dict[str, str] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    lines: int = 0
    blank_lines: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    load_seconds: float = 0.0
    is_complete: bool = False
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = {name: getattr(self, name) for name in _COUNTED}

    ok = property(lambda self: self.totals.ok)
    errors = property(lambda self: self.totals.errors)
    images = property(lambda self: self.totals.images)
    prompt_tokens = property(lambda self: self.totals.prompt_tokens)
    completion_tokens = property(lambda self: self.totals.completion_tokens)
    lines_done = property(lambda self: self.totals.lines)

    @property
    def num_errors(self) -> int:
        return sum(self.totals.errors.values())

    @property
    def exit_code(self) -> int:
        return EXIT_ERROR_LINES if self.num_errors else EXIT_OK

    def new(self, name: str) -> int:
        """What this run added to a count."""
        return int(getattr(self, name) - self._before[name])

    def rate(self, name: str) -> float:
        """This run's count per second."""
        return self.new(name) / self.seconds if self.seconds > 0 else 0.0

    def speed_text(self, elapsed_s: float) -> str:
        """Tokens per second in and out, for the progress line."""
        elapsed_s = max(elapsed_s, 1e-9)
        tokens_in, tokens_out = self.new("prompt_tokens") / elapsed_s, self.new("completion_tokens") / elapsed_s
        text = f"in {tokens_in:,.0f} tok/s, out {tokens_out:,.0f} tok/s"
        return text + (f", {self.num_errors} errors" if self.errors else "")

    def as_table(self) -> str:
        rows: list[tuple[str, str]] = [("lines", f"{self.lines:,}"), ("answered", f"{self.ok:,}")]
        rows += [(f"error: {code}", f"{count:,}") for code, count in sorted(self.errors.items())]
        if before := self._before["lines_done"]:
            rows.append(("of these by earlier runs", f"{before:,}"))
        if self.blank_lines:
            rows.append(("blank lines skipped", f"{self.blank_lines:,}"))
        if self.images:
            rows.append(("images", f"{self.images:,}"))
        rows += [
            ("tokens in", f"{self.prompt_tokens:,}"),
            ("tokens out", f"{self.completion_tokens:,}"),
            ("loading the model", format_duration(self.load_seconds)),
            ("running", format_duration(self.seconds)),
            ("tokens in per second", f"{self.rate('prompt_tokens'):,.1f}"),
            ("tokens out per second", f"{self.rate('completion_tokens'):,.1f}"),
        ]
        if "prefix_cache_hit_rate" in self.engine:
            rows.append(("prefix cache hits", f"{self.engine['prefix_cache_hit_rate']:.0%}"))
        if "idle_share" in self.engine:
            rows.append(("engine idle", f"{self.engine['idle_share']:.1%}"))
        return table(rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "input": self.input,
            "output": self.output,
            "model": self.model,
            "model_fingerprint": self.fingerprint,
            "license": self.license,
            "complete": self.is_complete,
            "lines": self.lines,
            "lines_by_earlier_runs": self._before["lines_done"],
            "blank_lines": self.blank_lines,
            "ok": self.ok,
            "errors": self.num_errors,
            "errors_by_code": dict(sorted(self.errors.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "images": self.images,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "load_seconds": round(self.load_seconds, 3),
            "seconds": round(self.seconds, 3),
            "prompt_tokens_per_second": round(self.rate("prompt_tokens"), 2),
            "completion_tokens_per_second": round(self.rate("completion_tokens"), 2),
            "engine": self.engine,
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all. Raises WriteError."""
        write_file(path, json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")


def license_duty(origin: Origin) -> dict[str, str]:
    """What the model's licence asks of whoever passes these answers on; Llama 4's has a duty for trained models."""
    named = {"model": origin.repo or origin.name, "name": origin.licence_name}
    if not origin.is_llama:
        return named
    return named | {"url": licence.LICENCE_URL, "notice": licence.NOTICE, "duty": licence.OUTPUTS_DUTY}


def engine_stats(backend: object) -> dict[str, Any]:
    """A backend's `stats` as plain JSON values, {} when it keeps none."""
    stats = getattr(backend, "stats", None)
    if dataclasses.is_dataclass(stats) and not isinstance(stats, type):
        stats = dataclasses.asdict(stats)
    if not isinstance(stats, dict):
        return {}
    kept = {key: value for key, value in stats.items() if isinstance(value, int | float | str | bool)}
    if "cached_prompt_tokens" in kept:  # here, since several engines' figures may have been added up
        kept["prefix_cache_hit_rate"] = float(kept["cached_prompt_tokens"]) / max(float(kept["prompt_tokens"]), 1)
    if kept.get("run_s"):
        kept["idle_share"] = (float(kept["input_wait_s"]) + float(kept["output_wait_s"])) / float(kept["run_s"])
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()}


def versions() -> dict[str, str]:
    """l4tool, Python and the packages that decide the numbers."""
    found = {"l4tool": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_fingerprint(folder: Path) -> str:
    """16 hex characters from the config, index and tokenizer files and the names and sizes of the shards."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        elif path.suffix in (".json", ".jinja") and path.is_file() and path.name != "l4tool-report.json":
            digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
