"""Pictures from the web: each hop resolved once, checked, and connected to exactly the address that was checked.

The HTTP is http.client's; it follows no redirects, keeps no cookies and knows no proxies, which would undo the check.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from urllib.parse import urljoin

from batch.schema import LineError
from batch.web_addresses import Address, Target, UrlPolicy, parse_address, parse_url, refuse
from l4tool.core.sizes import format_bytes

DEFAULT_MAX_BYTES = 20 * 2**20
MAX_REDIRECTS = 5
MAX_ADDRESSES = 4  # tried one after the other when a connection fails
PARALLEL_FETCHES = 8
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    "User-Agent": "l4tool-batch",
    "Connection": "close",
}

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True)
class UrlLimits:
    """Of one picture: bytes, seconds from first to last, and seconds without any byte."""

    max_bytes: int = DEFAULT_MAX_BYTES
    total_s: float = 30.0
    stall_s: float = 10.0


def system_resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system knows them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class UrlFetcher:
    """Fetches pictures for any number of threads, at most PARALLEL_FETCHES at a time."""

    def __init__(
        self, policy: UrlPolicy, limits: UrlLimits | None = None, resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self._policy, self.limits, self._resolve = policy, limits or UrlLimits(), resolve
        self._given_tls = tls
        self._slots = threading.BoundedSemaphore(PARALLEL_FETCHES)
        self._resolvers = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="resolve")
        self._open: set[_TimedSocket] = set()
        self._is_closed = False

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or ssl.create_default_context()  # reading the certificates takes a while

    def fetch(self, url: str, deadline_s: float = float("inf")) -> bytes:
        """A picture's bytes, not looked at yet, by `deadline_s` (monotonic clock). Raises LineError."""
        target = parse_url(url)
        self._policy.check_target(target)  # what is refused does not wait for a slot
        wait_s = min(self.limits.total_s, deadline_s - time.monotonic())
        if wait_s <= 0 or not self._slots.acquire(timeout=wait_s):
            raise _failed(target, "no time was left for it")
        try:
            return self._follow(target, min(deadline_s, time.monotonic() + self.limits.total_s))
        finally:
            self._slots.release()

    def close(self) -> None:
        """End what is being fetched, with errors; nothing is fetched any more."""
        self._is_closed = True
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        for stream in list(self._open):
            stream.interrupt()

    def _follow(self, target: Target, deadline_s: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._ask(target, deadline_s)
            if isinstance(answer, bytes):
                return answer
            following = parse_url(answer)
            if (target.scheme, following.scheme) == ("https", "http"):
                raise refuse(f"{target.host} redirects from https to http")
            target = following
        raise _failed(target, f"more than {MAX_REDIRECTS} redirects")

    def _ask(self, target: Target, deadline_s: float) -> bytes | str:
        """One hop: the body, or where it redirects to."""
        self._policy.check_target(target)
        addresses = self._addresses(target, deadline_s)
        self._policy.check_addresses(target, addresses)
        try:
            with self._connect(target, addresses[:MAX_ADDRESSES], deadline_s) as stream:
                self._open.add(stream)
                try:
                    return self._exchange(target, stream)
                finally:
                    self._open.discard(stream)
        except TimeoutError:
            raise _failed(target, "it takes too long") from None
        except ssl.SSLCertVerificationError as error:
            raise _failed(target, f"its certificate is not valid: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failed(target, str(error)[:200] or type(error).__name__) from None

    def _addresses(self, target: Target, deadline_s: float) -> list[Address]:
        if target.address is not None:
            return [target.address]
        try:
            pending: Future[Sequence[str]] = self._resolvers.submit(self._resolve, target.host, target.port)
        except RuntimeError:
            raise _failed(target, "the run is being stopped") from None
        try:
            found = pending.result(timeout=max(0.0, deadline_s - time.monotonic()))
        except (FutureTimeoutError, CancelledError):
            pending.cancel()
            raise _failed(target, "its name is not found in time") from None
        except (OSError, UnicodeError) as error:
            raise _failed(target, f"its name is not found: {error}") from None
        if not found:
            raise _failed(target, "its name has no address")
        return [parse_address(address) for address in found]

    def _connect(self, target: Target, addresses: Sequence[Address], deadline_s: float) -> _TimedSocket:
        for place, address in enumerate(addresses, 1):
            try:
                raw = socket.create_connection((str(address), target.port), self._step_s(deadline_s))
            except OSError:
                if place == len(addresses):
                    raise
                continue
            try:
                raw.settimeout(self._step_s(deadline_s))
                if target.scheme == "https":
                    raw = self._tls.wrap_socket(raw, server_hostname=target.host)
            except BaseException:
                raw.close()
                raise
            return _TimedSocket(raw, lambda: self._step_s(deadline_s))
        raise AssertionError("no address")

    def _step_s(self, deadline_s: float) -> float:
        """Seconds that the next read or write may take. Raises TimeoutError."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or self._is_closed:
            raise TimeoutError
        return min(left_s, self.limits.stall_s)

    def _exchange(self, target: Target, stream: _TimedSocket) -> bytes | str:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = cast(Any, stream)
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": target.host_header, **_HEADERS}.items():
            connection.putheader(name, value)
        connection.endheaders()
        with contextlib.closing(connection.getresponse()) as response:
            if response.status in _REDIRECTS:
                location = response.headers.get("Location")
                if not location:
                    raise _failed(target, f"a redirect ({response.status}) to nowhere")
                return urljoin(f"{target.scheme}://{target.host_header}{target.path}", location)
            if response.status != 200:
                raise _failed(target, f"it answers with status {response.status}")
            return self._body(target, response)

    def _body(self, target: Target, response: http.client.HTTPResponse) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise _failed(target, "it answers compressed, which was not asked for")
        limit = self.limits.max_bytes
        too_large = LineError("image_too_large", f"{target.host}: a picture of more than {format_bytes(limit)}")
        if (response.length or 0) > limit:
            raise too_large
        data = bytearray()
        while chunk := response.read(min(65_536, limit + 1 - len(data))):
            data += chunk
            if len(data) > limit:
                raise too_large
        if response.length:  # http.client says nothing when a body ends early
            raise _failed(target, f"the connection broke {response.length:,} bytes before the end")
        return bytes(data)


def _failed(target: Target, reason: str) -> LineError:
    return LineError("url_failed", f"cannot fetch from {target.host}: {reason}")


class _TimedReader(io.RawIOBase):
    """Reads from a socket, each time with what is left of the time."""

    def __init__(self, sock: socket.socket, step_s: Callable[[], float]) -> None:
        self._sock, self._step_s = sock, step_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._step_s())
        return self._sock.recv_into(buffer)


class _TimedSocket:
    """What http.client needs of a socket, under a deadline: a peer that sends a byte now and then gains nothing."""

    def __init__(self, sock: socket.socket, step_s: Callable[[], float]) -> None:
        self._sock, self._step_s = sock, step_s

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._step_s())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._step_s))

    def close(self) -> None:
        """http.client closes early, when the body is still to be read: leaving the context closes."""

    def interrupt(self) -> None:
        """From another thread: the peer seems to have gone."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def __enter__(self) -> _TimedSocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()
