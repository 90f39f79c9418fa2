"""One writer per output: an advisory lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from l4tool.core.atomic import write_errors
from l4tool.core.console import note
from l4tool.core.errors import LockHeld, WriteError

LOCK = ".l4tool.lock"


def output_lock(folder: Path, wait: bool = False) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder for this process. Raises LockHeld when another one has it, unless it is to wait."""
    return file_lock(folder / LOCK, f"another run is writing {folder}", wait)


@contextlib.contextmanager
def file_lock(path: Path, message: str, wait: bool = False) -> Iterator[None]:
    """Hold `path`, which is made and removed. Raises LockHeld(message) when another process has it, or waits for it."""
    fd = _acquire(path, message, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def _acquire(path: Path, message: str, wait: bool) -> int:
    while True:
        with write_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _flock(fd, path, message, wait)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last owner removed it between our open and our lock


def _flock(fd: int, path: Path, message: str, wait: bool) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise LockHeld(message, hint="wait for it to end, or choose another output") from None
        note(f"{message}; waiting for it")
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        raise WriteError(f"cannot lock {path}: {error.strerror}", hint="choose another file system") from error
