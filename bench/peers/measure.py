"""What every peer script measures the same way: wall and CPU seconds, peak memory. Standard library only."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def write_result(result: dict[str, Any]) -> None:
    Path(sys.argv[2]).write_text(json.dumps(result))


class Timed:
    """`with Timed() as timed: …` → timed.seconds, timed.cpu_s (user and system, all threads)."""

    def __enter__(self) -> Timed:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_s = cpu_seconds() - self._cpu


def cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_rss_bytes() -> int:
    """Of this process, or of its largest child."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in both) * 1024
