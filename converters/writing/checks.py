"""What is refused before the first byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from converters.writing import journal
from converters.writing.journal import STAGING
from converters.writing.plan import Plan
from l4tool.core.atomic import part_path
from l4tool.core.errors import UsageError, WriteError
from l4tool.core.lock import LOCK
from l4tool.core.sizes import format_bytes

SLACK_BYTES = 64 * 2**20  # side files, report, index


def paths_apart(source: Path, out: Path) -> None:
    """Raises UsageError when the output is the source or lies inside it."""
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UsageError(f"the output {out} lies inside the source {source}", hint="choose another folder with -o")


def keep_apart(keep: Path, out: Path) -> None:
    """Raises UsageError when the folder for the source's files and the output lie in each other."""
    inner, outer = keep.resolve(), out.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(f"--keep-source {keep} and the output {out} lie in each other", hint="choose separate folders")


def output_usable(out: Path) -> None:
    """Raises WriteError for an output that is a file, or holds anything that no run has written."""
    if out.exists() and not out.is_dir():
        raise WriteError(f"{out} is a file, not a folder", hint="choose another output with -o")
    if not journal.is_empty(out) and not journal.is_ours(out):
        raise WriteError(f"{out} is not empty", hint="choose an empty or a new folder with -o")


def begin(out: Path, job: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Compare the output's state with the job: the report if it is complete, None if there is something to do.

    Raises WriteError when the folder belongs to another job; with `force` that job's files are deleted instead.
    """
    journaled, report = journal.read_journal(out), journal.read_report(out)
    old = journaled.job
    if old is None and report is not None:
        old = report["job"]
    if old is None and (out / journal.JOURNAL).is_file() and not force:
        if [entry.name for entry in out.iterdir() if entry.name not in (LOCK, STAGING, journal.JOURNAL)]:
            raise WriteError(f"the journal in {out} cannot be read", hint=journal.FORCE_HINT)
        return None
    changed = None if old is None else journal.difference(old, job)
    if journaled.form != journal.FORM:
        changed = "it was begun by an earlier version of l4tool"
    if changed is not None and not force:
        state = "complete" if report is not None else "unfinished"
        raise WriteError(f"{out} holds another, {state} run: {changed}", hint=journal.FORCE_HINT)
    if force:
        journal.remove_output(out, old or job, keep_staging="repo" in job["source"])
        return None
    return report if report is not None and not (out / journal.JOURNAL).is_file() else None


def disk_space(out: Path, plan: Plan, finished: Container[str], source: Path, source_bytes: int) -> None:
    """Raises WriteError when the disk cannot take what is still to be written.

    `source_bytes` more will lie in the folder `source` while it is read.
    """
    todo = [shard for shard in plan.shards if shard.file_name not in finished]
    reusable = 0
    for shard in todo:
        for path in (out / shard.file_name, part_path(out / shard.file_name)):
            if path.exists():
                reusable += path.stat().st_blocks * 512
    needed = sum(shard.nbytes for shard in todo) + SLACK_BYTES - reusable
    if source_bytes and source.stat().st_dev == out.stat().st_dev:
        needed, source_bytes = needed + source_bytes, 0
    for folder, still in ((out, needed), (source, source_bytes)):
        free = shutil.disk_usage(folder).free
        if still > free:
            raise WriteError(
                f"{folder}: {format_bytes(still)} are still to be written, the disk has {format_bytes(free)} free",
                hint="free some space, or choose another output with -o",
            )
