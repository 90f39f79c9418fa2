"""What of an output survived a kill or a power cut, told by its journal."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch.journal import Contents, Kind
from batch.output import OutputFile
from l4tool.core.errors import WriteError

FORCE_HINT = "give the same options as before, choose another output, or --force to start over"


@dataclass(frozen=True)
class Recovered:
    """`num_records` of the journal and `sizes` bytes of each file hold; `num_unsynced` results of them were never known
    to be on the disk."""

    num_records: int
    sizes: list[int]
    num_unsynced: int


def recover(files: Sequence[OutputFile], contents: Contents) -> Recovered:
    """What holds: all up to the last sync, and what matches behind it. Raises WriteError for changed files."""
    records = contents.records
    synced = np.flatnonzero(records["kind"] == Kind.SYNCED)
    good = len_synced = int(synced[-1]) + 1 if len(synced) else 0
    sizes = [int(records[good - 1]["offset"]), int(records[good - 1]["line"])] if good else [0, 0]
    for file, size in zip(files, sizes, strict=False):
        if file.found_bytes() < size:
            raise WriteError(
                f"{file.path} is shorter than its journal says: it was changed, moved or removed since",
                hint="bring it back, or --force to start over",
            )
    for place in range(good, len(records)):
        record = records[place]
        if record["kind"] == Kind.RESULT:
            number, length = int(record["file"]), int(record["length"])
            if number >= len(files) or int(record["offset"]) != sizes[number]:
                break
            if zlib.crc32(files[number].read(sizes[number], length)) != record["crc"]:
                break
            sizes[number] += length
        if record["kind"] != Kind.REPLACED:  # it belongs to the result behind it
            good = place + 1
    if good and records[good - 1]["kind"] == Kind.END:
        for file, size in zip(files, sizes, strict=False):
            if file.found_bytes() != size:
                raise WriteError(f"{file.path} was changed since its run ended", hint=FORCE_HINT)
    results = records["kind"][len_synced:good] == Kind.RESULT
    return Recovered(good, sizes, int(results.sum()))


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two jobs' facts, in words; "" when nothing did."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {_said(old, key)}, is {_said(new, key)}" for key in changed[:3])


def _said(facts: dict[str, Any], key: str) -> str:
    """A value; what is left out of the facts is as it is when nobody asks for it."""
    return repr(facts[key]) if key in facts else "not given"
