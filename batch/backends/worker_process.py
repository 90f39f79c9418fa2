"""A worker process: one backend of its own, fed through a pipe by the command that started it.

It ends when that command ends, however that happens, and leaves signals to it: Ctrl-C reaches the whole process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from batch.backends.base import Backend
from batch.backends.worker_channel import Answered, Channel, Failed, Ready, Took, Unreadable, WorkerJob
from batch.requests import GenerationResult, PreparedRequest
from l4tool.core.errors import EXIT_INTERNAL, L4Error

EMBEDDED = f"{__name__}:embedded"
_PR_SET_PDEATHSIG = 1


def main(fd: int) -> None:
    """Serve until the other end of the pipe is closed; `fd` is this end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    channel = Channel(Connection(fd))
    try:
        _serve(channel)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nobody is there to be told
    except BaseException as error:
        if os.environ.get("L4TOOL_DEBUG"):
            import traceback

            traceback.print_exc()
        with contextlib.suppress(OSError):
            channel.send(Failed(_as_user_error(error)))
        os._exit(1)


def embedded(job: WorkerJob) -> Backend:
    """The built-in engine on this process's share. What ends a completion is in every request."""
    import torch

    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
    from batch.tokenizer import Tokenizer

    if job.cores is not None:
        torch.set_num_threads(min(torch.get_num_threads(), len(job.cores)))
    return EmbeddedBackend(job.model, Tokenizer.load(job.model), EmbeddedOptions(**job.engine), eos_token_ids=())


def _serve(channel: Channel) -> None:
    job: WorkerJob = channel.receive()
    if job.cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)  # before torch and OpenMP look at it
    inbox = _Inbox(channel)  # from here on the end of the command is seen, also while the model loads
    module, _, name = job.factory.partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)(job)
    engine = getattr(backend, "engine", None)
    channel.send(Ready(None if engine is None else engine.config.kv_bytes))
    for result in backend.run(inbox):
        channel.send(Answered(result, _figures(backend)))


class _Inbox:
    """The RequestSource of a worker. A thread empties the pipe, so that the command never waits for a step to end;
    when the command is gone, so is this process."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._requests: queue.SimpleQueue[PreparedRequest | Unreadable] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, wait: bool) -> PreparedRequest | None:
        """The next request; see RequestSource. The command is told first: if this one is the end of us, it knows."""
        while True:
            try:
                request = self._requests.get(block=wait)
            except queue.Empty:
                return None
            if isinstance(request, PreparedRequest):
                self._channel.send(Took(request.key))
                return request
            self._refuse(request)

    def _refuse(self, request: Unreadable) -> None:
        self._channel.send(Took(request.tag))
        code, text = getattr(request.cause, "code", "internal_error"), f"a worker cannot read the line: {request}"
        self._channel.send(Answered(GenerationResult(request.tag, [], 0, code, text), None))

    def _read(self) -> None:
        try:
            while True:
                try:
                    self._requests.put(self._channel.receive())
                except Unreadable as error:
                    self._requests.put(error)
        except (EOFError, OSError):
            os._exit(0)


def _figures(backend: Backend) -> dict[str, Any]:
    stats = getattr(backend, "stats", {})
    return dict(stats if isinstance(stats, dict) else vars(stats))


def _as_user_error(error: BaseException) -> L4Error:
    if isinstance(error, L4Error):
        return error
    return L4Error(
        f"a worker failed: {type(error).__name__}: {error}",
        hint="run again with L4TOOL_DEBUG=1 for the traceback, and report it",
        exit_code=EXIT_INTERNAL,
    )


def _die_with_parent() -> None:
    """On Linux the kernel ends us with the thread that started us, even where we are stopped or deep in a kernel."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
