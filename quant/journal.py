"""What makes a run resumable: a lock on the output, a fingerprint of the job, and a journal of finished shards.

The journal is JSON lines in the output folder, each fsynced: first the job, then one line per finished shard. It goes
away when the run is complete; then `l4tool-report.json` tells what the folder is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.folder import INDEX
from converters.reader import Reader
from l4tool import __version__
from l4tool.core.atomic import part_path, write_errors
from l4tool.core.errors import LockHeld, WriteError
from quant.schemes import Recipe

JOURNAL = "l4tool-journal.jsonl"
LOCK = ".l4tool.lock"
REPORT = "l4tool-report.json"
SAMPLES, SAMPLE_BYTES = 16, 2**16
FORCE_HINT = "add --force to start afresh, or choose another output"


@contextlib.contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Hold the output folder for this process. Raises LockHeld when another one has it."""
    path = folder / LOCK
    while True:
        with write_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise WriteError(f"cannot lock {path}: {error.strerror}", hint="choose another file system") from error
            raise LockHeld(f"another run is writing {folder}", hint="wait for it, or choose another output") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                break
        os.close(fd)  # its last owner removed it between our open and our lock
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def fingerprint(reader: Reader, recipe: Recipe, device: str, max_shard_bytes: int) -> dict[str, Any]:
    """The job: tool version, all that decides the output's bytes, and each source file's size, mtime, sampled SHA-256.

    The sample is 64 KiB at each of 16 evenly spaced places, the header among them: a full hash would cost more than
    quantizing. Small files are hashed whole.
    """
    small = [reader.path / "config.json", reader.path / INDEX, *reader.side_files()]
    files = [path for path in small if path.is_file()] + reader.weight_files()
    return {
        "version": __version__,
        "recipe": dataclasses.asdict(recipe) | {"device": device, "max_shard_bytes": max_shard_bytes},
        "source": {path.name: _describe(path) for path in files},
    }


def _describe(path: Path) -> dict[str, Any]:
    stat = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if stat.st_size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(SAMPLES):
                file.seek(number * (stat.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sample_sha256": digest.hexdigest()}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What changed between two fingerprints, in words; None when nothing did."""
    if old.get("version") != new["version"]:
        return f"it was begun by version {old.get('version')}, this is {new['version']}"
    if old.get("recipe") != new["recipe"]:
        before = old.get("recipe") or {}
        changed = [key for key, value in new["recipe"].items() if before.get(key) != value]
        return f"it was begun with other options ({', '.join(changed)})"
    before, after = old.get("source") or {}, new["source"]
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"the source has changed since ({', '.join(changed[:5])})" if changed else None


class Journal:
    """The open journal of one run. `shards`: file name → what `add_shard` wrote, from earlier runs too."""

    def __init__(self, folder: Path, job: dict[str, Any], shards: dict[str, dict[str, Any]], size: int) -> None:
        self.path = folder / JOURNAL
        self.shards = shards
        with write_errors(self.path):
            self._file = open(self.path, "ab")
            self._file.truncate(size)  # a torn last line
        if size == 0:
            self._append({"job": job})

    def add_shard(self, name: str, entry: dict[str, Any]) -> None:
        """Record a shard that is durable under its final name."""
        self.shards[name] = entry
        self._append({"shard": name, **entry})

    def _append(self, record: dict[str, Any]) -> None:
        with write_errors(self.path):
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_journal(folder: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]], int]:
    """(job, finished shards, length of the sound part in bytes); (None, {}, 0) when there is no usable journal."""
    try:
        raw = (folder / JOURNAL).read_bytes()
    except OSError:
        return None, {}, 0
    job, shards, size = None, {}, 0
    for line in raw.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if "job" in record:
            job = record["job"]
        elif "shard" in record:
            shards[record.pop("shard")] = record
        size += len(line)
    return (job, shards, size) if isinstance(job, dict) else (None, {}, 0)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a complete output, or None."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    complete = isinstance(report, dict) and "job" in report and (folder / "config.json").is_file()
    return report if complete else None


def is_ours(folder: Path) -> bool:
    """True for a folder that a quantize run has written or begun."""
    return (folder / JOURNAL).is_file() or read_report(folder) is not None


def is_empty(folder: Path) -> bool:
    return not folder.exists() or all(entry.name == LOCK for entry in folder.iterdir())


def remove_output(folder: Path, job: dict[str, Any]) -> None:
    """Delete what a run of `job` wrote (files and their `.part`), config.json first; nothing else."""
    names = ["config.json", INDEX, *job.get("files", []), REPORT, JOURNAL]
    with write_errors(folder):
        for name in names:
            path = folder / Path(name).name
            path.unlink(missing_ok=True)
            part_path(path).unlink(missing_ok=True)
