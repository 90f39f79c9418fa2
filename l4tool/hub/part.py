"""An unfinished file that can be taken up again after kill -9 and after a power cut, without trusting it blindly.

Beside `X.part` lies `X.part.ledger`, JSON lines. The first says which content the part belongs to. Each further line
is a mark: an offset and the hash of everything before it, written once those bytes were synced. On resumption the part
is hashed again, which its final check needs anyway, and compared at every mark: up to the last mark that agrees it is
what was received. Bytes behind the last mark are kept only when the machine has not been restarted since, for then the
page cache that held them is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l4tool.core.atomic import part_path, publish, write_errors
from l4tool.core.errors import ChecksumError
from l4tool.hub.client import RemoteFile
from l4tool.hub.manifest import READ_BYTES, new_hash

LEDGER_SUFFIX = ".ledger"
NEW_SUFFIX = ".new"
MARK_BYTES = 64 * 2**20


def ledger_path(target: Path) -> Path:
    part = part_path(target)
    return part.with_name(part.name + LEDGER_SUFFIX)


def boot_id() -> str | None:
    """Changes with every start of the machine; None where it does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def remove_part(target: Path) -> None:
    """Delete the part of `target` and its ledger, if they are there."""
    ledger = ledger_path(target)
    for path in (part_path(target), ledger, ledger.with_name(ledger.name + NEW_SUFFIX)):
        path.unlink(missing_ok=True)


def read_ledger(path: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """(first line, offset → hash); a torn last line, or anything else that is not ours, ends it."""
    records: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if not isinstance(record, dict):
                break
            records.append(record)
    marks = {record["size"]: record["hash"] for record in records[1:] if record.keys() == {"size", "hash"}}
    return (records[0] if records else {}), marks


def part_bytes(target: Path, file: RemoteFile) -> int:
    """How much of `file` an earlier run has left beside `target`."""
    if read_ledger(ledger_path(target))[0].get("digest") != file.digest:
        return 0
    with contextlib.suppress(OSError):
        return min(part_path(target).stat().st_size, file.size)
    return 0


def claim_part(target: Path, file: RemoteFile, received: Path) -> None:
    """Make a file that came another way the part of `target`; it is hashed like any part. Raises OSError."""
    remove_part(target)
    _write_ledger(ledger_path(target), file, {})
    os.replace(received, part_path(target))


def _write_ledger(ledger: Path, file: RemoteFile, marks: dict[int, str]) -> None:
    """Write the ledger afresh, whole or not at all: what the part belongs to, and the marks that hold."""
    lines: list[dict[str, Any]] = [{"digest": file.digest, "bytes": file.size, "boot": boot_id()}]
    lines += [{"size": size, "hash": digest} for size, digest in sorted(marks.items())]
    new = ledger.with_name(ledger.name + NEW_SUFFIX)
    new.unlink(missing_ok=True)
    with open(new, "x") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(new, ledger)


class Part:
    """The open part of one file: append with `write`, and `finish` when `size` has reached the file's."""

    def __init__(self, target: Path, file: RemoteFile, on_bytes: Callable[[int], None]) -> None:
        self.target, self.file, self.on_bytes = target, file, on_bytes
        self.path, self.ledger = part_path(target), ledger_path(target)
        self.size = 0
        self._hash = new_hash(file)
        self._marks: list[dict[str, Any]] = []  # reached, but not yet synced
        self._syncing: threading.Thread | None = None
        self._sync_error: OSError | None = None
        with write_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o666)
            try:
                self._resume()
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, data: bytes) -> None:
        """Append received bytes. Raises WriteError."""
        view = memoryview(data)
        while view:
            room = MARK_BYTES - self.size % MARK_BYTES
            self._append(view[:room])
            view = view[room:]

    def reset(self) -> None:
        """Throw everything away and begin at byte 0."""
        self._wait()
        with write_errors(self.path):
            os.ftruncate(self._fd, 0)
            _write_ledger(self.ledger, self.file, {})
        self.on_bytes(-self.size)
        self.size, self._hash, self._marks = 0, new_hash(self.file), []

    def check(self) -> None:
        """Raises ChecksumError unless the bytes so far are the whole file and right."""
        actual = self._hash.hexdigest()
        if actual != self.file.digest:
            kind = "SHA-256" if self.file.sha256 else "git blob SHA-1"
            message = f"{self.file.path}: {kind} is {actual}, but must be {self.file.digest}"
            raise ChecksumError(message, hint="run the same command again; if it stays, the hub or a proxy is at fault")

    def finish(self) -> None:
        """Sync, and give the file its final name. Only after `check`."""
        self._wait()
        with write_errors(self.target):
            os.fsync(self._fd)
            publish(self.path, self.target)
            self.ledger.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop; what is there can be resumed."""
        if self._syncing is not None:
            self._syncing.join()
        os.close(self._fd)

    def _append(self, view: memoryview) -> None:
        self._hash.update(view)
        written = 0
        with write_errors(self.path):
            while written < len(view):
                written += os.pwrite(self._fd, view[written:], self.size + written)
        self.size += written
        self.on_bytes(written)
        if self.size % MARK_BYTES == 0:
            self._marks.append({"size": self.size, "hash": self._hash.copy().hexdigest()})
            self._sync_in_background()

    def _sync_in_background(self) -> None:
        """Sync now and then on the side: the disk keeps up, and the last sync is short."""
        if self._syncing is not None and self._syncing.is_alive():
            return  # the next one takes these marks along
        self._wait()
        marks, self._marks = self._marks, []
        self._syncing = threading.Thread(target=self._sync, args=(marks,), daemon=True)
        self._syncing.start()

    def _sync(self, marks: list[dict[str, Any]]) -> None:
        try:
            os.fdatasync(self._fd)
            with open(self.ledger, "a") as ledger:
                ledger.write("".join(json.dumps(mark) + "\n" for mark in marks))
        except OSError as error:
            self._sync_error = error

    def _wait(self) -> None:
        """Wait for the sync under way. Raises its WriteError."""
        if self._syncing is not None:
            self._syncing.join()
        if self._sync_error is not None:
            with write_errors(self.path):
                raise self._sync_error

    def _resume(self) -> None:
        """Hash what is there and keep what can be trusted."""
        head, marks = read_ledger(self.ledger)
        if head.get("digest") != self.file.digest or head.get("bytes") != self.file.size:
            os.ftruncate(self._fd, 0)
            _write_ledger(self.ledger, self.file, {})
            return
        limit = min(os.fstat(self._fd).st_size, self.file.size)
        if head.get("boot") is None or head.get("boot") != boot_id():
            limit = max((size for size in marks if size <= limit), default=0)
        self._hash_again(limit, marks)
        os.ftruncate(self._fd, self.size)
        _write_ledger(self.ledger, self.file, {size: digest for size, digest in marks.items() if size <= self.size})

    def _hash_again(self, limit: int, marks: dict[int, str]) -> None:
        """Hash the first `limit` bytes, going back to the last good mark at the first that disagrees."""
        good, buffer = (0, self._hash.copy()), memoryview(bytearray(READ_BYTES))
        while self.size < limit:
            length = min(READ_BYTES, limit - self.size, MARK_BYTES - self.size % MARK_BYTES)  # stops at every mark
            count = os.preadv(self._fd, [buffer[:length]], self.size)
            if count == 0:
                break
            self._hash.update(buffer[:count])
            self.size += count
            if self.size in marks:
                if self._hash.copy().hexdigest() != marks[self.size]:
                    self.size, self._hash = good
                    break
                good = (self.size, self._hash.copy())
        self.on_bytes(self.size)
