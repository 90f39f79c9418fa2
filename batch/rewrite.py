"""Writing the finished output anew: in input order, or without lines that were replaced. Bounded memory, crash-safe.

New files and their new journal are written under `.part` names and synced; then the old journal says REWRITE; then
they take their places, the journal last. After a crash before REWRITE nothing has happened; after it `roll_forward`
does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from batch.journal import CHUNK, Contents, Journal, Kind, ResultRecord, pack_other, read_journal
from batch.output import OutputFile
from l4tool.core.atomic import fsync_dir, part_path, publish, write_errors

BUFFER_BYTES = 4 * 2**20


def plan(contents: Contents, counts: bytes | bytearray, line_now: Sequence[int], in_order: bool) -> np.ndarray | None:
    """Places of the result records that count, in the order in which their lines shall stand; None when they already
    stand so. Lines that left the input come last, as they were."""
    places = np.flatnonzero(contents.records["kind"] == Kind.RESULT)
    kept = np.frombuffer(bytes(counts), np.uint8).astype(bool)
    places = places[kept]
    if in_order:
        lines = np.frombuffer(line_now, np.uint64)[kept].copy()  # type: ignore[call-overload]
        lines[lines == 0] = np.iinfo(np.uint64).max
        order = np.argsort(lines, kind="stable")
        if (np.diff(order) > 0).all() and kept.all():
            return None
        return places[order]
    return None if kept.all() else places


def is_moved(contents: Contents, line_now: Sequence[int]) -> bool:
    """True when lines stand elsewhere in the input than the journal says."""
    results = contents.records["kind"] == Kind.RESULT
    lines = np.frombuffer(line_now, np.uint64)  # type: ignore[call-overload]
    return bool((contents.records["line"][results] != lines).any())


def renumber(
    files: Sequence[OutputFile], journal: Journal, contents: Contents, line_now: Sequence[int], end: bytes
) -> None:
    """Write the journal anew with the lines' numbers as they are now; the files stay. Raises WriteError."""
    layout = np.flatnonzero(contents.records["kind"] == Kind.RESULT)
    log = _Part(part_path(journal.path))
    try:
        log.write(contents.head())
        for record in _records(contents, layout, line_now):
            log.write(record.pack())
        sizes = [file.size for file in files] + [0]
        log.write(pack_other(Kind.SYNCED, line=sizes[1], offset=sizes[0]) + end)
        log.finish()
    finally:
        log.close()
    with write_errors(journal.path):
        publish(log.path, journal.path)


def rewrite(
    files: Sequence[OutputFile], journal: Journal, contents: Contents, layout: np.ndarray,
    line_now: Sequence[int], end: bytes,
) -> None:  # fmt: skip
    """Write files and journal anew in the order of `layout` (from `plan`) and put them in place. Raises WriteError."""
    header = contents.head()
    parts = [_Part(part_path(file.path)) for file in files]
    log = _Part(part_path(journal.path))
    try:
        log.write(header)
        for record in _records(contents, layout, line_now):
            part = parts[record.file]
            data = files[record.file].read(record.offset, record.length)
            log.write(dataclasses.replace(record, offset=part.size).pack())
            part.write(data)
        sizes = [part.size for part in parts] + [0]
        log.write(pack_other(Kind.SYNCED, line=sizes[1], offset=sizes[0]) + end)
        for part in (*parts, log):
            part.finish()
    finally:
        for part in (*parts, log):
            part.close()
    for folder in {part.path.parent for part in (*parts, log)}:
        with write_errors(folder):
            fsync_dir(folder)
    journal.append(pack_other(Kind.REWRITE))
    journal.sync()
    roll_forward([file.path for file in files], journal.path)


def _records(contents: Contents, layout: np.ndarray, line_now: Sequence[int]) -> Iterator[ResultRecord]:
    number_of = np.cumsum(contents.records["kind"] == Kind.RESULT) - 1  # place → number among the results
    for first in range(0, len(layout), CHUNK):
        places = layout[first : first + CHUNK]
        for row, number in zip(contents.records[places], number_of[places].tolist(), strict=True):
            yield ResultRecord.unpack(row, line_now[number])


def roll_forward(paths: Sequence[Path], journal_path: Path) -> bool:
    """Finish a rewriting that was decided on; False when there is none."""
    contents = read_journal(journal_path)
    if contents is None or not len(contents.records) or contents.records[-1]["kind"] != Kind.REWRITE:
        return False
    for path in (*paths, journal_path):
        with write_errors(path):
            if part_path(path).exists():  # gone: it has its place already
                os.replace(part_path(path), path)
            fsync_dir(path.parent)  # one by one: on no disk may the journal be ahead of its files
    return True


class _Part:
    """A file being written under its `.part` name. Raises WriteError."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        with write_errors(path):
            self._file = open(path, "wb", buffering=BUFFER_BYTES)

    def write(self, data: bytes) -> None:
        with write_errors(self.path):
            self._file.write(data)
        self.size += len(data)

    def finish(self) -> None:
        with write_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
