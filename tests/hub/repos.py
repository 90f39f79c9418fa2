"""What the hub server serves: repositories, their revisions and files, with the hashes that the real hub gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

LFS_THRESHOLD_BYTES = 1_000_000
MODIFIED = "2025-04-05T18:00:00.000Z"


@dataclass(frozen=True)
class StoredFile:
    """One file of a revision. `git_oid` is the blob sha1 of the file, or of its pointer where it is in LFS."""

    path: str  # in the repository, with slashes
    source: Path
    size: int
    git_oid: str
    sha256: str | None  # of LFS files
    xet_hash: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_oid

    def tree_entry(self, expand: bool) -> dict[str, Any]:
        """As `/tree` and `/paths-info` show it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.git_oid, "size": self.size, "path": self.path}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(_pointer(self.sha256, self.size))}
        if self.xet_hash:
            entry["xetHash"] = self.xet_hash
        return entry | (_last_commit() if expand else {})

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """As `/api/models/…` shows it; `blobs` adds sizes and hashes."""
        if not blobs:
            return {"rfilename": self.path}
        entry: dict[str, Any] = {"rfilename": self.path, "size": self.size, "blobId": self.git_oid}
        if self.sha256:
            pointer_size = len(_pointer(self.sha256, self.size))
            entry["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return entry


def _last_commit() -> dict[str, Any]:
    security = {"status": "safe", "avScan": None, "pickleImportScan": None}
    commit = {"id": "0" * 40, "title": "Upload", "date": MODIFIED}
    return {"lastCommit": commit, "securityFileStatus": security}


def folder_entry(path: str, expand: bool) -> dict[str, Any]:
    entry = {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    return entry | (_last_commit() if expand else {})


@dataclass(frozen=True)
class Revision:
    commit: str
    files: dict[str, StoredFile]
    card: dict[str, Any]

    def entries(self, folder: str, recursive: bool, expand: bool) -> list[dict[str, Any]] | None:
        """Files and folders below `folder` ('' is the root), sorted by path; None if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        inside = [file for path, file in self.files.items() if path.startswith(prefix)]
        if folder and not inside:
            return None
        entries: dict[str, dict[str, Any]] = {}
        for file in inside:
            parts = file.path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                path = prefix + "/".join(parts[:depth])
                entries[path] = folder_entry(path, expand)
            if recursive or len(parts) == 1:
                entries[file.path] = file.tree_entry(expand)
        return [entries[path] for path in sorted(entries)]


@dataclass
class Repo:
    """A model repository: its branches (and tags) name commits."""

    name: str
    gated: bool = False
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Revision] = field(default_factory=dict)

    def revision(self, name: str) -> Revision | None:
        return self.commits.get(self.branches.get(name, name))

    def info(self, revision: Revision, blobs: bool, expand: list[str]) -> dict[str, Any]:
        """The answer of `/api/models/NAME`; `expand` keeps only the named fields."""
        tags = [f"license:{revision.card['license']}"] if "license" in revision.card else []
        info = {
            "_id": hashlib.sha1(self.name.encode()).hexdigest()[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": revision.commit,
            "lastModified": MODIFIED,
            "createdAt": MODIFIED,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 1,
            "tags": tags,
            "cardData": revision.card,
            "siblings": [file.sibling(blobs) for file in revision.files.values()],
            "usedStorage": sum(file.size for file in revision.files.values()),
        }
        return {key: value for key, value in info.items() if key in ("_id", "id", *expand)} if expand else info


def scan(
    folder: Path, lfs_threshold_bytes: int, xet: bool, sha256s: Mapping[str, str], exclude: tuple[str, ...] = ()
) -> dict[str, StoredFile]:
    """Every file below `folder`, sorted by path. `sha256s` gives hashes that are not to be computed (huge files)."""
    files = {}
    for source in sorted(folder.rglob("*")):
        path = source.relative_to(folder).as_posix()
        if not source.is_file() or any(source.match(pattern) for pattern in exclude):
            continue
        stat = source.stat()
        if stat.st_size >= lfs_threshold_bytes or path.endswith(".safetensors"):
            sha256 = sha256s.get(path) or _hash_file("sha256", source.resolve(), stat.st_size, stat.st_mtime_ns)
            oid = _blob_oid(_pointer(sha256, stat.st_size))
            files[path] = StoredFile(path, source, stat.st_size, oid, sha256, sha256 if xet else None)
        else:
            files[path] = StoredFile(path, source, stat.st_size, _blob_oid(source.read_bytes()), None, None)
    return files


def commit_id(name: str, files: dict[str, StoredFile], parents: int) -> str:
    """40 hex digits, the same for the same content: commands that are run twice see the same commit."""
    content = "\n".join(f"{file.path} {file.git_oid}" for file in files.values())
    return hashlib.sha1(f"{name}\n{parents}\n{content}".encode()).hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """The YAML header of README.md, as the hub shows it in `cardData`."""
    import yaml

    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    parts = text.split("---\n", 2)
    return (yaml.safe_load(parts[1]) or {}) if text.startswith("---\n") and len(parts) == 3 else {}


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache
def _hash_file(algorithm: str, path: Path, size: int, modified_ns: int) -> str:
    """Hashed once per process: many tests serve the same checkpoint. Size and time are part of the key."""
    digest = hashlib.new(algorithm)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
