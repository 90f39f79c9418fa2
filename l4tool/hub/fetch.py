"""The whole of `l4tool fetch`: what is wanted, what is there, what is missing; then every missing byte, checked."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from l4tool.core.console import note
from l4tool.core.errors import CheckpointError, NetworkError
from l4tool.core.sizes import format_bytes, format_duration
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.job import DEFAULT_OPTIONS, Job
from l4tool.hub.job import Options as Options
from l4tool.hub.local import cached_snapshot, is_complete
from l4tool.hub.manifest import MANIFEST, Manifest, read_manifest, total_bytes
from l4tool.hub.names import RepoSpec, parse_repo
from l4tool.hub.selection import wanted_files as wanted_files
from l4tool.hub.targets import CacheTarget, FolderTarget, Target


@dataclass(frozen=True)
class Result:
    """What is now at `folder`. `fetched_bytes` came over the network in this run."""

    folder: Path
    repo_id: str
    commit: str
    num_files: int
    total_bytes: int
    fetched_bytes: int
    seconds: float

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "folder": str(self.folder)}


def fetch(text: str, out: Path | None = None, options: Options = DEFAULT_OPTIONS) -> Result:
    """Bring the repository `text` ('scout', 'org/name@rev') whole and checked to the folder `out`, or to the shared
    Hugging Face cache if that is None.

    Raises UsageError, InputMissing, AuthError, AccessDenied, NetworkError, RateLimited, ChecksumError, WriteError,
    LockHeld and CheckpointError; what has arrived by then is kept and taken up by the next call.
    """
    started_s = time.monotonic()
    spec = parse_repo(text, options.layout)
    if (folder := _cached_by_others(spec, out)) is not None:
        note(f"{spec.repo_id}: {folder} is complete; offline mode is on, so nothing was compared with the hub")
        return Result(folder, spec.repo_id, folder.name, len(list(folder.iterdir())), 0, 0, 0.0)
    job = _known_job(spec, out, options) or _job(spec, out, options)
    fetched = 0 if job.is_complete() and not options.verify else job.run()
    result = Result(
        job.target.folder, spec.repo_id, job.snapshot.commit, len(job.files), total_bytes(job.files), fetched,
        round(time.monotonic() - started_s, 3),
    )  # fmt: skip
    note(_report(result, options.verify))
    return result


def preview(text: str, out: Path | None = None, options: Options = DEFAULT_OPTIONS) -> str:
    """What `fetch` would do, as a table; nothing is written, no file is read. Raises as `fetch`."""
    return _job(parse_repo(text, options.layout), out, options).preview()


def _job(spec: RepoSpec, out: Path | None, options: Options) -> Job:
    """Ask the hub what is there to fetch."""
    hub = _hub(options)
    snapshot = hub.snapshot(spec)
    files = wanted_files(snapshot, options.layout, options.include, options.exclude)
    return Job(hub, spec, snapshot, files, _target(snapshot, out), options, offline=False)


def _known_job(spec: RepoSpec, out: Path | None, options: Options) -> Job | None:
    """The job as the manifest has it, where the hub need not be asked: offline, or for a commit that is whole here.

    None if it has to be asked; offline that is a NetworkError.
    """
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    folder = out if out is not None else cached_snapshot(spec)
    manifest = None
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(folder) if folder is not None else None
    if manifest is not None and _answers(manifest, spec, options, offline):
        files = tuple(
            RemoteFile(path, entry.size, entry.sha256, entry.git_oid or "") for path, entry in manifest.files.items()
        )
        snapshot = Snapshot(manifest.repo_id, manifest.commit, files, gated=False, card={})
        job = Job(_hub(options), spec, snapshot, files, _target(snapshot, out), options, offline)
        if job.is_complete():
            return job
    if offline:
        raise NetworkError(
            f"{spec.repo_id} is not complete in {folder or 'the cache'}, and offline mode is on",
            hint="unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) and run the same command again",
        )
    return None


def _cached_by_others(spec: RepoSpec, out: Path | None) -> Path | None:
    """Offline: a complete snapshot in the cache that another program has fetched, so without hashes to compare."""
    from huggingface_hub import constants

    folder = cached_snapshot(spec) if out is None and constants.HF_HUB_OFFLINE else None
    return folder if folder is not None and not (folder / MANIFEST).exists() and is_complete(folder) else None


def _answers(manifest: Manifest, spec: RepoSpec, options: Options, offline: bool) -> bool:
    """Does the manifest say what the hub would say?"""
    revision = spec.revision or "main"
    same = revision == manifest.commit or (offline and revision == (manifest.revision or "main"))
    return manifest.repo_id == spec.repo_id and manifest.selection == options.selection and same


def _hub(options: Options) -> Hub:
    return Hub(options.endpoint, options.token, options.timeout_s, options.policy)


def _target(snapshot: Snapshot, out: Path | None) -> Target:
    return CacheTarget(snapshot) if out is None else FolderTarget(out, snapshot.repo_id)


def _report(result: Result, verified: bool) -> str:
    what = f"{result.repo_id} @ {result.commit[:12]}: {result.num_files} files, {format_bytes(result.total_bytes)}"
    if not result.fetched_bytes:
        return f"{what}, {'every byte is right' if verified else 'already complete'}"
    rate = f"{format_bytes(result.fetched_bytes / max(result.seconds, 1e-9))}/s"
    return f"{what}, complete; {format_bytes(result.fetched_bytes)} in {format_duration(result.seconds)} ({rate})"
