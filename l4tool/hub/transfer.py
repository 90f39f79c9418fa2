"""One file from the hub to its final name: resumed, hashed while it streams, never final before it is right."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from l4tool.core.atomic import write_errors
from l4tool.core.errors import ChecksumError, NetworkError
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.manifest import READ_BYTES
from l4tool.hub.part import Part, remove_part
from l4tool.hub.transport import AGAIN, Answer, Retry, RetryPolicy, Stopped, as_int, check_status, retrying

LINGER_S = 0.01  # received bytes wait this long for more, to be written together
MAX_ANSWER_BYTES = 40 * 10**9  # CDNs refuse single answers above 50 GB; Maverick has files of 100 GB in Meta's layout
QUEUED_CHUNKS = 256  # of up to 64 KiB


def download(
    hub: Hub,
    snapshot: Snapshot,
    file: RemoteFile,
    target: Path,
    *,
    on_bytes: Callable[[int], None] = lambda delta: None,
    stop: threading.Event | None = None,
    policy: RetryPolicy | None = None,
) -> None:
    """Download `file` to `target`, carrying on from `target`.part if an earlier run left one.

    Returns when the file is whole, its hash right, and its name durable. `on_bytes(delta)` counts bytes on disk,
    resumed ones too; delta is negative when bad bytes are thrown away. Raises NetworkError, RateLimited, ChecksumError,
    WriteError and the refusals of `Hub`; Stopped once `stop` is set (`hub.abort()` breaks waits for bytes).
    The caller sees to it that nobody else writes `target`.
    """
    with write_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    part = Part(target, file, on_bytes)
    try:
        _Transfer(hub, snapshot, part, stop, policy or hub.policy).run()
    finally:
        part.close()


class _Transfer:
    """The attempts at one file."""

    def __init__(
        self, hub: Hub, snapshot: Snapshot, part: Part, stop: threading.Event | None, policy: RetryPolicy
    ) -> None:
        self.hub, self.snapshot, self.part, self.stop, self.policy = hub, snapshot, part, stop, policy
        self.file = part.file
        self.furthest = part.size  # progress is what goes beyond it

    def run(self) -> None:
        for attempt in range(1, self.policy.checksum_attempts + 1):
            while self.part.size < self.file.size:
                retrying(self._attempt, self.policy, self.hub.say, self.stop)
            try:
                self.part.check()
                break
            except ChecksumError as error:
                self.part.reset()
                self.furthest = 0
                if attempt == self.policy.checksum_attempts:
                    remove_part(self.part.target)
                    raise
                self.hub.say(f"{error.message}; thrown away, downloading it again")
        self.part.finish()

    def _attempt(self) -> None:
        """One connection. Returns when all it was asked for is there; Retry otherwise."""
        start, end = self.part.size, min(self.part.size + MAX_ANSWER_BYTES, self.file.size)
        last = end - 1 if end < self.file.size else ""
        headers = {"Range": f"bytes={start}-{last}"} if start or last else {}
        try:
            with self.hub.get(self.snapshot, self.file.path, headers) as answer:
                check_status(answer, self.snapshot.repo_id, self.file.path, self.hub.token is not None)
                check_answer(answer, self.file, start, end)
                if answer.response.status_code == 200:  # all of the file, whatever was asked for
                    end = self.file.size
                    if start:
                        self.part.reset()
                self._stream(answer, end - self.part.size)
        except Retry as retry:
            progressed = self.part.size >= self.furthest + self.policy.progress_bytes
            self.furthest = max(self.furthest, self.part.size)
            raise Retry(retry.error, retry.wait_s, progressed) from retry.__cause__

    def _stream(self, answer: Answer, left: int) -> None:
        """Read a body of `left` bytes; a second thread hashes and writes it."""
        response = answer.response
        plain = response.headers.get("content-encoding", "identity").lower() == "identity"
        floor = _Floor(self.policy.floor_bytes_per_s, self.hub.timeout_s, self.file.path)
        with _Writer(self.part) as writer:
            for chunk in response.iter_raw() if plain else response.iter_bytes():
                left -= len(chunk)
                if left < 0:
                    raise _retry(self.file, "the hub sends more bytes than the file has")
                writer.put(chunk)
                if self.stop is not None and self.stop.is_set():
                    raise Stopped
                floor.count(len(chunk))
        if left:
            raise _retry(self.file, f"the connection ended {left:,} bytes early")


def check_answer(answer: Answer, file: RemoteFile, start: int, end: int) -> None:
    """Raise Retry unless the headers promise bytes `start` … `end` of `file`, or all of it (status 200)."""
    headers, etag = answer.response.headers, answer.etag
    is_hash = etag is not None and len(etag) == len(file.digest) and re.fullmatch(r"[0-9a-f]+", etag)
    if is_hash and etag != file.digest:
        message = f"{file.path}: the hub offers content {etag}, but its file list says {file.digest}"
        raise Retry(ChecksumError(message, hint=AGAIN))
    if answer.linked_size not in (None, file.size):
        raise _retry(file, f"the hub offers {answer.linked_size:,} bytes instead of {file.size:,}")
    if answer.response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("content-range", "").strip())
        want = (str(start), str(end - 1))
        if not found or found.groups()[:2] != want or found.group(3) not in (str(file.size), "*"):
            raise _retry(file, f"asked for bytes {start}-{end - 1}, the hub sends {headers.get('content-range')!r}")
    elif headers.get("content-encoding", "identity").lower() == "identity":
        length = as_int(headers.get("content-length"))
        if length not in (None, file.size):
            raise _retry(file, f"the hub sends {length:,} bytes instead of {file.size:,}")


def _retry(file: RemoteFile, text: str) -> Retry:
    return Retry(NetworkError(f"{file.path}: {text}", hint=AGAIN))


class _Floor:
    """Finds transfers that trickle: the socket's own timeout sees only those that stop."""

    def __init__(self, bytes_per_s: float, window_s: float, path: str) -> None:
        self.bytes_per_s, self.window_s, self.path = bytes_per_s, window_s, path
        self.bytes, self.since_s = 0, time.monotonic()

    def count(self, num_bytes: int) -> None:
        """Raises Retry when the window that ends now was too slow."""
        self.bytes += num_bytes
        elapsed_s = time.monotonic() - self.since_s
        if elapsed_s < self.window_s:
            return
        if self.bytes < self.bytes_per_s * elapsed_s:
            message = f"{self.path}: only {self.bytes:,} bytes in {elapsed_s:.0f} s"
            raise Retry(NetworkError(message, hint=AGAIN))
        self.bytes, self.since_s = 0, time.monotonic()


class _Writer:
    """A thread that hashes and writes while the next bytes come in. Leaving the block waits for all of it.

    It gathers what has come since its last turn: few large writes when the network is fast, small ones when it is
    slow, so that a kill at any moment loses next to nothing.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.error: BaseException | None = None
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUED_CHUNKS)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, data: bytes) -> None:
        """Take received bytes. Raises what writing has raised."""
        if self.error is not None:
            raise self.error
        self._queue.put(data)

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        """After an error the queue is still emptied, so that `put` never waits for ever."""
        ended = False
        while not ended:
            chunks = self._gather()
            ended = chunks[-1] is None
            if self.error is None:
                try:
                    self.part.write(b"".join(chunk for chunk in chunks if chunk is not None))
                except BaseException as error:
                    self.error = error

    def _gather(self) -> list[bytes | None]:
        """What is waiting, up to a full buffer; None is the end."""
        data = [self._queue.get()]
        if data[0] is not None:
            time.sleep(LINGER_S)
        size = 0
        while data[-1] is not None and (size := size + len(data[-1])) < READ_BYTES:
            try:
                data.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return data
