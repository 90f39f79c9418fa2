"""A repository's skeleton: everything but the weights, read with a few small Range requests.

config.json, the index and small side files are there as they are; each shard is a placeholder
(`l4tool/core/placeholder.py`): the real header in a sparse file of the real size. `open_checkpoint` reads headers
only, so it opens a skeleton like any folder, with all its checks; reading a weight from it is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4tool.core.atomic import write_errors, write_file
from l4tool.core.errors import CheckpointError, ChecksumError, WriteError
from l4tool.core.placeholder import write_placeholder
from l4tool.hub.selection import path_problem

if TYPE_CHECKING:
    from l4tool.hub.client import Hub, RemoteFile, Snapshot

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".md", ".model", "")
MAX_SIDE_BYTES = 1 << 20  # tokenizer.json (28 MB) is left out unless asked for
MAX_JSON_BYTES = 64 << 20  # config and index
FIRST_READ_BYTES = 64 << 10  # of a shard: most headers are shorter
PIECE_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
CONNECTIONS = 8


def make_skeleton(hub: Hub, snapshot: Snapshot, folder: Path, max_side_bytes: int = MAX_SIDE_BYTES) -> Path:
    """Put a snapshot's skeleton into `folder`, which holds nothing of another commit; returns it.

    A shard that is there in its full size (a placeholder or the real one) is kept, so a second call mends what is
    missing. config.json comes last. Raises CheckpointError for a repository that holds no checkpoint or lies about
    its sizes, ChecksumError, WriteError, and what `hub` raises.
    """
    files = {file.path: file for file in snapshot.files if _plain_name(file.path)}
    _require_checkpoint(snapshot, files)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    side = [f for f in files.values() if Path(f.path).suffix in SIDE_SUFFIXES and f.size <= max_side_bytes]
    first = [file for file in side if file.path not in (CONFIG, INDEX)]
    first += [files[INDEX]] if INDEX in files else []
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="skeleton") as pool:
        list(pool.map(lambda file: _copy(hub, snapshot, file, folder), first))
        shards = _shards(snapshot, files, folder)
        list(pool.map(lambda file: _place(hub, snapshot, file, folder), shards))
    _copy(hub, snapshot, files[CONFIG], folder)
    return folder


def cached_skeleton(hub: Hub, snapshot: Snapshot) -> Path:
    """The snapshot's skeleton in the user's cache, made on first use. A commit never changes, so neither does it.

    Raises WriteError where the cache cannot be written, and what `make_skeleton` raises.
    """
    if not re.fullmatch(r"[0-9a-f]{40,64}", snapshot.commit):
        raise CheckpointError(f"{snapshot.repo_id}: the hub gave {snapshot.commit[:80]!r} for a commit")
    final = _cache() / snapshot.repo_id.replace("/", "--") / snapshot.commit
    if (final / CONFIG).is_file():
        return make_skeleton(hub, snapshot, final)  # reads what somebody deleted, usually nothing
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    try:
        make_skeleton(hub, snapshot, building)
        _move(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return base.expanduser() / "l4tool" / "skeletons"
    except RuntimeError as error:
        raise WriteError("there is no home folder to keep headers in", hint="set XDG_CACHE_HOME") from error


def _move(building: Path, final: Path) -> None:
    """Rename into place; another process may have been faster, with the same contents."""
    with write_errors(final):
        try:
            os.rename(building, final)
        except OSError:
            if not (final / CONFIG).is_file():
                raise


def _require_checkpoint(snapshot: Snapshot, files: dict[str, RemoteFile]) -> None:
    where = f"{snapshot.repo_id}@{snapshot.commit[:12]}"
    large = [name for name in (CONFIG, INDEX) if name in files and files[name].size > MAX_JSON_BYTES]
    if large:
        raise CheckpointError(f"{where}: {large[0]} is larger than any {large[0]} of a checkpoint")
    if CONFIG in files and (INDEX in files or SINGLE in files):
        return
    if any(re.search(r"(^|/)(params\.json|consolidated\..*\.pth)$", file.path) for file in snapshot.files):
        raise CheckpointError(
            f"{where} is in Meta's own layout (consolidated.*.pth), which has no headers to read",
            hint=f"use {_hf_repo(snapshot.repo_id)}",
        )
    raise CheckpointError(
        f"{where} holds no safetensors checkpoint: it lacks {CONFIG if CONFIG not in files else INDEX}",
        hint="`l4tool fetch --list` shows the published Llama 4 repositories",
    )


def _hf_repo(repo_id: str) -> str:
    """The repository that holds the same model in Hugging Face's layout, as far as its name tells."""
    return f"{repo_id.removesuffix('-Original')}, the same model in Hugging Face's layout"


def _shards(snapshot: Snapshot, files: dict[str, RemoteFile], folder: Path) -> list[RemoteFile]:
    """The files that the index names, each of which the repository must hold."""
    if INDEX not in files:
        return [files[SINGLE]]
    try:
        weight_map: Any = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{snapshot.repo_id}: {INDEX} has no usable weight_map") from error
    lost = [str(name) for name in names if name not in files or not str(name).endswith(".safetensors")]
    if lost:
        raise CheckpointError(
            f"{snapshot.repo_id}: {INDEX} names {len(lost)} file(s) that the repository does not hold: {lost[0][:80]}"
        )
    return [files[name] for name in names]


def _plain_name(path: str) -> bool:
    """A visible file of the repository's top folder, under a name that stays in the folder it is written to."""
    return "/" not in path and not path.startswith(".") and path_problem(path) is None


def _copy(hub: Hub, snapshot: Snapshot, file: RemoteFile, folder: Path) -> None:
    """A small file, whole and checked against the hub's hash."""
    target = folder / file.path
    if target.is_file() and target.stat().st_size == file.size and _is_genuine(target.read_bytes(), file):
        return
    data = _read(hub, snapshot, file, 0, file.size)
    if not _is_genuine(data, file):
        raise ChecksumError(f"{snapshot.repo_id}: {file.path} does not have the hash that the hub names")
    write_file(target, data)


def _is_genuine(data: bytes, file: RemoteFile) -> bool:
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.git_oid


def _place(hub: Hub, snapshot: Snapshot, file: RemoteFile, folder: Path) -> None:
    """A shard's placeholder, unless the shard is there."""
    target = folder / file.path
    if target.is_file() and target.stat().st_size == file.size:
        return
    header = _read_header(hub, snapshot, file)
    write_placeholder(target, header, file.size, f"{snapshot.repo_id}@{snapshot.commit}")


def _read_header(hub: Hub, snapshot: Snapshot, file: RemoteFile) -> bytes:
    """The 8 length bytes and the header. The length is the file's own claim: checked before anything is read for it."""
    data = _read(hub, snapshot, file, 0, min(FIRST_READ_BYTES, file.size))
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            f"{snapshot.repo_id}: {file.path} is not a safetensors file: its header cannot be {length} bytes long "
            f"in a file of {file.size} bytes"
        )
    end = 8 + length
    while len(data) < end:
        data += _read(hub, snapshot, file, len(data), min(len(data) + PIECE_BYTES, end))
    return data[:end]


def _read(hub: Hub, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
    data = hub.read_range(snapshot, file.path, start, stop) if stop > start else b""
    if len(data) != stop - start:
        raise ChecksumError(f"{snapshot.repo_id}: {file.path}: asked for {stop - start} bytes, got {len(data)}")
    return data
