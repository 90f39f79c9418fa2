"""What is wrong with a checkpoint: the first thing as an error, or everything as a list.

Code that checks calls a `Report` with the error that a strict caller would raise and, where one sentence sums up many
tensors, a finding for each of them. `raise_first` stops there; a `Collector` notes it and the check goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from l4tool.core.errors import EXIT_CHECKSUM, EXIT_DATA, EXIT_NO_INPUT, L4Error

WORST_FIRST = (EXIT_CHECKSUM, EXIT_NO_INPUT, EXIT_DATA)


@dataclass(frozen=True)
class Finding:
    """One fault. `kind` is a stable word for programs; `file` and `tensor` are names, where there is one to name."""

    kind: str
    message: str
    file: str | None = None
    tensor: str | None = None
    exit_code: int = EXIT_DATA
    hint: str | None = None

    @property
    def is_error(self) -> bool:
        """A finding with exit code 0 is a warning."""
        return self.exit_code != 0

    def as_json(self) -> dict[str, Any]:
        return {"severity": "error" if self.is_error else "warning", **asdict(self)}


class Report(Protocol):
    """Called with what is wrong; may raise it."""

    def __call__(self, error: L4Error, each: Sequence[Finding] = ()) -> None: ...


def raise_first(error: L4Error, each: Sequence[Finding] = ()) -> None:
    """The strict Report."""
    raise error


class Collector:
    """The Report that notes everything, each thing once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def __call__(self, error: L4Error, each: Sequence[Finding] = ()) -> None:
        self.add(*(each or [of_error(error)]))

    def add(self, *findings: Finding) -> None:
        self._found.update(dict.fromkeys(findings))

    @property
    def findings(self) -> list[Finding]:
        return list(self._found)


def of_error(error: L4Error, kind: str | None = None, file: Path | None = None) -> Finding:
    """An error that stands for itself."""
    kinds = {EXIT_CHECKSUM: "checksum", EXIT_NO_INPUT: "missing-file"}
    kind = kind or kinds.get(error.exit_code, "checkpoint")
    return Finding(kind, error.message, file.name if file else None, None, error.exit_code, error.hint)


def worst_code(findings: Sequence[Finding]) -> int:
    """The exit code of the worst finding: checksum, then missing, then names, shapes and values; 0 without errors."""
    codes = {finding.exit_code for finding in findings if finding.is_error}
    return next((code for code in WORST_FIRST if code in codes), min(codes, default=0))
