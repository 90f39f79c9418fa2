"""A device or backend that goes away in the middle: one line and exit code 69 instead of a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from batch.requests import GenerationResult
from l4tool.core.errors import DeviceError

_BUGS = (NotImplementedError, RecursionError)  # RuntimeErrors that no device raises


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """RuntimeError (CUDA's errors are such) and MemoryError become DeviceError."""
    try:
        yield
    except _BUGS:
        raise
    except (RuntimeError, MemoryError) as error:
        what = str(error).strip().splitlines()[:1] or ["out of memory"]
        raise DeviceError(
            f"the device or the backend failed: {what[0][:300]}",
            hint="the same command carries on; L4TOOL_DEBUG=1 shows where it failed",
        ) from error


def guarded(results: Iterator[GenerationResult]) -> Iterator[GenerationResult]:
    """A backend's results; what its device raises becomes DeviceError."""
    while True:
        with device_errors():
            result = next(results, None)
        if result is None:
            return
        yield result
