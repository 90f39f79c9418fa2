"""What every output tensor is made from, in which shard it goes, and in which row ranges it is worked on."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.reader import TensorInfo
from converters.writer import ShardPlan
from converters.writing.encoder import Encoder
from l4tool.core.errors import UsageError
from l4tool.core.sizes import format_bytes

BASE_BYTES = 512 * 2**20  # Python, torch, numba and its compiler before any weight is touched
MAX_UNIT_BYTES = 128 * 2**20  # of source; larger units only make the last one to finish wait longer
ROW_ALIGNMENT = 128  # rows of a kernel's tile


@dataclass(frozen=True)
class Item:
    """One tensor on its way: `stored` is its name in the output, `encoder` makes its `parts`.

    `step_rows`: ranges of rows begin at multiples of it.
    """

    info: TensorInfo
    stored: str
    encoder: Encoder
    parts: tuple[str, ...]
    nbytes_out: int
    step_rows: int = 1

    @property
    def rows(self) -> int:
        return self.info.shape[0] if self.info.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one source row."""
        return self.info.nbytes // max(self.rows, 1)


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one item: what one thread works on at a time."""

    item: Item
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Source bytes."""
        return (self.stop - self.start) * self.item.row_bytes


@dataclass(frozen=True)
class Plan:
    """`shards[i]` is written from `items[i]`. Two plans of the same source and recipe are equal, file for file."""

    shards: list[ShardPlan]
    items: list[list[Item]]
    source_bytes: int
    output_bytes: int  # of tensors
    classes: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # class → (kind, bytes before, after)


@dataclass(frozen=True)
class Budget:
    """`jobs` units at once, each with at most `unit_bytes` of anonymous memory."""

    jobs: int
    unit_bytes: int


def unfinished(plan: Plan, finished: Mapping[str, Container[str]]) -> dict[Path, list[tuple[int, Item]]]:
    """Source files in the order of their first use → the items they are still needed for, with their shard's number.

    `finished`: file name of a shard → names of the tensors that are in it.
    """
    files: dict[Path, list[tuple[int, Item]]] = {}
    for number, (shard, items) in enumerate(zip(plan.shards, plan.items, strict=True)):
        there = finished.get(shard.file_name, ())
        for item in items:
            files.setdefault(item.info.file, []).extend([] if item.info.name in there else [(number, item)])
    return {file: pairs for file, pairs in files.items() if pairs}


def split(item: Item, budget: Budget) -> Iterator[Unit]:
    """An item's units: row ranges whose scratch memory fits the budget."""
    rows = item.rows
    if not item.encoder.splittable:
        yield Unit(item, 0, rows)
        return
    by_memory = budget.unit_bytes // max(item.encoder.scratch_bytes(item.info, 1), 1)
    by_size = MAX_UNIT_BYTES // max(item.row_bytes, 1)
    step = max(min(by_memory, by_size) // ROW_ALIGNMENT * ROW_ALIGNMENT, 1)
    step = min(max(step, min(ROW_ALIGNMENT, by_memory)), max(rows, 1))
    step = max(step // item.step_rows, 1) * item.step_rows
    for start in range(0, rows, step):
        yield Unit(item, start, min(start + step, rows))


def make_budget(plan: Plan, memory_bytes: int, jobs: int | None) -> Budget:
    """How many units run at once and how large they may be, so that anonymous memory stays below `memory_bytes`.

    Raises UsageError when not even one row at a time fits.
    """
    items = [item for shard in plan.items for item in shard]
    smallest = max(item.encoder.scratch_bytes(item.info, _fewest_rows(item)) for item in items)
    free = memory_bytes - BASE_BYTES
    if free < smallest:
        raise UsageError(
            f"--memory {format_bytes(memory_bytes)} is too little: {format_bytes(BASE_BYTES)} for the program and "
            f"{format_bytes(smallest)} for the largest piece are needed",
            hint=f"use --memory {math.ceil((BASE_BYTES + smallest) / 2**20)}MiB or more",
        )
    wanted = jobs or len(os.sched_getaffinity(0))
    if not all(item.encoder.splittable for item in items):
        wanted = 1  # torch itself uses all cores there
    at_once = max(1, min(wanted, free // smallest))
    return Budget(at_once, free // at_once)


def _fewest_rows(item: Item) -> int:
    return min(item.rows, max(ROW_ALIGNMENT, item.step_rows)) if item.encoder.splittable else item.rows
