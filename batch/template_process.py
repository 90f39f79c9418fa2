"""A chat template in a child process with limits on memory and time: whatever it does, it costs one line.

Both ways: 8 bytes of length, then JSON. The child imports jinja2 and nothing heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from datetime import datetime
from typing import Any, BinaryIO

from batch.template import LocalRenderer, TemplateFailure, TemplateRefusal

START_TIMEOUT_S = 10.0
MEMORY_BYTES = 2 * 2**30
_REPLY_OVERHEAD_BYTES = 4096
_START = "import sys; sys.path[:] = {path!r}; from batch.template_process import serve; serve()"


class ChildRenderer:
    """See Renderer. One child, used by one thread at a time; a new one takes the place of one that was stopped."""

    def __init__(self, source: str, now: datetime) -> None:
        self._hello = {"source": source, "now": now.isoformat()}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, variables: dict[str, Any], limit_chars: int, timeout_s: float) -> str:
        """See Renderer."""
        with self._lock:
            try:
                child = self._child or self._start()
                request = {"variables": variables, "limit_chars": limit_chars, "timeout_s": timeout_s}
                reply = _ask(child, request, 12 * limit_chars + _REPLY_OVERHEAD_BYTES, timeout_s)
            except (OSError, EOFError, ValueError):
                self._stop()
                raise TemplateFailure("it takes too much time or memory") from None
            except BaseException:
                self._stop()
                raise
        if "refused" in reply:
            raise TemplateRefusal(reply["refused"])
        if "failed" in reply:
            raise TemplateFailure(reply["failed"])
        return str(reply["text"])

    def close(self) -> None:
        """Stop the child."""
        with self._lock:
            self._stop()

    def __del__(self) -> None:
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = child = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which finishes what it has begun
        )  # fmt: skip
        reply = _ask(child, self._hello, _REPLY_OVERHEAD_BYTES, START_TIMEOUT_S)
        if "failed" in reply:
            self._stop()
            raise TemplateFailure(reply["failed"])
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        child.wait()


def _ask(child: subprocess.Popen[bytes], message: dict[str, Any], max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """One message to the child and its answer. Raises OSError, EOFError or ValueError when there is none in time."""
    assert child.stdin is not None and child.stdout is not None
    _write(child.stdin, message)
    fd, deadline_s = child.stdout.fileno(), time.monotonic() + timeout_s
    size = int.from_bytes(_read_exactly(fd, 8, deadline_s), "big")
    if size > max_bytes:
        raise ValueError("an answer of more bytes than allowed")
    reply: dict[str, Any] = json.loads(_read_exactly(fd, size, deadline_s))
    return reply


def _read_exactly(fd: int, size: int, deadline_s: float) -> bytes:
    data = bytearray()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(data) < size:
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(fd, min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _write(stream: BinaryIO | Any, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def serve() -> None:
    """The child: the template first, then one answer for each request until the parent is gone."""
    _limit_memory()
    source, target = sys.stdin.buffer, sys.stdout.buffer
    hello = _next(source)
    if hello is None:
        return
    try:
        renderer = LocalRenderer(hello["source"], datetime.fromisoformat(hello["now"]))
    except TemplateFailure as error:
        _write(target, {"failed": str(error)[:500]})
        return
    _write(target, {})
    while (request := _next(source)) is not None:
        _write(target, _answer(renderer, request))


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _next(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(8)
    if len(head) < 8:
        return None
    message: dict[str, Any] = json.loads(source.read(int.from_bytes(head, "big")))
    return message


def _answer(renderer: LocalRenderer, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": renderer.render(**request)}
    except TemplateRefusal as error:
        return {"refused": str(error)[:500]}
    except TemplateFailure as error:
        return {"failed": str(error)[:500]}
    except MemoryError:
        return {"failed": "it takes too much memory"}
