"""Files of tensors, whatever their header looks like: zero-copy views of the mapped file."""

from __future__ import annotations

import mmap
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from l4tool.core.errors import InputMissing
from l4tool.core.placeholder import require_contents

# torch warns once per process that a read-only buffer must not be written to; it never is.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as one file holds it: bytes [start, stop) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Path

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class MappedFile:
    """One file with these tensors. Views stay valid after close(): the map lives as long as the last of them.

    Safe for reading from several threads; the file is mapped when the first tensor is read. `constants`: tensors that
    follow from the header and that no checkpoint's digest counts.
    """

    constants: frozenset[str] = frozenset()

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path = path
        self.tensors = tensors
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def view(self, name: str) -> torch.Tensor:
        """The whole tensor, zero-copy and read-only by contract (a copy only where its offset is not aligned)."""
        stored = self.tensors[name]
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        mapped = self._mapped()
        if stored.start % stored.dtype.itemsize:
            raw = bytearray(mapped[stored.start : stored.stop])
            return torch.frombuffer(raw, dtype=stored.dtype).view(stored.shape)
        count = stored.nbytes // stored.dtype.itemsize
        return torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=stored.start).view(stored.shape)

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to read file bytes [start, stop) into the page cache; returns at once."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            self._mapped().madvise(mmap.MADV_WILLNEED, first, stop - first)

    def release(self, start: int, stop: int) -> None:
        """Let the kernel drop the mapped pages of file bytes [start, stop); later reads fetch them again."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, stop // page * page
        if self._map is not None and last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Let go of the map; unmapping it here would pull it from under the views that are still in use."""
        with self._lock:
            self._map = None

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                require_contents(self.path)
                try:
                    with open(self.path, "rb") as file:
                        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise InputMissing(f"cannot read {self.path}: {error.strerror or error}") from error
            return self._map
