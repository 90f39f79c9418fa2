"""`quantize` straight from a repository: headers first, then shards downloaded ahead, quantized and deleted."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.detect import open_checkpoint
from converters.writing import checks, journal, run
from l4tool.core import licence
from l4tool.core.atomic import write_errors
from l4tool.core.console import note
from l4tool.core.lock import output_lock
from l4tool.core.placeholder import filled, is_placeholder
from l4tool.hub import fetch
from l4tool.hub.client import Hub, Snapshot
from l4tool.hub.names import RepoSpec
from l4tool.hub.selection import wanted_files
from l4tool.hub.skeleton import make_skeleton
from quant import pipeline
from quant.checks import device_usable
from quant.hub_supply import AHEAD, HubSupply, describe
from quant.schemes import Recipe

MAX_SIDE_BYTES = 256 * 2**20  # every side file is wanted in the output, tokenizer.json too


@dataclass(frozen=True)
class Download:
    """How the source comes. `keep`: a folder where its files stay, complete in the end as `fetch -o` leaves them."""

    ahead: int = AHEAD
    keep: Path | None = None
    accept_license: bool = False


def quantize_repo(
    hub: Hub, spec: RepoSpec, out: Path, recipe: Recipe, options: pipeline.Options, how: Download
) -> dict[str, Any]:
    """Like `pipeline.quantize`, from a repository. An interrupted run carries on with the commit that it began with.

    Raises what `pipeline.quantize` raises, the hub's errors, and AccessDenied while the licence is not accepted.
    """
    started_s = time.monotonic()
    device_usable(options.device)
    checks.output_usable(out)
    if how.keep is not None:
        checks.keep_apart(how.keep, out)
    snapshot = _resolve(hub, spec, out, options.force)
    job = journal.fingerprint("quantize", pipeline.recipe_fields(recipe, options), describe(snapshot, spec.revision))
    done = None if options.force or options.licence else _complete_already(out, job)
    if done is not None:
        return done
    options = replace(options, source=f"{snapshot.repo_id}@{snapshot.commit}")
    hub.check_access(snapshot)
    if licence.is_llama(snapshot.card, snapshot.repo_id):
        licence.accept(snapshot.repo_id, how.accept_license)
    note(f"source: {snapshot.repo_id} at {snapshot.commit}")
    report = _stream(hub, snapshot, spec, out, recipe, options, how, started_s)
    if how.keep is not None:
        _complete_source(hub, snapshot, how.keep)
    return report


def _stream(
    hub: Hub,
    snapshot: Snapshot,
    spec: RepoSpec,
    out: Path,
    recipe: Recipe,
    options: pipeline.Options,
    how: Download,
    started_s: float,
) -> dict[str, Any]:
    with run.claim(out), _staging(out, snapshot, how.keep) as folder:
        make_skeleton(hub, snapshot, folder, MAX_SIDE_BYTES)
        reader = open_checkpoint(folder)
        supply = HubSupply(hub, snapshot, spec.revision, folder, how.ahead, keep=how.keep is not None)
        try:
            plan, budget = pipeline.prepare(reader, out, recipe, options)
            return pipeline.run_claimed(reader, out, recipe, options, plan, budget, supply, started_s)
        finally:
            supply.close()
            reader.close()


def _resolve(hub: Hub, spec: RepoSpec, out: Path, force: bool) -> Snapshot:
    """The snapshot to work on: that of the run which `out` holds, if it is one of the same repository and revision."""
    snapshot = hub.snapshot(spec)
    begun = journal.begun_job(out).get("source", {})
    same = (begun.get("repo"), begun.get("revision", spec)) == (spec.repo_id, spec.revision)
    if force or not same or begun["commit"] == snapshot.commit:
        return snapshot
    note(
        f"{spec.repo_id} has moved on to {snapshot.commit[:12]}; this run stays with {begun['commit'][:12]}, "
        "which it began with (--force starts afresh)"
    )
    return hub.snapshot(RepoSpec(spec.repo_id, begun["commit"]))


def _complete_already(out: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an output that this very job has completed: nothing needs to be read from the hub for it."""
    report = journal.read_report(out)
    if report is None or (out / journal.JOURNAL).is_file() or journal.difference(report["job"], job) is not None:
        return None
    note(f"{out} is already complete: the same source and options, nothing to do")
    shutil.rmtree(out / journal.STAGING, ignore_errors=True)
    return report


@contextlib.contextmanager
def _staging(out: Path, snapshot: Snapshot, keep: Path | None) -> Iterator[Path]:
    """The folder for the source's files, for this commit alone: in `out` until it is complete, or `keep`, locked."""
    root = out / journal.STAGING
    try:
        if keep is None:
            yield root / snapshot.commit
        else:
            with write_errors(keep):
                keep.mkdir(parents=True, exist_ok=True)
            with output_lock(keep):
                yield keep
    finally:
        job = journal.read_journal(out).job or {}  # none: complete, or refused before anything was written
        for path in root.iterdir() if root.is_dir() else ():
            if path.name != job.get("source", {}).get("commit"):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            root.rmdir()


def _complete_source(hub: Hub, snapshot: Snapshot, folder: Path) -> None:
    """What the run did not need, and the manifest: shards used up by an earlier run, files beside the weights."""
    for file in wanted_files(snapshot):
        path = folder / file.path
        if is_placeholder(path):
            with write_errors(path):
                path.unlink(missing_ok=True)
            filled(path)
    options = fetch.Options(accept_license=True, token=hub.token, endpoint=hub.endpoint, timeout_s=hub.timeout_s)
    fetch.fetch(f"{snapshot.repo_id}@{snapshot.commit}", folder, options)
