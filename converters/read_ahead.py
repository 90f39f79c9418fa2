"""A Reader that fetches tensors from disk ahead of use, into private memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import torch

from converters.disk import Reading, WeightFiles
from converters.reader import Extent, Reader

AHEAD_BYTES = 128 << 20


class ReadAhead:
    """A Reader over another. `read` gives tensors that share no memory with the files; what they hold goes with them.

    `expect` names what comes next; so much of it is in memory or on its way that at most `ahead_bytes` and one tensor
    wait to be read. Other tensors can be read too, without having been fetched ahead. Safe for several threads.
    """

    def __init__(self, reader: Reader, files: WeightFiles, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._reader, self._files, self._ahead_bytes = reader, files, ahead_bytes
        self._lock = threading.Lock()
        self._coming: dict[Extent, None] = {}  # foreseen and not begun, in order
        self._begun: dict[Extent, Reading] = {}
        self._uses: Counter[Extent] = Counter()  # reads still foreseen
        self._last: tuple[Extent, Reading] | None = None  # two tensors of one extent are mostly read in a row
        self._is_stopped = False
        self.names: list[str] = []  # read since `expect`, in order

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def expect(self, names: Sequence[str]) -> None:
        """These are read next, in this order. What was fetched for an earlier plan stays where it is in this one."""
        extents = [self._reader.extent(name) for name in names]
        with self._lock:
            self.names, self._last, self._uses = [], None, Counter(extents)
            for extent in [extent for extent in self._begun if extent not in self._uses]:
                self._begun.pop(extent).cancel()
            self._coming = dict.fromkeys(extent for extent in extents if extent not in self._begun)
            self._fill()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As `Reader.read`, in memory of its own. Raises KeyError, CheckpointError, InputMissing."""
        extent = self._reader.extent(name)
        with self._lock:
            if self._is_stopped:
                raise CancelledError
            self.names.append(name)
            reading = self._reading(extent)
            self._uses[extent] -= 1
            if self._uses[extent] <= 0:
                self._begun.pop(extent, None)
            self._last = (extent, reading)
            self._fill()
        tensor = self._reader.from_bytes(name, reading.result())
        return tensor if rows is None else tensor[rows]

    def prefetch(self, name: str) -> None:
        """What is foreseen is on its way."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def finish(self) -> None:
        """No more reads: let go of everything that was fetched."""
        with self._lock:
            self._drop()

    def stop(self) -> None:
        """From now on every read raises CancelledError, those that wait included: for closing while another thread
        reads."""
        with self._lock:
            self._is_stopped = True
            self._drop()

    def _reading(self, extent: Extent) -> Reading:
        if extent in self._begun:
            return self._begun[extent]
        if self._last is not None and self._last[0] == extent:
            return self._last[1]
        self._coming.pop(extent, None)
        return self._begin(extent)

    def _begin(self, extent: Extent) -> Reading:
        reading = self._begun[extent] = self._files.begin(extent)
        return reading

    def _fill(self) -> None:
        waiting = sum(extent.nbytes for extent in self._begun)
        while self._coming and waiting < self._ahead_bytes:
            extent = next(iter(self._coming))
            del self._coming[extent]
            self._begin(extent)
            waiting += extent.nbytes

    def _drop(self) -> None:
        for reading in self._begun.values():
            reading.cancel()
        self._begun, self._coming, self._last, self.names = {}, {}, None, []
