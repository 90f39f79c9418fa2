"""`quantize`: checks, plan, and what a quantized checkpoint has beside its weights."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.reader import Reader
from converters.writer import DEFAULT_SHARD_BYTES, write_index
from converters.writing import journal, run
from converters.writing.checks import paths_apart
from converters.writing.plan import Budget, Plan, make_budget
from converters.writing.supply import Folder, Supply
from l4tool.core.atomic import write_file
from quant import checks, report
from quant.card import SideFiles
from quant.plan import build_plan
from quant.schemes import Recipe, quantization_config


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
    with run.claim(out):
        return run_claimed(reader, out, recipe, options, plan, budget, Folder(reader.path), started_s)


def run_claimed(
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
    return run.run(Quantize(reader, recipe, options, plan), out, budget, supply, started_s, options.force)


def prepare(reader: Reader, out: Path | None, recipe: Recipe, options: Options) -> tuple[Plan, Budget]:
    """Everything that can be known before the first byte is written; `out` None for a dry run."""
    checks.source_usable(reader)
    checks.device_usable(options.device)
    if out is not None:
        paths_apart(reader.path, out)
    SideFiles(reader, options.licence)  # a licence file that cannot be used shows now
    plan = build_plan(reader, recipe, options.device, options.max_shard_bytes)
    return plan, make_budget(plan, options.memory_bytes, options.jobs)


def recipe_fields(recipe: Recipe, options: Options) -> dict[str, Any]:
    """All that decides the output's bytes."""
    return dataclasses.asdict(recipe) | {"device": options.device, "max_shard_bytes": options.max_shard_bytes}


class Quantize:
    """The job of one quantize run; see `converters.writing.run.Job`."""

    tool = "quantize"

    def __init__(self, reader: Reader, recipe: Recipe, options: Options, plan: Plan) -> None:
        self.reader = reader
        self.plan, self._recipe, self._options = plan, recipe, options
        self._side = SideFiles(reader, options.licence, options.source)

    @property
    def source(self) -> Reader:
        return self.reader

    def recipe(self) -> dict[str, Any]:
        return recipe_fields(self._recipe, self._options)

    def files(self) -> list[str]:
        return self._side.names + (["quantization_map.json"] if self._recipe.format == "quanto" else [])

    def begin(self, out: Path) -> None:
        self._side.tell(out, self._recipe)

    def mend(self, out: Path, report: dict[str, Any]) -> dict[str, Any]:
        return self._side.complete(out, self._recipe, self.plan, report)

    def complete(self, out: Path, finished: run.Finished) -> dict[str, Any]:
        config = dict(self.reader.config)
        if self._recipe.format == "quanto":
            from quant.quanto import quantization_map

            write_file(out / "quantization_map.json", json.dumps(quantization_map(self.plan), indent=2) + "\n")
        else:
            config["quantization_config"] = quantization_config(self._recipe)
        result = report.build(self.reader, self._recipe, self.plan, finished, self._options.command)
        self._side.write(out, self._recipe, self.plan, result)
        write_file(out / journal.REPORT, json.dumps(result, indent=2) + "\n")
        write_index(out, self.plan.shards)
        write_file(out / "config.json", json.dumps(config, indent=2) + "\n")
        return result
