"""`quantize`: checks, plan, what an earlier run left, one pass over the source, and the files beside the weights."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.reader import Reader
from converters.writer import DEFAULT_SHARD_BYTES, write_index
from l4tool.core.atomic import write_errors, write_file
from l4tool.core.console import note
from l4tool.core.lock import output_lock
from quant import checks, journal, report
from quant.card import SideFiles
from quant.plan import Budget, Plan, build_plan, make_budget, unfinished
from quant.resume import take_up
from quant.schemes import Recipe, quantization_config
from quant.stream import Stream
from quant.supply import Folder, Supply


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what to make. None of it changes the output's bytes."""

    memory_bytes: int = 8 * 2**30
    jobs: int | None = None
    device: str = "cpu"
    force: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    command: str = ""
    licence: Path | None = None  # the licence's text, where the source does not hold it
    source: str = ""  # "org/name@commit", where the reader's folder does not say it


def quantize(reader: Reader, out: Path, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Write the quantized checkpoint to `out`, or carry on where an interrupted run of the same job stopped.

    Returns the report. Raises UsageError, CheckpointError, DeviceError, WriteError or LockHeld; what was finished
    until then stays and counts.
    """
    started_s = time.monotonic()
    plan, budget = prepare(reader, out, recipe, options)
    with claim(out):
        return run(reader, out, recipe, options, plan, budget, Folder(reader.path), started_s)


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold the output folder, made if need be; one that is still empty at the end goes again."""
    checks.output_usable(out)
    is_new = not out.exists()
    with write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with output_lock(out):
            checks.output_usable(out)
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()


def run(
    reader: Reader,
    out: Path,
    recipe: Recipe,
    options: Options,
    plan: Plan,
    budget: Budget,
    supply: Supply,
    started_s: float,
) -> dict[str, Any]:
    """`quantize` in a folder that is held. Raises what `supply` raises, too."""
    job = journal.fingerprint(recipe, options.device, options.max_shard_bytes, supply.describe(reader))
    side = SideFiles(reader, options.licence, options.source)
    job["files"] = _output_files(side, plan, recipe)
    done = checks.begin(out, job, options.force)
    if done is not None:
        note(f"{out} is already complete: the same source and options, nothing to do")
        return side.complete(out, recipe, plan, done | {"job": job})
    side.tell(out, recipe)
    before = take_up(out, plan, journal.read_journal(out))
    files = list(unfinished(plan, before.tensors))
    checks.disk_space(out, plan, before.shards, supply.folder, supply.room_bytes(files))
    log = journal.Journal(out, job, before)
    try:
        finished = sum(map(len, before.tensors.values()))
        if finished:
            note(f"carrying on: {finished} of {sum(map(len, plan.items))} tensors are finished")
        Stream(reader, out, plan, budget, log, supply).run()
        seconds = time.monotonic() - started_s
        return _complete(reader, out, recipe, plan, log, job, seconds, finished > 0, options)
    finally:
        log.close()


def prepare(reader: Reader, out: Path | None, recipe: Recipe, options: Options) -> tuple[Plan, Budget]:
    """Everything that can be known before the first byte is written; `out` None for a dry run."""
    checks.source_usable(reader)
    checks.device_usable(options.device)
    if out is not None:
        checks.paths_apart(reader.path, out)
    SideFiles(reader, options.licence)  # a licence file that cannot be used shows now
    plan = build_plan(reader, recipe, options.device, options.max_shard_bytes)
    return plan, make_budget(plan, options.memory_bytes, options.jobs)


def _output_files(side: SideFiles, plan: Plan, recipe: Recipe) -> list[str]:
    """What a run creates besides config.json, index, report and journal: `--force` may delete exactly that."""
    extra = ["quantization_map.json"] if recipe.format == "quanto" else []
    return [s.file_name for s in plan.shards] + side.names + extra


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
    config = dict(reader.config)
    if recipe.format == "quanto":
        from quant.quanto import quantization_map

        write_file(out / "quantization_map.json", json.dumps(quantization_map(plan), indent=2) + "\n")
    else:
        config["quantization_config"] = quantization_config(recipe)
    result = report.build(reader, recipe, plan, log, job, seconds, resumed, options.command)
    SideFiles(reader, options.licence, options.source).write(out, recipe, plan, result)
    write_file(out / journal.REPORT, json.dumps(result, indent=2) + "\n")
    write_index(out, plan.shards)
    write_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    log.close()
    with write_errors(log.path):
        log.path.unlink()
    return result
