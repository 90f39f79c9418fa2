"""One output shard while it is being made: its file, its running hash, its tensors' error sums."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.writer import ShardFile, ShardPlan
from quant.hashing import RunningDigest
from quant.plan import Item, Unit

FLUSH_BYTES = 256 * 2**20  # dirty pages are sent to the disk this often, so that sealing a shard finds few


@dataclass(frozen=True)
class Done:
    """A finished unit: bytes written, and per row [squared error], [squared weight] where it was quantized."""

    unit: Unit
    written: int
    rows: tuple[list[float], list[float]] | None


class OpenShard:
    """Workers `write`; the main thread accounts with `add`; `seal` runs in the sealer thread."""

    def __init__(self, out: Path, plan: ShardPlan, items: list[Item], sealer: ThreadPoolExecutor) -> None:
        self.file = ShardFile(out, plan)
        self._lock = threading.Lock()
        self._hash = RunningDigest(self.file.part, plan)
        self._sealer = sealer
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._rows_done: dict[str, int] = {}
        self._rows: dict[str, tuple[list[float], list[float]]] = {}
        self._totals: dict[str, list[float]] = {}
        for item in items:
            fixed = item.encoder.fixed(item.info, item.stored)
            for name, tensor in fixed.items():
                self.file.write(name, tensor)
            self._hash.complete(fixed)

    def write(self, pieces: list[tuple[str, torch.Tensor, int]]) -> None:
        """Put rows of tensors in their place. One thread at a time: the kernel would let the others spin."""
        with self._lock:
            for name, tensor, row in pieces:
                self.file.write(name, tensor, row)

    def add(self, done: Done) -> bool:
        """Account for a unit; True when it was the last of its tensor. Raises what an earlier flush raised."""
        item = done.unit.item
        name = item.info.name
        self._rows_done[name] = self._rows_done.get(name, 0) + done.unit.stop - done.unit.start
        complete = self._rows_done[name] == item.rows
        if done.rows is not None:
            self._add_errors(item, done.rows, complete)
        if complete:
            self._hash.complete(item.parts)
        self._unflushed += done.written
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._unflushed = 0
            self._flush = self._sealer.submit(self._flush_now)
        return complete

    def _flush_now(self) -> None:
        """Send dirty pages to the disk; what was hashed before then leaves the page cache."""
        hashed = self._hash.hashed()
        self.file.sync()
        self._hash.drop_cache(hashed)

    def _add_errors(self, item: Item, rows: tuple[list[float], list[float]], complete: bool) -> None:
        """Exact sums over rows, so that they do not depend on the split or the order."""
        error, square = self._rows.setdefault(item.info.name, ([], []))
        error += rows[0]
        square += rows[1]
        if complete:
            self._totals[item.info.name] = [math.fsum(error), math.fsum(square)]
            del self._rows[item.info.name]

    def seal(self) -> dict[str, Any]:
        """Durable under its final name → its journal entry: size, mtime, digest, error sums of every tensor."""
        with ThreadPoolExecutor(1, thread_name_prefix="sync") as helper:
            synced = helper.submit(self.file.sync)
            digest = self._hash.hexdigest()
            synced.result()
        self.file.finish()
        stat = self.file.path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest, "tensors": self._totals}

    def close(self) -> None:
        """Give up what is not sealed; the `.part` file stays and is overwritten by the next run."""
        self._hash.close()
        self.file.close()
