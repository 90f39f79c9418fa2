"""The outputs of all shards of one input as one file in input order. Memory: about 100 bytes for each line.

Everything is checked from the journals before the first byte is written; each line's checksum when it is copied.
"""

from __future__ import annotations

import contextlib
import os
import resource
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from batch.journal import CHUNK, journal_path
from batch.shard_outputs import (
    MergeError,
    Problem,
    ShardOutput,
    check_one_run,
    held,
    missing,
    other_input,
    read_shard,
    repeated_ids,
)
from l4tool.core.atomic import part_path, publish, write_errors
from l4tool.core.console import note, table
from l4tool.core.errors import EXIT_ERROR_LINES, EXIT_OK, ChecksumError, InputMissing, UsageError, WriteError

WRITE_BYTES = 2**20
COPIED = np.dtype([("shard", "<u4"), ("line", "<u8"), ("file", "u1"), ("is_error", "?"), ("offset", "<u8"),
                   ("length", "<u4"), ("crc", "<u4")])  # fmt: skip


@dataclass
class Merged:
    """What was written: lines and error lines; `rows` tell it for each shard, `problems` what `partial` put up with."""

    output: Path
    lines: int = 0
    num_errors: int = 0
    rows: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return EXIT_ERROR_LINES if self.num_errors else EXIT_OK

    def as_table(self) -> str:
        total = (
            "all",
            f"{self.lines:,}",
            f"{self.lines - self.num_errors:,}",
            f"{self.num_errors:,}",
            str(self.output),
        )
        return table([*self.rows, total], ("shard", "lines", "answered", "errors", "file"))


def merge(
    outputs: Sequence[Path], target: Path, errors: Path | None = None, partial: bool = False, force: bool = False
) -> Merged:
    """Write the lines of all shards to `target` in input order; with `errors` the error lines there. `partial` writes
    what there is. Raises MergeError, ChecksumError, WriteError, InputMissing, LockHeld, UsageError."""
    _check_targets(outputs, target, errors, force)
    _allow_files(4 * len(outputs) + 100)
    with contextlib.ExitStack() as stack:
        shards = []
        for path in outputs:
            stack.enter_context(held(path))
            shards.append(read_shard(path))
        check_one_run(shards)
        problems = [*missing(shards), *other_input(shards), *repeated_ids(shards)]
        if problems and not partial:
            _refuse(problems)
        merged = Merged(target, problems=[message for message, _ in problems])
        for message in merged.problems:
            note(message)
        lines = _in_order(shards)
        if not partial:
            _check_whole(shards, lines)
        _write(shards, lines, merged, errors, partial)
    return merged


def _allow_files(count: int) -> None:
    """Let this process have that many files open, where the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard)
        )


def _check_targets(outputs: Sequence[Path], target: Path, errors: Path | None, force: bool) -> None:
    taken = {each.resolve() for path in outputs for each in (path, journal_path(path))}
    for path in (target, errors):
        if path is None:
            continue
        if path.resolve() in taken:
            raise UsageError(f"{path} is one of the files named already", hint="choose another file to write to")
        taken.add(path.resolve())
        if not path.resolve().parent.is_dir():
            raise WriteError(f"no such folder: {path.parent}", hint=f"mkdir -p {path.parent}")
        if path.is_dir():
            raise WriteError(f"{path} is a folder", hint="give the name of a file")
        if path.exists() and not force:
            raise WriteError(f"{path} exists", hint="choose another file, or --force to overwrite it")


def _refuse(problems: Sequence[Problem]) -> None:
    """Raises MergeError with all that is wrong."""
    code = max(code for _, code in problems)
    *others, (last, _) = problems
    for message, _ in others:
        note(message)
    raise MergeError(last, hint="--partial writes what there is", exit_code=code)


def _check_whole(shards: Sequence[ShardOutput], lines: np.ndarray) -> None:
    """Every line of the input is there once."""
    assert shards[0].end is not None
    wanted, numbers = shards[0].end[0], lines["line"][lines["line"] > 0]
    if len(numbers) == wanted and (np.diff(numbers) > 0).all():
        return
    raise MergeError(
        f"the shards have {len(numbers):,} lines, the input has {wanted:,}",
        hint="run the commands of all shards again with the same input; --partial writes what there is",
    )


def _in_order(shards: Sequence[ShardOutput]) -> np.ndarray:
    """All results (COPIED) in input order; those whose lines left the input come last."""
    lines = np.empty(sum(len(each.results) for each in shards), COPIED)
    at = 0
    for number, each in enumerate(shards):
        part = lines[at : at + len(each.results)]
        part["shard"] = number
        for name in ("line", "file", "is_error", "offset", "length", "crc"):
            part[name] = each.results[name]
        at += len(part)
    return lines[np.argsort(np.where(lines["line"] > 0, lines["line"], np.iinfo(np.uint64).max), kind="stable")]


def _write(
    shards: Sequence[ShardOutput], lines: np.ndarray, merged: Merged, errors: Path | None, partial: bool
) -> None:
    """Copy the lines, in order, into `.part` files that then take their names."""
    targets = [merged.output] if errors is None else [merged.output, errors]
    counts = np.zeros((len(shards), 2), np.int64)  # answers and error lines
    try:
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(_create(target)) for target in targets]
            for shard, is_error, data in _read(shards, lines, partial):
                number = 1 if is_error and errors is not None else 0
                with write_errors(targets[number]):
                    parts[number].write(data)
                counts[shard, int(is_error)] += 1
            for target, part in zip(targets, parts, strict=True):
                with write_errors(target):
                    part.flush()
                    os.fsync(part.fileno())
        for target in targets:
            with write_errors(target):
                publish(part_path(target), target)
    except BaseException:
        for target in targets:
            part_path(target).unlink(missing_ok=True)
        raise
    if gone := int((lines["line"] == 0).sum()):
        note(f"{gone:,} lines answer lines that the input does not have any more; they stand at the end")
    merged.lines, merged.num_errors = int(counts.sum()), int(counts[:, 1].sum())
    for each, (answered, failed) in zip(shards, counts.tolist(), strict=True):
        merged.rows.append((str(each.shard), f"{answered + failed:,}", f"{answered:,}", f"{failed:,}", str(each.path)))


def _create(target: Path) -> BinaryIO:
    with write_errors(target):
        return open(part_path(target), "wb", buffering=WRITE_BYTES)


def _read(shards: Sequence[ShardOutput], lines: np.ndarray, partial: bool) -> Iterator[tuple[int, bool, bytes]]:
    """(shard, whether it is an error, the line) of each of `lines`. Raises ChecksumError; with `partial` a line that a
    killed run had on record, but not yet in its file, is left out."""
    with contextlib.ExitStack() as stack:
        files = [[_open(stack, path) for path in (each.path, each.errors) if path is not None] for each in shards]
        for first in range(0, len(lines), CHUNK):
            for shard, line, file, is_error, offset, length, crc in lines[first : first + CHUNK].tolist():
                data = os.pread(files[shard][file], length, offset)
                if zlib.crc32(data) == crc and len(data) == length:
                    yield shard, is_error, data
                elif not partial or shards[shard].end is not None:
                    raise ChecksumError(
                        f"line {line:,} of {shards[shard].name} is not what its journal says: it was changed",
                        hint="bring the file back, or run that shard again with --force",
                    )


def _open(stack: contextlib.ExitStack, path: Path) -> int:
    try:
        return stack.enter_context(open(path, "rb", buffering=0)).fileno()
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}") from None
