"""One pass over the source, file by file: units → encoded rows → shards; what is durable is journaled as it comes.

Threads map, encode and write units (kernels and system calls run without the GIL). Another one, the sealer, makes
durable what they wrote: checkpoints of open shards, seals of complete ones, and only then the word that a source file
is used up. It works in the order it is told, so a file is never given up before its tensors are in the journal.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.writing.encoder import Scratch
from converters.writing.journal import Journal
from converters.writing.plan import Budget, Item, Plan, Unit, split, unfinished
from converters.writing.shards import Done, OpenShard
from converters.writing.supply import Supply
from l4tool.core.console import Progress

QUEUED_UNITS = 2  # units beyond the running ones: their source is being read ahead
RELEASE_LAG = 4  # items after which a finished item's mapped pages are dropped; gate and up share them
CHECKPOINT_BYTES = 256 * 2**20  # of output, at most lost when killed; and sealing a shard finds few dirty pages
CHECKPOINT_S = 10.0
SEALS_BEHIND = 2  # tasks of the sealer that workers may be ahead of


class Source(Protocol):
    """Where tensors are read, by the names of a plan's items; as `converters.reader.Reader` describes it."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor: ...

    def prefetch(self, name: str, rows: slice | None = None) -> None: ...

    def release(self, name: str) -> None: ...

    def forget(self, file: Path) -> None: ...


class Stream:
    """One run. `log` knows what is finished and learns what becomes durable; `tool` names it to the user."""

    def __init__(
        self, reader: Source, out: Path, plan: Plan, budget: Budget, log: Journal, supply: Supply, tool: str
    ) -> None:
        self.reader, self.out, self.plan, self.budget, self.log, self.supply = reader, out, plan, budget, log, supply
        self.tool = tool
        self.todo = unfinished(plan, log.tensors)
        self.left = Counter({file: len(pairs) for file, pairs in self.todo.items()})  # tensors per source file
        self.shards: dict[str, OpenShard] = {}  # open ones; the sealer takes out what it has sealed
        self.running: dict[Future[Done], OpenShard] = {}
        self.sealing: deque[Future[None]] = deque()
        self.workers = ThreadPoolExecutor(budget.jobs, thread_name_prefix="encode")
        self.sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self.local = threading.local()
        self.used: deque[str] = deque()
        self.unsaved_bytes, self.saved_s = 0, time.monotonic()
        self.seal_failed = False

    def run(self) -> None:
        """Everything that the journal lacks. On any exception what runs is waited for and the rest dropped."""
        left_bytes = sum(item.info.nbytes for pairs in self.todo.values() for _, item in pairs)
        done_bytes = self.plan.source_bytes - left_bytes
        try:
            self.supply.begin(list(self.todo))
            with Progress(self.tool, self.plan.source_bytes, initial=done_bytes) as progress:
                self._seal_complete()
                for number, unit in self._units(progress):
                    shard = self._shard(number)
                    self.running[self.workers.submit(self._work, shard, unit)] = shard
                    if len(self.running) >= self.budget.jobs + QUEUED_UNITS:
                        self._collect(progress)
                self._drain(progress)
                self._settle(0)
        finally:
            self.workers.shutdown(cancel_futures=True)
            self.sealer.shutdown(cancel_futures=True)
            for shard in self.shards.values():
                shard.close()

    def _seal_complete(self) -> None:
        """Shards that an earlier run filled but did not seal."""
        waiting = {number for pairs in self.todo.values() for number, _ in pairs}
        for number, shard in enumerate(self.plan.shards):
            if shard.file_name not in self.log.shards and number not in waiting:
                self._submit(self._seal, self._shard(number))

    def _units(self, progress: Progress) -> Iterator[tuple[int, Unit]]:
        """Units of unfinished tensors with the number of their shard; waits for each source file, reads ahead."""
        for file, pairs in self.todo.items():
            if not self.supply.ready(file):
                self._drain(progress)  # what waits to be given up may be what the next file needs room for
            self.supply.ensure(file)
            for number, item in pairs:
                for unit in split(item, self.budget):
                    self.reader.prefetch(item.info.name, slice(unit.start, unit.stop))
                    yield number, unit

    def _shard(self, number: int) -> OpenShard:
        shard = self.plan.shards[number]
        if shard.file_name not in self.shards:
            kept = self.log.tensors.get(shard.file_name, {})
            self.shards[shard.file_name] = OpenShard(self.out, shard, self.plan.items[number], kept)
        return self.shards[shard.file_name]

    def _work(self, shard: OpenShard, unit: Unit) -> Done:
        """Encode and write one unit; runs in a worker thread."""
        item = unit.item
        rows = slice(unit.start, unit.stop) if item.info.shape else None
        weight = self.reader.read(item.info.name, rows)
        encoded = item.encoder.encode(weight, item.info, item.stored, unit.start, self._scratch())
        shard.write(encoded.pieces)
        written = sum(tensor.nbytes for _, tensor, _ in encoded.pieces)
        if encoded.error is None or encoded.square is None:
            return Done(unit, written, None)
        return Done(unit, written, (encoded.error.tolist(), encoded.square.tolist()))

    def _scratch(self) -> Scratch:
        """This worker's own result memory."""
        if not hasattr(self.local, "scratch"):
            self.local.scratch = Scratch()
        scratch: Scratch = self.local.scratch
        return scratch

    def _drain(self, progress: Progress) -> None:
        while self.running:
            self._collect(progress)

    def _collect(self, progress: Progress) -> None:
        """Wait for at least one unit and account for it. Raises what a unit or the sealer raised."""
        finished, _ = wait(self.running, return_when=FIRST_COMPLETED)
        for future in finished:
            shard, done = self.running.pop(future), future.result()
            self.unsaved_bytes += done.written
            if shard.add(done):
                self._finished(shard, done.unit.item)
            progress.advance(done.unit.nbytes)
        while self.sealing and self.sealing[0].done():
            self.sealing.popleft().result()
        due = self.unsaved_bytes >= CHECKPOINT_BYTES or time.monotonic() - self.saved_s >= CHECKPOINT_S
        if due and not self.sealing:
            self.unsaved_bytes, self.saved_s = 0, time.monotonic()
            self._submit(self._checkpoint)

    def _finished(self, shard: OpenShard, item: Item) -> None:
        """A tensor is complete, and with it perhaps its shard or its source file."""
        self._release(item)
        if shard.unfinished == 0:
            self._submit(self._seal, shard)
        self.left[item.info.file] -= 1
        if self.left[item.info.file] == 0:
            self._submit(self._give_up, item.info.file)

    def _release(self, item: Item) -> None:
        """Drop mapped source pages some items later, so that resident memory stays small too."""
        self.used.append(item.info.name)
        if len(self.used) > RELEASE_LAG + self.budget.jobs:
            self.reader.release(self.used.popleft())

    def _submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Give the sealer a task; raises what an earlier one raised."""
        self._settle(SEALS_BEHIND)
        self.sealing.append(self.sealer.submit(self._in_order, task, *arguments))

    def _settle(self, limit: int) -> None:
        while len(self.sealing) > limit:
            self.sealing.popleft().result()

    def _in_order(self, task: Callable[..., None], *arguments: Any) -> None:
        """After a failure nothing more is declared durable: a second fsync may succeed where the first lost pages."""
        if self.seal_failed:
            return
        try:
            task(*arguments)
        except BaseException:
            self.seal_failed = True
            raise

    def _checkpoint(self, wait: bool = False) -> None:
        for shard in list(self.shards.values()):
            self._save(shard, wait)

    def _save(self, shard: OpenShard, wait: bool) -> None:
        entries = shard.checkpoint(wait)
        if entries:
            self.log.add_tensors(shard.name, entries)

    def _seal(self, shard: OpenShard) -> None:
        self._save(shard, wait=True)
        self.log.add_shard(shard.name, shard.seal())
        del self.shards[shard.name]

    def _give_up(self, file: Path) -> None:
        """All of a source file is done: make it durable, then the file may go."""
        self._checkpoint(wait=True)
        self.reader.forget(file)
        self.supply.used_up(file)
