"""One output shard while it is being made: its file, its running hash, its tensors' error sums."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.writer import ShardFile, ShardPlan
from converters.writing.hashing import RunningDigest
from converters.writing.plan import Item, Unit
from l4tool.core.atomic import fsync_dir, write_errors


@dataclass(frozen=True)
class Done:
    """A finished unit: bytes written, and per row [squared error], [squared weight] where it was quantized."""

    unit: Unit
    written: int
    rows: tuple[list[float], list[float]] | None


class OpenShard:
    """Workers `write`; the main thread accounts with `add`; `checkpoint` and `seal` run in the sealer thread.

    `kept`: journal entries of tensors that an earlier run left in the `.part` file, read again and found right.
    """

    def __init__(self, out: Path, plan: ShardPlan, items: list[Item], kept: dict[str, dict[str, Any]]) -> None:
        self.name = plan.file_name
        self.unfinished = sum(item.info.name not in kept for item in items)
        self._file = ShardFile(out, plan, resume=bool(kept))
        with write_errors(out):
            fsync_dir(out)
        self._hash = RunningDigest(self._file.part, plan)
        self._write_lock = threading.Lock()
        self._rows_done: dict[str, int] = {}
        self._rows: dict[str, tuple[list[float], list[float]]] = {}
        self._complete: dict[str, tuple[Item, list[float] | None]] = {}  # not in the journal yet, with error sums
        for item in items:
            if item.info.name in kept:
                self._keep(item, kept[item.info.name])
            else:
                for name, tensor in item.encoder.fixed(item.info, item.stored).items():
                    self._file.write(name, tensor)

    def _keep(self, item: Item, entry: dict[str, Any]) -> None:
        for part in item.parts:
            self._file.mark(part)
        self._hash.adopt(dict(zip(item.parts, entry["sha256"], strict=True)))

    def write(self, pieces: list[tuple[str, torch.Tensor, int]]) -> None:
        """Put rows of tensors in their place. One thread at a time: the kernel would let the others spin."""
        with self._write_lock:
            for name, tensor, row in pieces:
                self._file.write(name, tensor, row)

    def add(self, done: Done) -> bool:
        """Account for a unit; True when it was the last of its tensor."""
        item = done.unit.item
        name = item.info.name
        self._rows_done[name] = self._rows_done.get(name, 0) + done.unit.stop - done.unit.start
        error, square = self._rows.setdefault(name, ([], []))
        if done.rows is not None:
            error += done.rows[0]
            square += done.rows[1]
        if self._rows_done[name] < item.rows:
            return False
        # exact sums, so that they do not depend on the split or the order
        self._complete[name] = (item, None if done.rows is None else [math.fsum(error), math.fsum(square)])
        del self._rows[name]
        self.unfinished -= 1
        self._hash.complete(item.parts)
        return True

    def checkpoint(self, wait: bool) -> dict[str, dict[str, Any]]:
        """Sync → journal entries of the tensors that are durable now; `wait`: of all that were complete before."""
        complete, hashed = dict(self._complete), self._hash.hashed()
        self._file.sync()
        self._hash.drop_cache(hashed)
        if wait:
            self._hash.wait()
        known = set(self._hash.hashed())
        entries = {
            name: {"sums": sums, "sha256": [self._hash.tensor(part) for part in item.parts]}
            for name, (item, sums) in complete.items()
            if known.issuperset(item.parts)
        }
        for name in entries:
            del self._complete[name]
        return entries

    def seal(self) -> dict[str, Any]:
        """Durable under its final name → its journal entry: size, mtime, digest."""
        digest = self._hash.hexdigest()
        self._file.write_crcs(self._hash.crcs)
        self._file.finish()
        stat = self._file.path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "digest": digest}

    def close(self) -> None:
        """Give up what is not sealed; the `.part` file stays for the next run."""
        self._hash.close()
        self._file.close()
