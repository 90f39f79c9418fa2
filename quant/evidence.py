"""What the bytes of a checkpoint's files must be, from what knows it: a manifest, a report, a cache, a checklist."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from converters.mapped import MappedFile
from converters.writing.hashing import StreamedDigest
from converters.writing.journal import REPORT, read_report
from l4tool.core.errors import CheckpointError
from l4tool.hub.manifest import MANIFEST, Entry, new_hash, read_manifest
from quant.sweep import Digest

CACHE, CHECKLIST = "Hugging Face cache", "checklist.chk"
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MD5_LINE = re.compile(r"([0-9a-f]{32})\s+\*?(\S+)")


@dataclass(frozen=True)
class Proof:
    """`digest` of kind "sha256", "git" (a blob's SHA-1), "md5" or "tensors" (of a run of ours); `source` says so.

    `size` in bytes, None where the source does not tell.
    """

    kind: str
    digest: str
    size: int | None
    source: str

    def start(self, size: int, file: MappedFile | None) -> Digest:
        """A running digest for a file of `size` bytes. Raises CheckpointError where its header must be read for it."""
        if self.kind == "md5":
            return hashlib.md5(usedforsecurity=False)
        if self.kind != "tensors":
            whole = self.kind == "sha256"
            running: Digest = new_hash(Entry(size, self.digest if whole else None, None if whole else self.digest))
            return running
        if file is None:
            raise CheckpointError(f"a file in {self.source} has no sound header")
        header_bytes = min((tensor.start for tensor in file.tensors.values()), default=size)
        counted = [tensor for name, tensor in file.tensors.items() if name not in file.constants]
        return StreamedDigest(header_bytes, sorted((tensor.start, tensor.stop) for tensor in counted))


def find_proofs(folder: Path) -> dict[str, Proof]:
    """File name (relative) → what it must be; {} where nothing knows. Raises CheckpointError for a broken manifest."""
    proofs = _checklist(folder) | _cache_blobs(folder) | _report(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        for name, entry in manifest.files.items():
            kind = "sha256" if entry.sha256 else "git"
            proofs[name] = Proof(kind, entry.digest, entry.size, MANIFEST)
    return proofs


def _report(folder: Path) -> dict[str, Proof]:
    """The files of a quantize or convert run."""
    output = (read_report(folder) or {}).get("output")
    if not isinstance(output, dict):
        return {}
    try:
        return {name: Proof("tensors", str(one["digest"]), int(one["size"]), REPORT) for name, one in output.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / REPORT}: its list of output files cannot be read ({error!r})") from error


def _cache_blobs(folder: Path) -> dict[str, Proof]:
    """A snapshot of the Hugging Face cache: every file is a link to `blobs/HASH`."""
    proofs = {}
    for path in folder.iterdir():
        target = path.readlink() if path.is_symlink() else None
        if target is None or target.parent.name != "blobs" or not _BLOB.fullmatch(target.name):
            continue
        kind = "sha256" if len(target.name) == 64 else "git"
        proofs[path.name] = Proof(kind, target.name, None, CACHE)
    return proofs


def _checklist(folder: Path) -> dict[str, Proof]:
    """Meta's checklist.chk: an MD5 and a file name a line."""
    try:
        lines = (folder / CHECKLIST).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found = [match.groups() for line in lines if (match := _MD5_LINE.fullmatch(line.strip()))]
    return {name: Proof("md5", digest, None, CHECKLIST) for digest, name in found if "/" not in name}
