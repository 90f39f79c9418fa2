"""The command's side of one worker process: start it, feed it, know what it is working on, see it end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from batch.backends.worker_channel import Channel, WorkerJob
from batch.requests import PreparedRequest
from l4tool.core.errors import L4Error

# The folders that modules come from are the command's own; nothing is looked up in the working directory.
_START = "import sys; sys.path[:] = {path!r}; from batch.backends.worker_process import main; main({fd})"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(eq=False)
class WorkerLine:
    """A request on its way, and how many workers died while they worked on it."""

    request: PreparedRequest
    deaths: int = 0

    @property
    def pixel_bytes(self) -> int:
        return sum(image.pixels.nbytes for image in self.request.images)


@dataclass(frozen=True)
class Share:
    """What one worker has of the machine: its cores, or its CUDA device as CUDA_VISIBLE_DEVICES names it."""

    cores: tuple[int, ...]
    cuda_device: str | None = None

    def environment(self) -> dict[str, str]:
        """The worker's environment: no more threads than cores, and its device alone."""
        found = dict(os.environ)
        for name in _THREAD_VARIABLES:
            given = found.get(name, "").split(",")[0]
            found[name] = str(min(int(given), len(self.cores)) if given.isdigit() and int(given) else len(self.cores))
        if self.cuda_device is not None:
            found["CUDA_VISIBLE_DEVICES"] = self.cuda_device
        return found


@dataclass(eq=False)
class Worker:
    """One place for a worker. `waiting` lines have been sent, `running` ones its backend has begun with, by ticket.

    `is_alone`: it works on a suspect and gets nothing else. `failed_starts` are in a row; `pixel_bytes` of its lines.
    """

    number: int
    job: WorkerJob
    share: Share
    channel: Channel | None = None
    process: subprocess.Popen[bytes] | None = None
    is_ready: bool = False
    is_alone: bool = False
    failed_starts: int = 0
    error: L4Error | None = None  # what it said before it ended
    waiting: dict[int, WorkerLine] = field(default_factory=dict)
    running: dict[int, WorkerLine] = field(default_factory=dict)
    pixel_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    earlier_figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def start(self) -> None:
        """Start a process; it is ready when it says so. Raises OSError."""
        ours, theirs = multiprocessing.Pipe()
        code = _START.format(path=sys.path, fd=theirs.fileno())
        with contextlib.closing(theirs), _signals_held_back():
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()],
                env=self.share.environment(),
            )  # fmt: skip
        self.channel, self.is_ready, self.is_alone, self.error = Channel(ours), False, False, None
        with contextlib.suppress(OSError):  # gone already: its end is seen when it is listened to
            self.channel.send(self.job)

    def send(self, ticket: int, line: WorkerLine) -> None:
        """Give it a line. Raises what pickling raises; that it is gone is seen when it is listened to."""
        self.waiting[ticket] = line
        self.pixel_bytes += line.pixel_bytes
        assert self.channel is not None
        try:
            self.channel.send(replace(line.request, key=ticket), tag=ticket)
        except OSError:
            pass
        except BaseException:
            del self.waiting[ticket]
            self.pixel_bytes -= line.pixel_bytes
            raise

    def took(self, ticket: int) -> None:
        self.running[ticket] = self.waiting.pop(ticket)

    def answered(self, ticket: int, figures: dict[str, Any] | None) -> WorkerLine:
        """It is done with a line; `figures` are its backend's stats where there are new ones."""
        line = self.running.pop(ticket)
        self.figures, self.is_alone = self.figures if figures is None else figures, False
        self.pixel_bytes -= line.pixel_bytes
        return line

    def end(self) -> str:
        """Make sure that it is gone, forget its lines, and say how it ended."""
        self.waiting.clear()
        self.running.clear()
        self.earlier_figures.append(self.figures)
        self.figures, self.is_ready, self.is_alone, self.pixel_bytes = {}, False, False, 0
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process is None:
            return "was not started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)  # how it ended by itself, where it did
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return _ending(code)

    def kill(self) -> None:
        """End it whatever it does."""
        if self.process is not None:
            self.process.kill()
        self.end()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process starts with these signals held back and then ignores them; ours come through right after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
