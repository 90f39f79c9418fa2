"""Some threads that work through a list, end at the first fatal error, and let a signal through at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from l4tool.core.errors import ChecksumError
from l4tool.hub.transport import Stopped

STOP_GRACE_S = 1.5


def run_all(
    tasks: Sequence[Callable[[], None]], jobs: int, stop: threading.Event, abort: Callable[[], None] = lambda: None
) -> None:
    """Run the tasks, `jobs` at once. Raises their first error.

    A wrong checksum is one file's trouble: the others go on. Any other error, and any signal here, sets `stop` and
    calls `abort` until the threads have ended; those that do not in time are left behind (they are daemons).
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=_work, args=(waiting, errors, stop), daemon=True) for _ in range(min(jobs, len(tasks)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                if stop.is_set():
                    _end(threads, stop, abort)
    except BaseException:
        _end(threads, stop, abort)
        raise
    if errors:
        raise sorted(errors, key=lambda error: isinstance(error, ChecksumError))[0]


def _work(waiting: queue.SimpleQueue[Callable[[], None]], errors: list[BaseException], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            task()
        except Stopped:
            return
        except ChecksumError as error:
            errors.append(error)
        except BaseException as error:
            errors.append(error)
            stop.set()


def _end(threads: Sequence[threading.Thread], stop: threading.Event, abort: Callable[[], None]) -> None:
    stop.set()
    deadline_s = time.monotonic() + STOP_GRACE_S
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline_s:
        abort()
        time.sleep(0.02)
