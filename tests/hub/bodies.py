"""Sending bodies: whole files or ranges of them with sendfile, at a limited rate, or spoilt by a fault."""

from __future__ import annotations

import io
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from tests.hub.faults import Fault

STEP_BYTES = 2**23
SLOW_PIECES_PER_S = 50


class Cut(ConnectionError):
    """The server ends the connection on purpose."""


@dataclass(frozen=True)
class ByteRange:
    """Half-open [start, stop) of a file of `size` bytes. `asked` is False where the whole file was meant."""

    start: int
    stop: int
    size: int
    asked: bool

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The range of a Range header; what cannot be parsed counts as not asked for; None: not satisfiable (416)."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", header or "")
    if not match or match.groups() == ("", ""):
        return ByteRange(0, size, size, asked=False)
    first, last = match.groups()
    if not first:
        return ByteRange(max(0, size - int(last)), size, size, asked=True) if int(last) and size else None
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return ByteRange(start, stop, size, asked=True) if start < min(stop, size) else None


class Sender:
    """Writes one body to one connection and tells `on_sent` how many bytes went out.

    `rate()` is the limit in bytes/s at that moment; None: unlimited.
    """

    def __init__(
        self,
        connection: socket.socket,
        closing: threading.Event,
        rate: Callable[[], int | None],
        on_sent: Callable[[int], None],
    ) -> None:
        self.connection, self.closing, self.rate, self.on_sent = connection, closing, rate, on_sent

    def send(self, source: BinaryIO, start: int, count: int, fault: Fault | None) -> None:
        """`count` bytes of `source` from `start`, with `fault` done to them.

        Raises Cut where the connection is to be closed.
        """
        kind = fault.kind if fault else None
        if fault and kind in ("cut", "reset", "stall"):
            self._bytes(source, start, min(count, fault.after_bytes))
            if kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if kind == "stall" and not self.closing.wait(fault.seconds):
                self._bytes(source, start + fault.after_bytes, count - fault.after_bytes)
                return
            raise Cut
        if fault and kind == "wrong-bytes" and start <= fault.after_bytes < start + count:
            before = fault.after_bytes - start
            self._bytes(source, start, before)
            source.seek(fault.after_bytes)
            self._bytes(io.BytesIO(bytes([source.read(1)[0] ^ 0x40])), 0, 1)
            self._bytes(source, fault.after_bytes + 1, count - before - 1)
            return
        if fault and kind == "slow":
            slow = fault.bytes_per_s
            self.rate = lambda: slow
        self._bytes(source, start, count)

    def _bytes(self, source: BinaryIO, start: int, count: int) -> None:
        sent, due_s = 0, time.monotonic()
        while sent < count and not self.closing.is_set():
            if (rate := self.rate()) is None:
                sent += self._at_once(source, start + sent, count - sent)
                continue
            source.seek(start + sent)
            piece = source.read(min(max(1, rate // SLOW_PIECES_PER_S), count - sent))
            self.connection.sendall(piece)
            self.on_sent(len(piece))
            sent += len(piece)
            due_s = max(due_s + len(piece) / rate, time.monotonic() - 1 / SLOW_PIECES_PER_S)
            self.closing.wait(max(0, due_s - time.monotonic()))

    def _at_once(self, source: BinaryIO, start: int, count: int) -> int:
        """A large step; returns its size."""
        count = min(STEP_BYTES, count)
        if isinstance(source, io.BytesIO):
            self.connection.sendall(source.getbuffer()[start : start + count])
            sent = count
        elif not (sent := self.connection.sendfile(source, start, count)):
            raise Cut
        self.on_sent(sent)
        return sent
