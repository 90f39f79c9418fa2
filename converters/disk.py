"""Bytes of weight files read into private memory at the speed of the disk: large reads, several at a time.

A mapped file that is not in memory comes in by page faults, at less than half of that speed, and a file that shrinks
under a map kills the process. Here both are ordinary errors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.reader import Extent
from l4tool.core.errors import CheckpointError, InputMissing
from l4tool.core.pages import fresh_pages

PIECE_BYTES = 8 << 20  # of one read
THREADS = 4  # reads at a time: a queue of one leaves most disks waiting
SECTOR_BYTES = 4096  # what reads past the page cache must be multiples of
ROWS_AT_ONCE = 64  # single rows that one thread reads before it looks for more


@dataclass
class _File:
    """An open file: `direct_fd` reads past the page cache where the file system can; `identity` size and mtime."""

    fd: int
    direct_fd: int | None
    identity: tuple[int, int]


class Reading:
    """Bytes on their way into memory; `result()` waits for them: uint8 [extent.nbytes]."""

    def __init__(self, data: torch.Tensor, pieces: Sequence[Future[None]]) -> None:
        self._data, self._pieces = data, pieces

    def result(self) -> torch.Tensor:
        """Raises CheckpointError, InputMissing."""
        for piece in self._pieces:
            piece.result()
        return self._data

    def cancel(self) -> None:
        for piece in self._pieces:
            piece.cancel()


class WeightFiles:
    """The weight files of one checkpoint, held open: one that is renamed or deleted can be read to the end.

    `keep_cached` False: what is read is not left in the page cache, where it would push out what is used again.
    Safe for several threads. Raises InputMissing.
    """

    def __init__(self, paths: Iterable[Path], keep_cached: bool) -> None:
        self.keep_cached = keep_cached
        self.num_bytes = 0  # read so far
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        try:
            for path in paths:
                self._files[path] = _open(path, direct=not keep_cached)
        except BaseException:
            self.close()
            raise

    def begin(self, extent: Extent) -> Reading:
        """Start reading. Raises CheckpointError for a file that is not what it was when it was opened."""
        file = self._unchanged(extent.file)
        first = extent.start // SECTOR_BYTES * SECTOR_BYTES
        last = -(-extent.stop // SECTOR_BYTES) * SECTOR_BYTES
        memory = fresh_pages(last - first)
        pieces = [
            self._pool.submit(self._read, extent, file, memory[at - first : min(at + PIECE_BYTES, last) - first], at)
            for at in range(first, last, PIECE_BYTES)
        ]
        data = torch.frombuffer(memory, dtype=torch.uint8, count=extent.nbytes, offset=extent.start - first)
        return Reading(data, pieces)

    def rows(self, extent: Extent, row_bytes: int, rows: Sequence[int]) -> torch.Tensor:
        """Some rows, ascending, of the matrix in `extent`: uint8 [len(rows), row_bytes]. They stay in the page cache,
        since they are few and come again."""
        file = self._unchanged(extent.file)
        found = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
        memory = found.numpy().data.cast("B")

        def read(first: int) -> None:
            for index in range(first, min(first + ROWS_AT_ONCE, len(rows))):
                target = memory[index * row_bytes : (index + 1) * row_bytes]
                at = extent.start + rows[index] * row_bytes
                _fill(extent, file.fd, target, at, at + row_bytes)

        list(self._pool.map(read, range(0, len(rows), ROWS_AT_ONCE)))
        self._count(found.nbytes)
        return found

    def close(self) -> None:
        """Wait for reads that have begun, and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file.fd)
            if file.direct_fd is not None:
                os.close(file.direct_fd)

    def _read(self, extent: Extent, file: _File, target: memoryview, at: int) -> None:
        needed = min(at + len(target), extent.stop)
        if file.direct_fd is not None:
            _fill(extent, file.direct_fd, target, at, needed)
        else:
            _fill(extent, file.fd, target, at, needed)
            if not self.keep_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fd, at, len(target), os.POSIX_FADV_DONTNEED)
        self._count(needed - at)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes

    def _unchanged(self, path: Path) -> _File:
        file = self._files[path]
        if _identity(file.fd) != file.identity:
            raise CheckpointError(
                f"{path} was changed while it was read",
                hint="let nothing write to the checkpoint; the same command carries on",
            )
        return file


def _open(path: Path, direct: bool) -> _File:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}") from error
    return _File(fd, _open_direct(path) if direct else None, _identity(fd))


def _open_direct(path: Path) -> int | None:
    """A descriptor that reads past the page cache; None where the system or the file system has no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None
    try:
        os.preadv(fd, [fresh_pages(SECTOR_BYTES)], 0)
    except OSError:
        os.close(fd)
        return None
    return fd


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def _fill(extent: Extent, fd: int, target: memoryview, at: int, needed: int) -> None:
    """Read file bytes from `at` on into `target`, at least up to byte `needed`."""
    done = 0
    while at + done < needed:
        try:
            count = os.preadv(fd, [target[done:]], at + done)
        except OSError as error:
            raise InputMissing(f"cannot read {extent.file}: {error.strerror or error}") from error
        done += count
        if done < needed - at and os.fstat(fd).st_size <= at + done:
            raise CheckpointError(
                f"{extent.file} is truncated: it ends at byte {at + done}, a tensor in it at byte {extent.stop}",
                hint="download or copy this file again",
            )
