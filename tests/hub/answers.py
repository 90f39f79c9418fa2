"""How answers are written: errors as the hub words them, JSON, files with ranges; each spoilt where a fault says so."""

from __future__ import annotations

import gzip
import io
import json
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, BinaryIO

from tests.hub.bodies import ByteRange, Cut, Sender, parse_range
from tests.hub.faults import BODY_KINDS, Fault
from tests.hub.repos import StoredFile

if TYPE_CHECKING:
    from tests.hub.server import HubServer, Request

JSON = "application/json; charset=utf-8"
COMPRESSIBLE = (".json", ".txt", ".md", ".jinja", "LICENSE")
GZIP_FROM_BYTES = 1000
LOGIN_PAGE = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"


class Refused(Exception):
    """An error answer: status, X-Error-Code (may be None) and X-Error-Message."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class Done(Exception):
    """An answer was given, there is nothing left to do."""


class Answers(BaseHTTPRequestHandler):
    """One connection. `hub` and `port_name` are set on a subclass per server and port."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "TestHub"
    hub: HubServer
    port_name: str
    request_log: Request

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in `hub.requests`; stderr stays quiet."""

    def strike(self, where: str, path: str) -> None:
        """Faults that take the place of an answer. Raises what ends the request."""
        fault = self.hub.faults.strike(where, self.command, path, "status", "drop", "hang", "html")
        if fault is None:
            return
        if fault.kind == "status":
            retry = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
            raise Refused(fault.status, None, f"Test fault {fault.status}", retry)
        if fault.kind == "html":
            self.answer(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
            raise Done
        if fault.kind == "hang":
            self.hub.closing.wait(fault.seconds)
        raise Cut

    def refuse(self, refused: Refused) -> None:
        code = {"X-Error-Code": refused.code} if refused.code else {}
        headers = {**refused.headers, **code, "X-Error-Message": refused.message, "Content-Type": JSON}
        self.answer(refused.status, headers, json.dumps({"error": refused.message}).encode())

    def send_json(self, value: Any, headers: dict[str, str] | None = None, fault_path: str = "") -> None:
        """`fault_path` is what faults call this request."""
        fault = self.hub.faults.strike("api", self.command, fault_path, *BODY_KINDS)
        self.answer(200, {"Content-Type": JSON, **(headers or {})}, json.dumps(value).encode(), fault)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None) -> None:
        """A whole answer from memory."""
        if fault and fault.kind == "short":
            body = body[: len(body) - fault.after_bytes]
        self.start(status, headers, len(body))
        self.send_body(io.BytesIO(body), 0, len(body), fault)

    def send_file(self, file: StoredFile, where: str, headers: dict[str, str]) -> None:
        """A file or the range of it that the client asked for; small texts are compressed for clients that take it."""
        asked = parse_range(self.headers.get("Range"), file.size)
        condition = self.headers.get("If-Range")
        if condition and condition != headers["ETag"]:
            asked = parse_range(None, file.size)
        if asked is None:
            self.answer(416, {"Content-Range": f"bytes */{file.size}"})
        elif self._takes_gzip(file):
            self._send_compressed(file, headers)
        else:
            covered = range(asked.start, asked.stop)
            fault = self.hub.faults.strike(where, self.command, file.path, *BODY_KINDS, has_byte=covered)
            self._send_range(file, asked, headers, fault)

    def _send_range(self, file: StoredFile, asked: ByteRange, headers: dict[str, str], fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if kind in ("no-range", "other-range"):
            asked = ByteRange(0, file.size, file.size, asked=asked.asked and kind == "other-range")
        count = asked.stop - asked.start
        if fault and kind == "short":
            count -= min(fault.after_bytes, count)
        ranges = {} if kind == "no-range" else {"Accept-Ranges": "bytes"}
        if asked.asked:
            ranges["Content-Range"] = asked.content_range
        self.start(206 if asked.asked else 200, headers | ranges, None if kind == "no-length" else count)
        with open(file.source, "rb", buffering=0) as source:
            self.send_body(source, 0 if kind == "wrong-range" else asked.start, count, fault)

    def _takes_gzip(self, file: StoredFile) -> bool:
        accepted = "gzip" in (self.headers.get("Accept-Encoding") or "") and self.command == "GET"
        return accepted and not file.sha256 and file.size >= GZIP_FROM_BYTES and file.path.endswith(COMPRESSIBLE)

    def _send_compressed(self, file: StoredFile, headers: dict[str, str]) -> None:
        """As the hub does: chunked, no Content-Length, a weak ETag, ranges ignored."""
        body = gzip.compress(file.source.read_bytes())
        headers = headers | {"ETag": f"W/{headers['ETag']}", "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        self.start(200, headers | {"Transfer-Encoding": "chunked"}, None)
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        self.send_body(io.BytesIO(chunked), 0, len(chunked), None)

    def start(self, status: int, headers: dict[str, str], length: int | None) -> None:
        """Status line and headers. Without a length the body ends by itself (chunked) or with the connection."""
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        elif "Transfer-Encoding" not in headers:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_body(self, source: BinaryIO, start: int, count: int, fault: Fault | None) -> None:
        """Faults of bodies are done here; the rate limit is the one of storage ports."""
        if self.command != "HEAD":
            sender = Sender(self.connection, self.hub.closing, self._rate, self.request_log.add)
            sender.send(source, start, count, fault)

    def _rate(self) -> int | None:
        return self.hub.rate if self.port_name != "hub" else None
