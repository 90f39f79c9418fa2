"""What a fetched folder holds: the manifest, written last, and the check of a file against it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from l4tool import __version__
from l4tool.core.atomic import write_file
from l4tool.core.errors import CheckpointError, ChecksumError, InputMissing
from l4tool.hub.selection import path_problem

MANIFEST = "l4tool-manifest.json"
READ_BYTES = 4 * 2**20
AGAIN = "fetch it again: `l4tool fetch` replaces what is wrong"


class Expected(Protocol):
    """What is known about a file's bytes: a manifest's entry or the hub's."""

    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def git_oid(self) -> str | None: ...


@dataclass(frozen=True)
class Entry:
    """One file: its size in bytes, its hash (either kind) and the mtime it had when the hash was last checked."""

    size: int
    sha256: str | None = None
    git_oid: str | None = None
    mtime_ns: int | None = None

    @property
    def digest(self) -> str:
        return self.sha256 or self.git_oid or ""

    def as_json(self) -> dict[str, Any]:
        kind = {"sha256": self.sha256} if self.sha256 else {"git_oid": self.git_oid}
        return {"size": self.size, **kind, "mtime_ns": self.mtime_ns}


@dataclass(frozen=True)
class Manifest:
    """Where a folder's files come from. `selection`: the layout and patterns that chose them from the repository."""

    repo_id: str
    commit: str
    endpoint: str
    files: dict[str, Entry]
    revision: str | None = None
    selection: dict[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none. Raises CheckpointError for one that cannot be read."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        files = {name: _entry(name, value) for name, value in data["files"].items()}
        repo_id, commit, endpoint = (str(data[key]) for key in ("repo", "commit", "endpoint"))
        return Manifest(repo_id, commit, endpoint, files, data.get("revision"), data.get("selection") or {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", hint="delete it and run `l4tool fetch`") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written last: a folder with a manifest is complete. Raises WriteError."""
    data = {
        "l4tool": __version__,
        "repo": manifest.repo_id,
        "revision": manifest.revision,
        "commit": manifest.commit,
        "endpoint": manifest.endpoint,
        "selection": manifest.selection,
        "files": {path: entry.as_json() for path, entry in sorted(manifest.files.items())},
    }
    write_file(folder / MANIFEST, json.dumps(data, indent=1) + "\n")


def _entry(name: str, value: Mapping[str, Any]) -> Entry:
    if (problem := path_problem(name)) is not None:
        raise ValueError(f"{name!r} {problem}")
    entry = Entry(value["size"], value.get("sha256"), value.get("git_oid"), value.get("mtime_ns"))
    if not isinstance(entry.size, int) or not isinstance(entry.digest, str) or not entry.digest:
        raise ValueError(f"{name!r} has no size or hash")
    return entry


def entry_of(expected: Expected, path: Path) -> Entry:
    """The entry of a file on disk that was found right. Raises OSError."""
    git_oid = None if expected.sha256 else expected.git_oid
    return Entry(expected.size, expected.sha256, git_oid, path.stat().st_mtime_ns)


def is_unchanged(path: Path, entry: Entry) -> bool:
    """Size and mtime are those of the entry: the bytes need not be read."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_size == entry.size and stat.st_mtime_ns == entry.mtime_ns


def check_file(path: Path, entry: Expected, on_bytes: Callable[[int], None] = lambda delta: None) -> None:
    """Read a file and compare it with its entry. Raises InputMissing, CheckpointError (size) and ChecksumError."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputMissing(f"{path} is not a file", hint=AGAIN)
        if size != entry.size:
            raise CheckpointError(f"{path}: {size:,} bytes, but must have {entry.size:,}", hint=AGAIN)
        actual = _hash_file(path, entry, on_bytes)
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror or error}", hint=AGAIN) from error
    expected = entry.sha256 or entry.git_oid
    if actual != expected:
        kind = "SHA-256" if entry.sha256 else "git blob SHA-1"
        raise ChecksumError(f"{path}: {kind} is {actual}, but must be {expected}", hint=AGAIN)


def new_hash(entry: Expected) -> Any:
    """A running hash of the kind that the entry has: SHA-256, or git's SHA-1 of a blob."""
    if entry.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)


def _hash_file(path: Path, entry: Expected, on_bytes: Callable[[int], None]) -> str:
    digest, buffer = new_hash(entry), memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()


def total_bytes(files: Iterable[Expected]) -> int:
    return sum(file.size for file in files)
