"""One run of a command that writes a checkpoint: what an earlier run left, one pass over the source, the files beside.

The command says what to make (`Job`); everything about interruptions, other runs and full disks is here, once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from converters.reader import Reader
from converters.writing import checks, journal
from converters.writing.plan import Budget, Plan, unfinished
from converters.writing.resume import take_up
from converters.writing.stream import Source, Stream
from converters.writing.supply import Supply
from l4tool.core.atomic import write_errors
from l4tool.core.console import note
from l4tool.core.lock import output_lock


@dataclass(frozen=True)
class Finished:
    """What a run ends with: its journal, the job's fingerprint, how long it took, whether it carried on."""

    log: journal.Journal
    job: dict[str, Any]
    seconds: float
    resumed: bool


class Job(Protocol):
    """What a command makes. `tool` ("quantize") is the command; `plan` follows from headers and options alone."""

    tool: str
    reader: Reader  # the checkpoint that it is made from, as the fingerprint knows it
    plan: Plan

    @property
    def source(self) -> Source:
        """Where tensors are read, by the names of the plan's items."""
        ...

    def recipe(self) -> dict[str, Any]:
        """All options that decide the output's bytes, for JSON."""
        ...

    def files(self) -> list[str]:
        """What a run creates besides index, report and journal: `--force` may delete exactly that."""
        ...

    def begin(self, out: Path) -> None:
        """Say what is to be said before the work."""
        ...

    def complete(self, out: Path, finished: Finished) -> dict[str, Any]:
        """Write everything beside the shards, what makes the folder a checkpoint last; returns the report."""
        ...

    def mend(self, out: Path, report: dict[str, Any]) -> dict[str, Any]:
        """Look after an output that is complete already; returns its report."""
        ...


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold the output folder, made if need be; one that is still empty at the end goes again."""
    checks.output_usable(out)
    is_new = not out.exists()
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with output_lock(out):
            checks.output_usable(out)
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()


def run(job: Job, out: Path, budget: Budget, supply: Supply, started_s: float, force: bool = False) -> dict[str, Any]:
    """Make the job's output in a folder that is held (`claim`), or carry on where an interrupted run of it stopped.

    Returns the report. Raises CheckpointError, WriteError and what `supply` raises; what was finished until then stays
    and counts.
    """
    plan = job.plan
    made = journal.fingerprint(job.tool, job.recipe(), supply.describe(job.reader))
    made["files"] = [*(shard.file_name for shard in plan.shards), *job.files()]
    done = checks.begin(out, made, force)
    if done is not None:
        note(f"{out} is already complete: the same source and options, nothing to do")
        return job.mend(out, done | {"job": made})
    job.begin(out)
    before = take_up(out, plan, journal.read_journal(out))
    files = list(unfinished(plan, before.tensors))
    checks.disk_space(out, plan, before.shards, supply.folder, supply.room_bytes(files))
    log = journal.Journal(out, made, before)
    try:
        count = sum(map(len, before.tensors.values()))
        if count:
            note(f"carrying on: {count} of {sum(map(len, plan.items))} tensors are finished")
        Stream(job.source, out, plan, budget, log, supply, job.tool).run()
        report = job.complete(out, Finished(log, made, time.monotonic() - started_s, count > 0))
        log.close()
        with write_errors(log.path):
            log.path.unlink()
        return report
    finally:
        log.close()
