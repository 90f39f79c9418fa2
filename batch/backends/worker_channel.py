"""What travels between the command and a worker process, and the pipe it travels through."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batch.requests import GenerationResult
from l4tool.core.errors import L4Error


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to make its backend. `factory` is "module:function", called with the job; `engine` are the
    fields of EmbeddedOptions; `cores` is where it may run (None: anywhere)."""

    model: Path
    factory: str
    engine: dict[str, Any] = field(default_factory=dict)
    cores: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ready:
    """The worker has its backend; `kv_bytes` is the engine's KV cache, None where there is none."""

    kv_bytes: int | None


@dataclass(frozen=True)
class Took:
    """The backend is about to work on the request with this key; until then it only waited."""

    key: int


@dataclass(frozen=True)
class Answered:
    """A result, and the worker's figures up to here (None: as before)."""

    result: GenerationResult
    stats: dict[str, Any] | None


@dataclass(frozen=True)
class Failed:
    """The worker ends because of this error."""

    error: L4Error


class Unreadable(Exception):
    """A message arrived whole but could not be made into an object; `tag` is what it was sent with."""

    def __init__(self, tag: int, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.tag, self.cause = tag, cause


class Channel:
    """Objects over a pipe to a process of our own making; the bytes of arrays travel beside the pickle, uncopied.

    One thread may send while another receives. EOFError and OSError mean that the other side is gone.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, message: object, tag: int = 0) -> None:
        """Blocks while the pipe is full. What cannot be pickled raises before anything is sent."""
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        self.connection.send_bytes(pickle.dumps((tag, body, [view.nbytes for view in views])))
        for view in views:
            self.connection.send_bytes(view)

    def receive(self) -> Any:
        """Blocks until a whole message is there. Raises Unreadable."""
        tag, body, sizes = pickle.loads(self.connection.recv_bytes())
        buffers = [bytearray(size) for size in sizes]
        for buffer in buffers:
            self.connection.recv_bytes_into(buffer)
        try:
            return pickle.loads(body, buffers=buffers)
        except Exception as error:
            raise Unreadable(tag, error) from error

    def close(self) -> None:
        self.connection.close()
