"""SHA-256 of files, whole or while they are being written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from converters.writer import ShardPlan

CHUNK_BYTES = 2**20
STEP_BYTES = 32 * 2**20  # what is worth handing to the hashing thread


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file; hashing runs without the GIL."""
    running = _Hash(path)
    running.extend(path.stat().st_size)
    return running.close()


class RunningHash:
    """SHA-256 of a shard whose tensors complete in about the order of the file: each complete prefix is hashed in a
    thread of its own, while later tensors are still being worked on. Its bytes come from the page cache."""

    def __init__(self, path: Path, plan: ShardPlan) -> None:
        self._order = sorted(plan.specs, key=lambda spec: plan.starts[spec.name])
        self._ends = {spec.name: plan.starts[spec.name] + spec.nbytes for spec in plan.specs}
        self._size = plan.nbytes
        self._done: set[str] = set()
        self._next = self._prefix = self._sent = 0
        self._hash = _Hash(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._last: Future[None] | None = None

    def complete(self, names: Iterable[str]) -> None:
        """These tensors are completely written; called by one thread."""
        self._done.update(names)
        while self._next < len(self._order) and self._order[self._next].name in self._done:
            self._prefix = self._ends[self._order[self._next].name]
            self._next += 1
        if self._prefix - self._sent >= STEP_BYTES:
            self._send(self._prefix)

    def hexdigest(self) -> str:
        """Hash what is left, when everything is written, and close."""
        self._send(self._size)
        assert self._last is not None
        self._last.result()
        self._thread.shutdown()
        return self._hash.close()

    def close(self) -> None:
        """Give up; for an unfinished shard."""
        self._thread.shutdown(cancel_futures=True)
        self._hash.close()

    def _send(self, end: int) -> None:
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(self._hash.extend, end)
        self._sent = end


class _Hash:
    """A digest and how far into the file it has come."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self._digest = hashlib.sha256()
        self._at = 0
        self._buffer = bytearray(CHUNK_BYTES)

    def extend(self, end: int) -> None:
        """Hash on to byte `end`."""
        view = memoryview(self._buffer)
        while self._at < end:
            count = os.preadv(self._file, [view[: end - self._at]], self._at)
            if count == 0:
                raise OSError(f"file ends at byte {self._at}, expected {end}")
            self._digest.update(view[:count])
            self._at += count

    def close(self) -> str:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        return self._digest.hexdigest()
