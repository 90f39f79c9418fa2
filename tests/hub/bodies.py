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

PIECE_BYTES = 2**20
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
    """Writes one body to one connection and tells `on_sent` how many bytes went out."""

    def __init__(self, connection: socket.socket, closing: threading.Event, on_sent: Callable[[int], None]) -> None:
        self.connection, self.closing, self.on_sent = connection, closing, on_sent

    def send(self, source: BinaryIO, start: int, count: int, rate: int | None, fault: Fault | None) -> None:
        """`count` bytes of `source` from `start`, at `rate` bytes/s (None: unlimited), with `fault` done to them.

        Raises Cut where the connection is to be closed.
        """
        kind = fault.kind if fault else None
        if fault and kind in ("cut", "reset", "stall"):
            self._bytes(source, start, min(count, fault.after_bytes), rate)
            if kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if kind == "stall" and not self.closing.wait(fault.seconds):
                self._bytes(source, start + fault.after_bytes, count - fault.after_bytes, rate)
                return
            raise Cut
        if fault and kind == "wrong-bytes" and start <= fault.after_bytes < start + count:
            before = fault.after_bytes - start
            self._bytes(source, start, before, rate)
            source.seek(fault.after_bytes)
            self._bytes(io.BytesIO(bytes([source.read(1)[0] ^ 0x40])), 0, 1, rate)
            self._bytes(source, fault.after_bytes + 1, count - before - 1, rate)
            return
        self._bytes(source, start, count, fault.bytes_per_s if fault and kind == "slow" else rate)

    def _bytes(self, source: BinaryIO, start: int, count: int, rate: int | None) -> None:
        if rate is None and not isinstance(source, io.BytesIO):
            self._sendfile(source, start, count)
            return
        source.seek(start)
        piece_bytes = max(1, rate // SLOW_PIECES_PER_S) if rate else PIECE_BYTES
        began, sent = time.monotonic(), 0
        while sent < count and not self.closing.is_set():
            piece = source.read(min(piece_bytes, count - sent))
            self.connection.sendall(piece)
            sent += len(piece)
            self.on_sent(len(piece))
            if rate and (ahead_s := sent / rate - (time.monotonic() - began)) > 0:
                self.closing.wait(ahead_s)

    def _sendfile(self, source: BinaryIO, start: int, count: int) -> None:
        sent = 0
        while sent < count and not self.closing.is_set():
            step = self.connection.sendfile(source, start + sent, min(8 * PIECE_BYTES, count - sent))
            if not step:
                raise Cut
            sent += step
            self.on_sent(step)
