"""One pass over weight files: every byte hashed where there is a digest to compare with, every float looked at.

Files are read in order, a few at a time, through one buffer per thread: memory does not grow with the checkpoint, and
hashing and looking share the one read from the disk.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from converters.safetensors_io import StoredTensor

CHUNK_BYTES = 4 * 2**20  # stays in the second-level cache between hashing and looking
# dtype → (unsigned type of the bits, mask without the sign, bits of infinity, or of the NaN of a type without one)
FLOATS: dict[torch.dtype, tuple[Any, int, int]] = {
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
    torch.float32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.float8_e4m3fn: (np.uint8, 0x7F, 0x7F),
    torch.float8_e5m2: (np.uint8, 0x7F, 0x7C),
}


class Digest(Protocol):
    """What a hashlib object does."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Values:
    """What one float tensor holds. `first` is the index of the first NaN or Inf, None where all are finite."""

    count: int
    nan: int
    inf: int
    zeros: int
    first: tuple[int, ...] | None


@dataclass
class FileJob:
    """A file to read: its tensors (none for a file that is only hashed), and its digest object, if any."""

    path: Path
    size: int
    tensors: Sequence[StoredTensor] = ()
    digest: Digest | None = None
    values: dict[str, Values] = field(default_factory=dict)  # result: stored name → what it holds
    error: OSError | None = None  # result: reading stopped here

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        return sum(stop - start for start, stop, _ in _segments(self))


def sweep(jobs: Sequence[FileJob], threads: int, on_bytes: Callable[[int], None]) -> None:
    """Read every file, `threads` at a time; the results are in the jobs. One thread at a time calls `on_bytes`."""
    lock, local, stop = threading.Lock(), threading.local(), threading.Event()

    def count(num_bytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("the sweep was stopped")
        with lock:
            on_bytes(num_bytes)

    def work(job: FileJob) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(CHUNK_BYTES)
        try:
            _read(job, local.buffer, count)
        except OSError as error:
            job.error = error

    with ThreadPoolExecutor(threads, thread_name_prefix="sweep") as pool:
        try:
            for future in [pool.submit(work, job) for job in sorted(jobs, key=lambda job: -job.size)]:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _segments(job: FileJob) -> Iterator[tuple[int, int, StoredTensor | None]]:
    """(start, stop, tensor) of the byte ranges to read, in file order; integers without a digest need no reading."""
    at = 0
    for tensor in sorted(job.tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        looked_at = tensor.dtype in FLOATS
        if job.digest is not None and at < tensor.start:
            yield at, tensor.start, None
        if looked_at or job.digest is not None:
            yield tensor.start, tensor.stop, tensor if looked_at else None
        at = tensor.stop
    if job.digest is not None and at < job.size:
        yield at, job.size, None


def _read(job: FileJob, buffer: bytearray, on_bytes: Callable[[int], None]) -> None:
    fd = os.open(job.path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for start, stop, tensor in _segments(job):
            counts = np.array([0, 0, 0, -1])
            for at in range(start, stop, CHUNK_BYTES):
                view = memoryview(buffer)[: min(CHUNK_BYTES, stop - at)]
                _fill(fd, view, at)
                if job.digest is not None:
                    job.digest.update(view)
                if tensor is not None:
                    _look(view, tensor.dtype, counts, (at - start) // tensor.dtype.itemsize)
                on_bytes(len(view))
            if tensor is not None:
                job.values[tensor.name] = _values(tensor, counts)
    finally:
        os.close(fd)


def _fill(fd: int, view: memoryview, at: int) -> None:
    while view:
        count = os.preadv(fd, [view], at)
        if count == 0:
            raise OSError(f"the file ends at byte {at}")
        view, at = view[count:], at + count


def _look(view: memoryview, dtype: torch.dtype, counts: np.ndarray, offset: int) -> None:
    """Add what a chunk of a tensor holds; `offset` is its first element's place."""
    from quant.kernels.scan import scan_bits

    bits, mask, inf = FLOATS[dtype]
    here = np.array([0, 0, 0, -1])
    scan_bits(np.frombuffer(view, bits), bits(mask), bits(inf), here)
    counts[:3] += here[:3]
    if counts[3] < 0 <= here[3]:
        counts[3] = here[3] + offset


def _values(tensor: StoredTensor, counts: np.ndarray) -> Values:
    nan, inf, zeros, first = (int(count) for count in counts)
    if tensor.dtype == torch.float8_e4m3fn:
        nan, inf = inf, 0
    place = tuple(int(i) for i in np.unravel_index(first, tensor.shape)) if first >= 0 and tensor.shape else ()
    return Values(math.prod(tensor.shape), nan, inf, zeros, place if first >= 0 else None)
