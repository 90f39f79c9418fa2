"""A hub on this machine that speaks the real protocol, faults included: for tests, benchmarks and the demo.

  with HubServer() as hub:
      hub.add_repo("demo/Random-Scout", folder)
      hub.faults.add("model-00002*", "cut", after_bytes=100_000, times=2)
      …  HF_ENDPOINT=hub.url

  python -m tests.hub.server --repo demo/Random-Scout=FOLDER --port-file FILE

Three ports: the hub (API, /resolve/, small files), the CDN that large files are redirected to, and Xet's storage.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub.faults import Faults
from tests.hub.protocol import Handler
from tests.hub.repos import LFS_THRESHOLD_BYTES, Repo, Revision, commit_id, read_card, scan
from tests.hub.xet import Xet


@dataclass
class Request:
    """One line of the log; `status` and `sent` are filled in as the answer goes out."""

    port: str  # hub, cdn or xet
    method: str
    path: str  # with the query
    range: str | None
    authorization: str | None
    user_agent: str | None
    headers: dict[str, str]
    file: str | None = None  # path in the repository, of requests for files
    status: int = 0  # 0: no answer was given
    sent: int = 0  # bytes of the body
    at: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        self.sent += count


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    hub: HubServer

    def shutdown_request(self, request: Any) -> None:
        """No orderly end where a fault asked for a reset."""
        lingers, _ = struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if lingers:
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game; anything else is a bug of this server, and makes tests fail."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)) and not self.hub.closing.is_set():
            traceback.print_exc()
            self.hub.errors.append(error)


class HubServer:
    """Serves until it is closed, or as a context manager. Attributes may be changed while it runs.

    `rate` limits the bytes/s of each connection to the CDN and to Xet's storage.
    """

    def __init__(self, rate: int | None = None, page_size: int = 1000, send_buffer_bytes: int | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {"good-token"}  # users that have access to gated and private repositories
        self.strangers = {"stranger-token"}  # users that do not; every other token is invalid
        self.rate, self.page_size = rate, page_size
        self.resolve_cache = False  # small files behind a relative redirect on the hub, as the real one does
        self.faults = Faults()
        self.requests: list[Request] = []
        self.errors: list[BaseException | None] = []  # bugs of this server
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self._listeners = {name: self._listen(name, send_buffer_bytes) for name in ("hub", "cdn", "xet")}
        self.url, self.cdn_url, self.xet_url = (self._address(name) for name in ("hub", "cdn", "xet"))
        self.xet = Xet(self)

    def _listen(self, name: str, send_buffer_bytes: int | None) -> _Listener:
        handler = type(f"{name.title()}Handler", (Handler,), {"hub": self, "port_name": name})
        listener = _Listener(("127.0.0.1", 0), handler)
        listener.hub = self
        if send_buffer_bytes:  # accepted connections inherit it
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return listener

    def _address(self, name: str) -> str:
        return f"http://127.0.0.1:{self._listeners[name].server_address[1]}"

    def add_repo(
        self,
        name: str,
        folder: Path,
        *,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
        card: dict[str, Any] | None = None,
        lfs_threshold: int = LFS_THRESHOLD_BYTES,
        xet: bool = False,
        sha256s: Mapping[str, str] | None = None,
    ) -> str:
        """Serve the files below `folder` as `branch` of `name`; returns the commit. Again: another revision.

        Files of `lfs_threshold` bytes or more, and *.safetensors, are in LFS. `card` is taken from README.md if None.
        `sha256s` names hashes that are not to be computed. The files stay where they are: leave them as they are.
        """
        files = scan(Path(folder), lfs_threshold, xet, sha256s or {})
        repo = self.repos.setdefault(name, Repo(name))
        repo.gated, repo.private = gated, private
        commit = commit_id(name, files, parents=len(repo.commits))
        repo.commits[commit] = Revision(commit, files, read_card(Path(folder)) if card is None else card)
        repo.branches[branch] = commit
        return commit

    def log(self, handler: BaseHTTPRequestHandler) -> Request:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        named = [headers.get(key) for key in ("range", "authorization", "user-agent")]
        request = Request(handler.port_name, handler.command, handler.path, *named, headers)  # type: ignore[attr-defined]
        self.requests.append(request)
        return request

    def bytes_sent(self, file: str | None = None) -> int:
        """Bytes of files that went out, of one file or of all; errors and redirects do not count."""
        answers = [r for r in list(self.requests) if r.file is not None and r.status in (200, 206)]
        return sum(r.sent for r in answers if file in (None, r.file))

    def close(self) -> None:
        self.closing.set()
        for listener in self._listeners.values():
            listener.shutdown()
            listener.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        if self.errors and error[0] is None:
            raise AssertionError(f"the hub server failed: {self.errors}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--port-file", type=Path, help="the URL of the hub is written here once it serves")
    parser.add_argument("--rate", type=int, metavar="BYTES_PER_S", help="of each connection")
    parser.add_argument("--token", action="append", default=[], help="may read gated repositories")
    parser.add_argument("--gated", action="store_true")
    parser.add_argument("--xet", action="store_true", help="offer Xet storage as well")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    parent = os.getppid()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(rate=arguments.rate) as hub:
        hub.tokens |= set(arguments.token)
        for pair in arguments.repo:
            name, _, folder = pair.partition("=")
            if not Path(folder).is_dir():
                raise SystemExit(f"{folder} is not a folder")
            hub.add_repo(name, Path(folder), gated=arguments.gated, xet=arguments.xet)
        if arguments.port_file:
            part = arguments.port_file.with_name(arguments.port_file.name + ".part")
            part.write_text(hub.url + "\n")
            part.replace(arguments.port_file)
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        while not stop.wait(0.5) and os.getppid() == parent:
            pass


if __name__ == "__main__":
    main()
