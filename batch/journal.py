"""The journal beside an output file: which input line has its result where, and what is known to be on the disk.

Layout: MAGIC, the header's length, the header (JSON: the facts of the job), then records of RECORD.itemsize bytes, each
with its own CRC-32, so that a torn or unwritten one is recognised. A result's record is written before its line: after
a kill the line counts if its bytes match the record's CRC.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import time
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from l4tool.core.atomic import write_errors
from l4tool.core.errors import LockHeld, WriteError

SUFFIX = ".journal"
MAGIC = b"l4tool batch journal 1\n"
POLL_S = 1.0
NO_KEY = bytes(16)
MAX_COUNT = 2**32 - 1
CHUNK = 2**14  # records checked at a time


class Kind(IntEnum):
    RESULT = 1  # a line of the output (file 0) or of the error file (file 1)
    REPLACED = 2  # the result whose number is in `line` counts no more
    SYNCED = 3  # `offset` bytes of the output and `line` bytes of the error file are on the disk
    REWRITE = 4  # the `.part` files beside are complete and take the places of the files
    END = 5  # `line` input lines in all; `key` is the digest of their keys in order


RECORD = np.dtype(
    [
        ("kind", "u1"), ("file", "u1"), ("code", "S22"), ("key", "<u8", 2), ("id", "<u8", 2), ("line", "<u8"),
        ("offset", "<u8"), ("length", "<u4"), ("crc", "<u4"), ("prompt_tokens", "<u4"), ("completion_tokens", "<u4"),
        ("images", "<u4"), ("check", "<u4"),
    ]
)  # fmt: skip
_PACK = struct.Struct("<BB22s16s16sQQIIIII")
_CHECK = struct.Struct("<I")
assert _PACK.size + _CHECK.size == RECORD.itemsize


@dataclass(slots=True)  # not frozen: that costs a microsecond for every line
class ResultRecord:
    """One result: `line` is the input line's number (0 when the input has it no more), `code` the error's ("" for an
    answer), `file` 1 for the error file, `id` 16 bytes of hash (NO_KEY for a line without one)."""

    key: bytes
    id: bytes
    line: int
    file: int
    offset: int
    length: int
    crc: int
    code: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0

    def pack(self) -> bytes:
        return _checked(
            _PACK.pack(
                Kind.RESULT, self.file, self.code.encode()[:22], self.key, self.id, self.line, self.offset, self.length,
                self.crc, min(self.prompt_tokens, MAX_COUNT), min(self.completion_tokens, MAX_COUNT),
                min(self.images, MAX_COUNT),
            )
        )  # fmt: skip

    @classmethod
    def unpack(cls, row: Any, line: int) -> ResultRecord:
        """From a row of RECORD, with the line's number as it is now."""
        return cls(
            row["key"].tobytes(), row["id"].tobytes(), line, int(row["file"]), int(row["offset"]), int(row["length"]),
            int(row["crc"]), row["code"].decode(), int(row["prompt_tokens"]),
            int(row["completion_tokens"]), int(row["images"]),
        )  # fmt: skip


def pack_other(kind: Kind, line: int = 0, offset: int = 0, key: bytes = NO_KEY) -> bytes:
    """A record that is not a result."""
    return _checked(_PACK.pack(kind, 0, b"", key, NO_KEY, line, offset, 0, 0, 0, 0, 0))


def _checked(packed: bytes) -> bytes:
    return packed + _CHECK.pack(zlib.crc32(packed))


@dataclass(frozen=True)
class Contents:
    """A journal as it was found: the sound records (RECORD) and where they begin in the file."""

    header: dict[str, Any]
    records: np.ndarray
    start: int
    mapped: mmap.mmap | None = None

    def let_go(self) -> None:
        """Give the pages of the mapped file back; they come again when they are looked at."""
        if self.mapped is not None:
            self.mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def num_bytes(self) -> int:
        """Length of the sound part."""
        return self.start + len(self.records) * RECORD.itemsize

    def head(self) -> bytes:
        """What stands before the records."""
        return _head(self.header)


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + SUFFIX)


def read_journal(path: Path) -> Contents | None:
    """Everything sound in a journal; None when there is none, or not even its header was finished.

    Raises WriteError for a file that is something else.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(MAGIC) + 4)
            raw = file.read(int.from_bytes(head[len(MAGIC) :], "little"))
            if head[: len(MAGIC)] != MAGIC[: len(head)]:
                raise WriteError(f"{path} is not a journal of this program", hint="choose another output file")
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WriteError(f"cannot read {path}: {error.strerror}") from None
    try:
        header = json.loads(raw)
    except ValueError:
        return None  # a header that never reached the disk: no record can have
    count = (size - start) // RECORD.itemsize
    if not count:
        return Contents(header, np.empty(0, RECORD), start)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), start + count * RECORD.itemsize, access=mmap.ACCESS_READ)
    records = np.frombuffer(mapped, RECORD, count, start)  # mapped: a million records are 96 MB
    contents = Contents(header, records[: _num_sound(records)], start, mapped)
    contents.let_go()
    return contents


def _num_sound(records: np.ndarray) -> int:
    """How many records match their check, up to the first that does not."""
    size = RECORD.itemsize
    for first in range(0, len(records), CHUNK):
        data = records[first : first + CHUNK].tobytes()
        for place in range(0, len(data), size):
            if zlib.crc32(data[place : place + size - 4]) != int.from_bytes(
                data[place + size - 4 : place + size], "little"
            ):
                return first + place // size
    return len(records)


def _head(header: dict[str, Any]) -> bytes:
    raw = json.dumps(header, ensure_ascii=False).encode()
    return MAGIC + len(raw).to_bytes(4, "little") + raw


class Journal:
    """An open journal, locked for this process. Raises WriteError; LockHeld when another run has it."""

    def __init__(self, path: Path, wait: bool = False) -> None:
        self.path = path
        self.num_results = 0  # RESULT records, also those that were replaced
        self._fd = _open_locked(path, wait)

    def begin(self, header: dict[str, Any]) -> None:
        """Empty the journal and start it with a header."""
        with write_errors(self.path):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            self.append(_head(header))
            os.fsync(self._fd)
        self.num_results = 0

    def carry_on(self, contents: Contents) -> None:
        """Go on behind the records of `contents`."""
        with write_errors(self.path):
            os.ftruncate(self._fd, contents.num_bytes)
            os.lseek(self._fd, 0, os.SEEK_END)
        self.num_results = int((contents.records["kind"] == Kind.RESULT).sum())

    def append(self, packed: bytes) -> None:
        """One or more packed records (or the head), whole or not at all."""
        view = memoryview(packed)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self.take_back(len(packed) - len(view))
            with write_errors(self.path):  # entered only now: this is the hot path
                raise error

    def take_back(self, num_bytes: int) -> bool:
        """Cut off the last `num_bytes` again: their line could not be written. False where that cannot be done."""
        try:
            os.ftruncate(self._fd, os.lseek(self._fd, -num_bytes, os.SEEK_CUR))
        except OSError:
            return False
        return True

    def sync(self) -> None:
        with write_errors(self.path):
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_locked(path: Path, wait: bool) -> int:
    """A descriptor that holds the kernel's lock on the file which has that name now."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}", hint="choose another output file") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if not wait:
                raise LockHeld(
                    f"another run is writing {path.with_name(path.name.removesuffix(SUFFIX))}",
                    hint="wait for it (--wait does), or choose another output",
                ) from None
            time.sleep(POLL_S)
            continue
        except OSError as error:
            os.close(fd)
            raise WriteError(f"cannot lock {path}: {error.strerror}", hint="choose another file system") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # its owner put a new journal in its place between our open and our lock
