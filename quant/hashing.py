"""The digest of a shard: SHA-256 over its header and the SHA-256 of each of its tensors, in file order.

Tensors complete in any order while a shard is being written, and each is hashed as soon as it is complete; the hash of
the plain file could only begin when everything is there.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from converters.writer import ShardPlan

CHUNK_BYTES = 2**20


def shard_digest(path: Path, plan: ShardPlan) -> str:
    """The digest of a finished shard, from its bytes; its header must be the plan's."""
    running = RunningDigest(path, plan)
    running.complete(spec.name for spec in plan.specs)
    return running.hexdigest()


class RunningDigest:
    """The digest of a shard that is being written. Its thread reads from the page cache, without the GIL."""

    def __init__(self, path: Path, plan: ShardPlan) -> None:
        self._plan = plan
        self._spans = {s.name: (plan.starts[s.name], plan.starts[s.name] + s.nbytes) for s in plan.specs}
        self._fd = os.open(path, os.O_RDONLY)
        self._buffer = bytearray(CHUNK_BYTES)
        self._digests: dict[str, bytes] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pending: list[Future[None]] = []
        self._dropped = 0

    def complete(self, names: Iterable[str]) -> None:
        """These tensors are completely written."""
        self._pending += [self._thread.submit(self._hash, name) for name in names]

    def hashed(self) -> list[str]:
        """Names of the tensors hashed so far."""
        return list(self._digests)

    def drop_cache(self, names: list[str]) -> None:
        """Give back the page cache of tensors that are hashed and synced: the next writes use those pages."""
        for name in names[self._dropped :]:
            start, stop = self._spans[name]
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)
        self._dropped = len(names)

    def hexdigest(self) -> str:
        """The digest, when every tensor is complete; closes."""
        for future in self._pending:
            future.result()
        self.close()
        ordered = sorted(self._digests, key=lambda name: self._spans[name])
        return hashlib.sha256(self._plan.header + b"".join(self._digests[name] for name in ordered)).hexdigest()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hash(self, name: str) -> None:
        at, stop = self._spans[name]
        digest, view = hashlib.sha256(), memoryview(self._buffer)
        while at < stop:
            count = os.preadv(self._fd, [view[: stop - at]], at)
            if count == 0:
                raise OSError(f"the shard ends at byte {at} inside {name}")
            digest.update(view[:count])
            at += count
        self._digests[name] = digest.digest()
