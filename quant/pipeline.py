"""`quantize`: source → units → encoded rows → shards, within a memory budget, resumable at every moment.

The way of one shard: its items are split into units; a few threads map, encode and write them (kernels and system
calls run without the GIL); another thread flushes what was written, and seals the shard: fsync, final name, journal.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.reader import Reader
from converters.writer import DEFAULT_SHARD_BYTES, ShardPlan, exists, write_index
from l4tool.core.atomic import write_errors, write_file
from l4tool.core.console import Progress, note
from quant import checks, journal, ops, report
from quant.hashing import shard_digest
from quant.plan import Budget, Item, Plan, Unit, build_plan, make_budget, split
from quant.schemes import Recipe, quantization_config
from quant.shards import Done, OpenShard

QUEUED_UNITS = 2  # units beyond the running ones: their source is being read ahead
RELEASE_LAG = 4  # items after which a finished item's mapped pages are dropped; gate and up share them


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to make. None of it changes the output's bytes."""

    memory_bytes: int = 8 * 2**30
    jobs: int | None = None
    device: str = "cpu"
    force: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    command: str = ""


def quantize(reader: Reader, out: Path, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Write the quantized checkpoint to `out`, or carry on where an interrupted run of the same job stopped.

    Returns the report. Raises UsageError, CheckpointError, DeviceError, WriteError or LockHeld; what was finished
    until then stays and counts.
    """
    started_s = time.monotonic()
    plan, budget = prepare(reader, out, recipe, options)
    job = journal.fingerprint(reader, recipe, options.device, options.max_shard_bytes)
    job["files"] = _output_files(reader, plan, recipe)
    checks.output_usable(out)
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with journal.output_lock(out):
        checks.output_usable(out)
        done = checks.begin(out, job, options.force)
        if done is not None:
            note(f"{out} is already complete: the same source and options, nothing to do")
            return done
        _, finished, size = journal.read_journal(out)
        finished = {s.file_name: finished[s.file_name] for s in plan.shards if _intact(out, s, finished)}
        checks.disk_space(out, plan, finished)
        log = journal.Journal(out, job, finished, size)
        try:
            resumed = bool(finished)
            if resumed:
                note(f"carrying on: {len(finished)} of {len(plan.shards)} shards are finished")
            _Run(reader, out, plan, budget, log).run()
            return _complete(reader, out, recipe, plan, log, job, time.monotonic() - started_s, resumed, options)
        finally:
            log.close()


def prepare(reader: Reader, out: Path | None, recipe: Recipe, options: Options) -> tuple[Plan, Budget]:
    """Everything that can be known before the first byte is written; `out` None for a dry run."""
    checks.source_usable(reader)
    checks.device_usable(options.device)
    if out is not None:
        checks.paths_apart(reader.path, out)
    plan = build_plan(reader, recipe, options.device, options.max_shard_bytes)
    return plan, make_budget(plan, options.memory_bytes, options.jobs)


def _output_files(reader: Reader, plan: Plan, recipe: Recipe) -> list[str]:
    """What a run creates besides config.json, index, report and journal: `--force` may delete exactly that."""
    extra = ["quantization_map.json"] if recipe.format == "quanto" else []
    return [s.file_name for s in plan.shards] + [path.name for path in reader.side_files()] + extra


def _intact(out: Path, shard: ShardPlan, finished: dict[str, dict[str, Any]]) -> bool:
    """A journaled shard still there: same header and size, and same content where its mtime is another."""
    entry = finished.get(shard.file_name)
    if entry is None or not exists(out, shard):
        return False
    path = out / shard.file_name
    return path.stat().st_mtime_ns == entry["mtime_ns"] or shard_digest(path, shard) == entry["digest"]


class _Run:
    """One pass over the unfinished shards. `log` learns every shard that is sealed."""

    def __init__(self, reader: Reader, out: Path, plan: Plan, budget: Budget, log: journal.Journal) -> None:
        self.reader, self.out, self.plan, self.budget, self.log = reader, out, plan, budget, log
        self.workers = ThreadPoolExecutor(budget.jobs, thread_name_prefix="quantize")
        self.sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self.local = threading.local()
        self.used: deque[str] = deque()

    def run(self) -> None:
        """Every shard that the journal lacks. On any exception what runs is waited for and the rest dropped."""
        todo = [(s, i) for s, i in zip(self.plan.shards, self.plan.items, strict=True) if self._lacks(s)]
        left = sum(item.info.nbytes for _, items in todo for item in items)
        seal: Future[None] | None = None
        opened: list[OpenShard] = []
        try:
            with Progress("quantize", self.plan.source_bytes, initial=self.plan.source_bytes - left) as progress:
                for shard_plan, items in todo:
                    shard = OpenShard(self.out, shard_plan, items, self.sealer)
                    opened = [*opened[-1:], shard]  # the one before may still be sealed
                    self._encode(shard, items, progress)
                    if seal is not None:
                        seal.result()
                    seal = self.sealer.submit(self._seal, shard)
                if seal is not None:
                    seal.result()
        finally:
            self.workers.shutdown(cancel_futures=True)
            self.sealer.shutdown(cancel_futures=True)
            for shard in opened:
                shard.close()

    def _lacks(self, shard: ShardPlan) -> bool:
        return shard.file_name not in self.log.shards

    def _encode(self, shard: OpenShard, items: list[Item], progress: Progress) -> None:
        """All units of one shard, with few more submitted than run."""
        running: set[Future[Done]] = set()
        for unit in self._read_ahead(unit for item in items for unit in split(item, self.budget)):
            running.add(self.workers.submit(self._work, shard, unit))
            if len(running) >= self.budget.jobs + QUEUED_UNITS:
                running = self._collect(shard, running, progress)
        while running:
            running = self._collect(shard, running, progress)

    def _read_ahead(self, units: Iterator[Unit]) -> Iterator[Unit]:
        last = None
        for unit in units:
            if unit.item is not last:
                self.reader.prefetch(unit.item.info.name)
                last = unit.item
            yield unit

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

    def _scratch(self) -> ops.Scratch:
        """This worker's own result memory."""
        if not hasattr(self.local, "scratch"):
            self.local.scratch = ops.Scratch()
        scratch: ops.Scratch = self.local.scratch
        return scratch

    def _collect(self, shard: OpenShard, running: set[Future[Done]], progress: Progress) -> set[Future[Done]]:
        """Wait for at least one unit and account for it; returns those still running. Raises what a unit raised."""
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            done = future.result()
            if shard.add(done):
                self._release(done.unit.item)
            progress.advance(done.unit.nbytes)
        return running

    def _release(self, item: Item) -> None:
        """Drop mapped source pages some items later, so that resident memory stays small too."""
        self.used.append(item.info.name)
        if len(self.used) > RELEASE_LAG + self.budget.jobs:
            self.reader.release(self.used.popleft())

    def _seal(self, shard: OpenShard) -> None:
        self.log.add_shard(shard.file.path.name, shard.seal())


def _complete(
    reader: Reader,
    out: Path,
    recipe: Recipe,
    plan: Plan,
    log: journal.Journal,
    job: dict[str, Any],
    seconds: float,
    resumed: bool,
    options: Options,
) -> dict[str, Any]:
    """Everything beside the shards; the index and config.json last, then the journal goes."""
    for path in reader.side_files():
        write_file(out / path.name, path.read_bytes())
    config = dict(reader.config)
    if recipe.format == "quanto":
        from quant.quanto import quantization_map

        write_file(out / "quantization_map.json", json.dumps(quantization_map(plan), indent=2) + "\n")
    else:
        config["quantization_config"] = quantization_config(recipe)
    result = report.build(reader, recipe, plan, log.shards, job, seconds, resumed, options.command)
    write_file(out / journal.REPORT, json.dumps(result, indent=2) + "\n")
    write_index(out, plan.shards)
    write_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    log.close()
    with write_errors(log.path):
        log.path.unlink()
    return result
