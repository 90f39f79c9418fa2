"""What can go wrong between a client and the hub, as a list of faults that the server looks through at each request."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

Kind = Literal[
    "status",  # an error status, with Retry-After where `retry_after` is given
    "drop",  # the connection ends before any answer
    "hang",  # no answer for `seconds`
    "redirect-loop",  # /resolve/ sends the client back to itself
    "wrong-etag",  # ETag and X-Linked-Etag are those of another file
    "html",  # a login page with status 200 instead of the answer, as captive portals give
    "cut",  # the connection ends after `after_bytes` of the body
    "reset",  # … with a TCP reset
    "stall",  # no more bytes for `seconds` after `after_bytes` of the body
    "slow",  # the body at `bytes_per_s`
    "short",  # a well-formed answer whose body ends `after_bytes` too early
    "wrong-bytes",  # the byte at offset `after_bytes` of the file is flipped
    "no-range",  # 200 and the whole file where a range was asked for
    "wrong-range",  # 206 with the right Content-Range, but bytes from the beginning of the file
    "other-range",  # 206 and, honestly, another range: the whole file
    "no-length",  # a body without Content-Length, ended by closing the connection
]
Where = Literal["api", "resolve", "cdn", "xet"]
BODY_KINDS = (
    "cut",
    "reset",
    "stall",
    "slow",
    "short",
    "wrong-bytes",
    "no-range",
    "wrong-range",
    "other-range",
    "no-length",
)


@dataclass
class Fault:
    """One fault. `path` is a pattern for the file's path in the repository; of API requests for what is asked:
    `info`, `tree`, `paths-info`, `refs`, `whoami`, `xet-read-token`; of Xet requests `reconstruction`, `xorb`."""

    path: str
    kind: Kind
    times: int | None = 1  # requests it strikes; None: all
    where: Where | None = None  # None: wherever it can strike
    method: str | None = None
    after_bytes: int = 0
    status: int = 500
    retry_after: str | None = None
    seconds: float = 3600.0
    bytes_per_s: int = 100_000
    struck: int = 0  # how often it did

    def fits(self, where: str, method: str, path: str) -> bool:
        if self.times is not None and self.struck >= self.times:
            return False
        if self.kind in BODY_KINDS and method != "GET":
            return False
        return (
            (self.where is None or self.where == where)
            and (self.method is None or self.method == method)
            and fnmatchcase(path, self.path)
        )


class Faults:
    """The faults of one server; requests of many threads look them up."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, path: str, kind: Kind, **options: object) -> Fault:
        """Options are the fields of `Fault`. The returned fault counts how often it `struck`."""
        if kind not in get_args(Kind):
            raise ValueError(f"no fault of kind {kind!r}")
        fault = Fault(path, kind, **options)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def strike(self, where: str, method: str, path: str, *kinds: str, has_byte: range | None = None) -> Fault | None:
        """The first fault of one of `kinds` that fits; it counts as used. `has_byte`: offsets the body covers."""
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or not fault.fits(where, method, path):
                    continue
                if fault.kind == "wrong-bytes" and has_byte is not None and fault.after_bytes not in has_byte:
                    continue
                fault.struck += 1
                return fault
        return None
