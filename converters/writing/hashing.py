"""The digest of a shard: SHA-256 over its header and the SHA-256 of each of its tensors, in file order.

Tensors complete in any order while a shard is being written, and each is hashed as soon as it is complete; the hash of
the plain file could only begin when everything is there.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from converters.writer import ShardPlan

CHUNK_BYTES = 2**20


def shard_digest(path: Path, plan: ShardPlan) -> str:
    """The digest of a finished shard, from its bytes; its header must be the plan's."""
    running = RunningDigest(path, plan)
    running.complete(spec.name for spec in plan.specs)
    return running.hexdigest()


def tensor_digests(path: Path, plan: ShardPlan, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some tensors of a shard as it lies on the disk, in hex."""
    running = RunningDigest(path, plan)
    try:
        running.complete(names)
        running.wait()
        return {name: running.tensor(name) for name in running.hashed()}
    finally:
        running.close()


class RunningDigest:
    """The digest of a shard that is being written. Its thread reads from the page cache, without the GIL."""

    def __init__(self, path: Path, plan: ShardPlan) -> None:
        self._plan = plan
        self._spans = {s.name: (plan.starts[s.name], plan.starts[s.name] + s.nbytes) for s in plan.specs}
        self._fd = os.open(path, os.O_RDONLY)
        self._buffer = bytearray(CHUNK_BYTES)
        self._digests: dict[str, bytes] = {}
        self.crcs: dict[str, int] = {}  # CRC-32 of hashed tensors, where the plan has fields for them
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pending: list[Future[None]] = []
        self._dropped = 0

    def adopt(self, digests: dict[str, str]) -> None:
        """Tensors that lie there since an earlier run, with their SHA-256 in hex: they were read again just now."""
        self._digests |= {name: bytes.fromhex(digest) for name, digest in digests.items()}
        self._pending += [self._thread.submit(self._hash, name) for name in digests if name in self._plan.crc_at]

    def complete(self, names: Iterable[str]) -> None:
        """These tensors are completely written."""
        self._pending += [self._thread.submit(self._hash, name) for name in names]

    def wait(self) -> None:
        """Until everything that was complete before this call is hashed; raises what hashing raised."""
        for future in list(self._pending):
            future.result()

    def hashed(self) -> list[str]:
        """Names of the tensors hashed so far."""
        return list(self._digests)

    def tensor(self, name: str) -> str:
        """SHA-256 of one hashed tensor, in hex."""
        return self._digests[name].hex()

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
        self.wait()
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
        digest, crc, view = hashlib.sha256(), 0, memoryview(self._buffer)
        needs_crc = name in self._plan.crc_at
        while at < stop:
            count = os.preadv(self._fd, [view[: stop - at]], at)
            if count == 0:
                raise OSError(f"the shard ends at byte {at} inside {name}")
            digest.update(view[:count])
            crc = zlib.crc32(view[:count], crc) if needs_crc else 0
            at += count
        self._digests[name] = digest.digest()
        if needs_crc:
            self.crcs[name] = crc


class StreamedDigest:
    """The same digest of a file whose bytes come in file order; has the methods of a hashlib object.

    `header_bytes` is where the header ends, `spans` are the tensors' bytes [start, stop) in file order. What lies
    between them (padding, the records of a ZIP archive) does not count.
    """

    def __init__(self, header_bytes: int, spans: Sequence[tuple[int, int]]) -> None:
        self._whole, self._tensor = hashlib.sha256(), hashlib.sha256()
        self._at, self._header_bytes = 0, header_bytes
        self._spans = deque(spans)

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            used = self._take(view)
            self._at, view = self._at + used, view[used:]
            self._close_tensors()

    def _take(self, view: memoryview) -> int:
        """Hash what comes next of one kind; its length."""
        if self._at < self._header_bytes:
            piece = view[: self._header_bytes - self._at]
            self._whole.update(piece)
            return len(piece)
        if not self._spans:
            return len(view)
        start, stop = self._spans[0]
        if self._at < start:
            return min(len(view), start - self._at)
        piece = view[: stop - self._at]
        self._tensor.update(piece)
        return len(piece)

    def _close_tensors(self) -> None:
        """Tensors may be empty, so several can end at one place."""
        while self._spans and self._at >= self._header_bytes and self._spans[0][1] <= self._at:
            self._spans.popleft()
            self._whole.update(self._tensor.digest())
            self._tensor = hashlib.sha256()

    def hexdigest(self) -> str:
        return self._whole.hexdigest()
