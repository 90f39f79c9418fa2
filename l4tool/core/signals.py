"""SIGTERM and SIGINT for a command that finishes what it is doing before it goes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from l4tool.core.console import log_line

AGAIN_S = 0.01  # by then the callback is over


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt so that files are left consistent."""


def raise_lost_signals() -> None:
    """From now on KeyboardInterrupt and Terminated are raised again where Python had to drop them.

    It drops, with a note and a traceback, what is raised in a destructor or a callback of the collector, such as those
    of import locks: a signal that meets one would be lost.
    """
    report = sys.unraisablehook
    kind: type[BaseException] = KeyboardInterrupt

    def on_unraisable(lost: sys.UnraisableHookArgs) -> None:
        nonlocal kind
        if lost.exc_type in (KeyboardInterrupt, Terminated):
            kind = lost.exc_type
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            report(lost)

    def on_alarm(number: int, frame: object) -> None:
        raise kind

    signal.signal(signal.SIGALRM, on_alarm)
    sys.unraisablehook = on_unraisable


class GracefulStop:
    """While entered (in the main thread): the first signal only sets `is_requested`; a second one, or `grace_s`
    seconds after the first, raises Terminated or KeyboardInterrupt wherever the main thread is."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.is_requested = False
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_requested(self) -> None:
        """What runs is finished: now the signal takes effect."""
        if self._number is not None:
            self._raise()

    def _on_signal(self, number: int, frame: object) -> None:
        is_first = self._number is None
        self._number = number
        if not is_first or self.grace_s <= 0:
            self._raise()
        self.is_requested = True
        text = f"stopping: what runs is finished first, for at most {self.grace_s:g} s; a second signal stops at once"
        os.write(2, log_line(text).encode())  # print may be what was interrupted
        signal.setitimer(signal.ITIMER_REAL, self.grace_s)

    def _on_alarm(self, number: int, frame: object) -> None:
        if self._number is None:  # it was set before this was entered, by `raise_lost_signals`
            self._before[signal.SIGALRM](number, frame)
        self._raise()

    def _raise(self) -> None:
        raise KeyboardInterrupt if self._number == signal.SIGINT else Terminated
