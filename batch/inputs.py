"""Inputs of every kind as a stream of plain bytes: files, pipes and URLs, compressed or not (content decides)."""

from __future__ import annotations

import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from batch.jsonl import LineReader, RawLine, count_lines
from batch.remote import is_url, local_path, open_remote
from l4tool.core.errors import InputMissing, L4Error, UsageError

HEAD_BYTES = 16
READ_BYTES = 2**20
_ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_OTHER_ARCHIVES = {
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"PK\x03\x04": "zip",
    rb"7z\xbc\xaf\x27\x1c": "7z",
}


class InputBroken(L4Error):
    """An input that cannot be read on from some point; exit code 65."""


@dataclass(frozen=True)
class Archive:
    """A way of compressing. `chunk_bytes` are decoded at a time: what they can grow to is tens of MB at most."""

    name: str
    chunk_bytes: int
    decoder: Callable[[], Any]


def _zstd_decoder() -> Any:
    try:
        from compression.zstd import ZstdDecompressor  # type: ignore[import-not-found, unused-ignore]

        return ZstdDecompressor()
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            "the input is compressed with zstd, which needs another package", hint="pip install 'l4tool[zstd]'"
        ) from None
    return zstandard.ZstdDecompressor().decompressobj()


GZIP = Archive("gzip", 2**14, lambda: zlib.decompressobj(wbits=31))  # a byte makes at most 1032
ZSTD = Archive("zstd", 2**10, _zstd_decoder)  # 4 bytes make at most a block of 128 KiB


def find_archive(head: bytes, name: str) -> Archive | None:
    """What a file that begins with `head` is compressed with. Raises InputBroken for what is not read here."""
    if head.startswith(b"\x1f\x8b"):
        return GZIP
    if head.startswith(b"\x28\xb5\x2f\xfd") or _ZSTD_SKIPPABLE.match(head):
        return ZSTD
    for magic, kind in _OTHER_ARCHIVES.items():
        if re.match(magic, head):
            raise InputBroken(f"{name} is a {kind} archive", hint="unpack it; gzip and zstd are read as they are")
    return None


class Input(Protocol):
    """One input. `folder` is where relative paths of pictures begin, None where there is no such place. One that
    `is_stream` can be opened only once."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def is_stream(self) -> bool: ...

    def open(self) -> BinaryIO:
        """Its lines as plain bytes. Raises InputMissing, AccessDenied, NetworkError, InputBroken."""
        ...

    def count_lines(self, max_bytes: int) -> int | None:
        """How many lines, an estimate beyond `max_bytes`; None where that would cost as much as reading it."""
        ...

    def is_file(self, path: Path) -> bool:
        """True when `path` is this very file."""
        ...


def open_input(what: str | Path) -> Input:
    """What the command line names: `-`, a path, a URL. Nothing is opened yet."""
    text = str(what)
    if text == "-":
        return Stdin()
    if isinstance(what, str) and is_url(what):
        local = local_path(what)
        return RemoteInput(what) if local is None else LocalInput(local)
    return LocalInput(Path(what))


@dataclass(frozen=True)
class LocalInput:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        """Beside the input; a pipe has no folder."""
        return Path.cwd() if self.is_stream else self.path.absolute().parent

    @property
    def is_stream(self) -> bool:
        return not self.path.is_file()

    def open(self) -> BinaryIO:
        try:
            file = open(self.path, "rb", buffering=READ_BYTES)
        except OSError as error:
            raise InputMissing(f"cannot read {self.path}: {error.strerror}") from None
        return decompressed(file, self.name)

    def count_lines(self, max_bytes: int) -> int | None:
        with open(self.path, "rb") as file:
            if find_archive(file.read(HEAD_BYTES), self.name) is not None:
                return None
        return count_lines(self.path, max_bytes)

    def is_file(self, path: Path) -> bool:
        return path.exists() and self.path.exists() and path.samefile(self.path)


@dataclass(frozen=True)
class Stdin:
    name: str = "-"
    is_stream: bool = True

    @property
    def folder(self) -> Path:
        return Path.cwd()

    def open(self) -> BinaryIO:
        return decompressed(open(0, "rb", closefd=False), "standard input")

    def count_lines(self, max_bytes: int) -> int | None:
        return None

    def is_file(self, path: Path) -> bool:
        return path.exists() and os.path.samestat(os.fstat(0), path.stat())


@dataclass(frozen=True)
class RemoteInput:
    name: str
    folder: None = None
    is_stream: bool = False

    def open(self) -> BinaryIO:
        return decompressed(as_file(open_remote(self.name)), self.name)

    def count_lines(self, max_bytes: int) -> int | None:
        return None

    def is_file(self, path: Path) -> bool:
        return False


class _Chunks(io.RawIOBase):
    """A raw file over an iterator of bytes. Closing it closes the iterator."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed and hasattr(self._chunks, "close"):
            self._chunks.close()
        super().close()


def as_file(chunks: Iterator[bytes]) -> BinaryIO:
    """Chunks of bytes as a buffered binary file."""
    return io.BufferedReader(_Chunks(chunks), READ_BYTES)


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """`file`, or what it holds when it begins like an archive; pipes too. The result owns it."""
    try:
        head = b""
        while len(head) < HEAD_BYTES and (more := file.read(HEAD_BYTES - len(head))):
            head += more
        archive = find_archive(head, name)
        if archive is not None:
            archive.decoder()  # says now that a package is missing
            return as_file(_decode(file, head, archive, name))
        if _is_regular(file):
            file.seek(0)
            return file
        return as_file(_rest_of(file, head))
    except OSError as error:
        file.close()
        raise InputMissing(f"cannot read {name}: {error.strerror}") from None
    except BaseException:
        file.close()
        raise


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, AttributeError):  # not a file of the system
        return False


def _rest_of(file: BinaryIO, head: bytes) -> Iterator[bytes]:
    with file:
        yield head
        read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        while chunk := read(READ_BYTES):
            yield chunk


def _decode(file: BinaryIO, head: bytes, archive: Archive, name: str) -> Iterator[bytes]:
    """An archive's content: any number of members, one after the other. Raises InputBroken behind what is good."""
    data = head
    with file:
        while data := data.lstrip(b"\0") or file.read(archive.chunk_bytes):  # zeros may pad archives
            decoder = archive.decoder()
            while not decoder.eof:
                if not data and not (data := file.read(archive.chunk_bytes)):
                    raise InputBroken(
                        f"{name} is cut off: its {archive.name} stream has no end",
                        hint="bring the whole file and run the same command again: it carries on",
                    )
                try:
                    decoded = decoder.decompress(data)
                except Exception as error:  # zlib.error, ZstdError of either package
                    where = f"before byte {file.tell():,}" if _is_regular(file) else ""
                    raise InputBroken(
                        f"{name} is damaged: not {archive.name} any more {where}".rstrip(),
                        hint="bring a sound file and run the same command again: it carries on",
                    ) from error
                data = decoder.unused_data if decoder.eof else b""
                yield decoded


class Lines:
    """A reader's lines up to the end, or to where the input breaks: then `error` says why, to be raised once the lines
    before are answered."""

    def __init__(self, reader: LineReader, name: str) -> None:
        self.reader, self.name = reader, name
        self.error: L4Error | None = None

    def __iter__(self) -> Iterator[RawLine]:
        try:
            yield from self.reader
        except L4Error as error:
            self.error = error
        except OSError as error:
            self.error = InputBroken(f"cannot read on in {self.name}: {error.strerror or error}")

    def raise_if_broken(self) -> None:
        if self.error is not None:
            raise self.error
