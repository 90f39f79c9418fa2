"""The outputs of shards as their journals describe them, and what keeps them from being one whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batch.journal import Kind, journal_path, read_journal
from batch.line_keys import Shard
from l4tool.core.errors import EXIT_DATA, EXIT_NO_INPUT, InputMissing, L4Error, LockHeld

MAX_NAMED = 5
OWN_FACTS = ("shard", "error_file")  # what may differ between the shards of one run
RESULT = np.dtype([("line", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("crc", "<u4"), ("file", "u1"),
                   ("is_error", "?"), ("id", "<u8", 2)])  # fmt: skip
Problem = tuple[str, int]  # with the exit code that it means


class MergeError(L4Error):
    """Shards that do not make a whole."""


@dataclass(frozen=True)
class ShardOutput:
    """One shard as its journal describes it: `results` (RESULT) are those that count, `end` is what the whole input
    is: (lines, digest), None while the shard is unfinished."""

    path: Path
    shard: Shard
    job: dict[str, Any]
    errors: Path | None
    results: np.ndarray
    end: tuple[int, bytes] | None

    @property
    def name(self) -> str:
        return f"shard {self.shard} ({self.path})"

    @property
    def num_errors(self) -> int:
        return int(self.results["is_error"].sum())


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """The journal of an output, locked against runs. Raises InputMissing, LockHeld."""
    journal = journal_path(path)
    try:
        file = open(journal, "rb")
    except OSError as error:
        there = "" if path.exists() else f"; {path} is not there either"
        raise InputMissing(
            f"cannot read {journal}: {error.strerror}{there}", hint="name the outputs of --shard runs, journals beside"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeld(f"a run is writing {path}", hint="wait for it to end") from None
        except OSError:
            pass  # a file system without locks, mounted for reading
        yield


def read_shard(path: Path) -> ShardOutput:
    """An output from its journal; one that was not sharded is all of 1. Raises InputMissing, WriteError."""
    contents = read_journal(journal_path(path))
    if contents is None:
        raise InputMissing(f"{journal_path(path)} is empty: that run has not begun", hint="run its command")
    job, records = contents.header.get("job") or {}, contents.records
    errors = None
    if job.get("error_file") is not None:
        errors = path.parent / (contents.header.get("errors") or job["error_file"])
    for each in (path, errors):
        if each is not None and not each.is_file():
            raise InputMissing(f"{each} is missing; {journal_path(path)} tells of it", hint="bring it back")
    is_result = records["kind"] == Kind.RESULT
    results = np.empty(int(is_result.sum()), RESULT)
    for name in ("line", "offset", "length", "crc", "file", "id"):
        results[name] = records[name][is_result]
    results["is_error"] = records["code"][is_result] != b""
    counts = np.ones(len(results), bool)
    counts[records["line"][records["kind"] == Kind.REPLACED].astype(np.int64)] = False
    end = None
    if len(records) and records[-1]["kind"] == Kind.END:
        end = int(records[-1]["line"]), records[-1]["key"].tobytes()
    return ShardOutput(path, Shard.parse(job.get("shard") or "1/1"), job, errors, results[counts], end)


def check_one_run(shards: Sequence[ShardOutput]) -> None:
    """Raises MergeError for outputs that can never be parts of one."""
    first = shards[0]
    for other in shards[1:]:
        if other.shard.count != first.shard.count:
            raise MergeError(f"{first.name} and {other.name} are not of one split", hint="name the shards of one run")
        for fact in {**first.job, **other.job}:
            if fact not in OWN_FACTS and first.job.get(fact) != other.job.get(fact):
                raise MergeError(
                    f"{first.name} and {other.name} are of different runs: {fact} is {first.job.get(fact)!r} in one, "
                    f"{other.job.get(fact)!r} in the other",
                    hint="run all shards with the same model and options",
                )
    seen: dict[int, ShardOutput] = {}
    for each in shards:
        if each.shard.index in seen:
            twice = seen[each.shard.index].path
            raise MergeError(f"shard {each.shard} is there twice: {twice} and {each.path}", hint="name each shard once")
        seen[each.shard.index] = each


def missing(shards: Sequence[ShardOutput]) -> Iterator[Problem]:
    """Shards that are not named, and those that are not finished."""
    count = shards[0].shard.count
    absent = sorted(set(range(1, count + 1)) - {each.shard.index for each in shards})
    for index in absent[:MAX_NAMED]:
        yield f"shard {index}/{count} is missing", EXIT_NO_INPUT
    if len(absent) > MAX_NAMED:
        yield f"{len(absent) - MAX_NAMED:,} more shards are missing", EXIT_NO_INPUT
    unfinished = [each for each in shards if each.end is None]
    ends = [each.end for each in shards if each.end is not None]
    for each in unfinished:
        of = ""
        if len(unfinished) == 1 and not absent and ends:  # then the others tell how many it must have
            others = sum(len(other.results) for other in shards if other is not each)
            of = f" of {ends[0][0] - others:,}"
        yield f"{each.name} has {len(each.results):,}{of} lines: run its command again", EXIT_DATA


def other_input(shards: Sequence[ShardOutput]) -> Iterator[Problem]:
    first = next((each for each in shards if each.end is not None), None)
    for each in shards:
        if first is not None and each.end is not None and first.end is not None and each.end != first.end:
            yield (
                f"{first.name} and {each.name} were made from different inputs, of {first.end[0]:,} and "
                f"{each.end[0]:,} lines: run both commands again with the same input",
                EXIT_DATA,
            )


def repeated_ids(shards: Sequence[ShardOutput]) -> Iterator[Problem]:
    """An id that two shards answered: within one, the run itself takes care of it."""
    if shards[0].job.get("duplicates") == "run-each":
        return
    ids = np.concatenate([each.results["id"] for each in shards])
    places = np.flatnonzero(ids.any(axis=1))
    order = places[np.lexsort((ids[places, 1], ids[places, 0]))]
    same = np.flatnonzero((ids[order[1:]] == ids[order[:-1]]).all(axis=1))
    starts = np.cumsum([0] + [len(each.results) for each in shards])
    for at in same[:MAX_NAMED]:
        where = []
        for place in sorted((int(order[at]), int(order[at + 1]))):
            number = int(np.searchsorted(starts, place, "right")) - 1
            each, record = shards[number], shards[number].results[place - starts[number]]
            where.append(f"in line {record['line']:,} (shard {each.shard})")
        yield f"the id {_id_of(each, record)} is {' and '.join(where)}: ids must differ", EXIT_DATA
    if len(same) > MAX_NAMED:
        yield f"{len(same) - MAX_NAMED:,} more ids are there twice", EXIT_DATA


def _id_of(shard: ShardOutput, record: Any) -> str:
    """The id as it stands in the output."""
    path = shard.errors if record["file"] and shard.errors is not None else shard.path
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        line = json.loads(os.pread(file.fileno(), int(record["length"]), int(record["offset"])))
        return repr(line["custom_id"] if "custom_id" in line else line.get("id"))[:100]
    return "of two lines"
