"""The output file: locked, append-only, whole lines only, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from l4tool.core.errors import LockHeld, WriteError

FSYNC_INTERVAL_S = 5.0


class OutputFile:
    """Writes whole lines. A line that cannot be written whole is cut off again before the error is raised.

    Opening locks the file against other runs and refuses one that is not empty unless `force`; `start` then empties it,
    so that a run which fails before its first line leaves the old file alone. Raises WriteError, LockHeld.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self.path = path
        self.size = 0  # bytes of whole lines
        self._is_new = not path.exists()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}", hint="choose another output file") from None
        try:
            status = os.fstat(self._fd)
            self._is_regular = stat.S_ISREG(status.st_mode)
            if self._is_regular:
                self._lock()
                if os.fstat(self._fd).st_size and not force:
                    raise WriteError(f"{path} is not empty", hint="choose another output, or --force to overwrite it")
        except BaseException:
            os.close(self._fd)
            raise
        self._synced_s = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockHeld(
                f"another run is writing {self.path}", hint="wait for it, or choose another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
                raise WriteError(f"cannot lock {self.path}: {error.strerror}") from None

    def start(self) -> None:
        """Empty the file: the first line comes now."""
        if self._is_regular:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise self._write_error(error) from None

    def write(self, line: bytes) -> None:
        """Append one line. On any failure, a signal included, the file is cut back to whole lines."""
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            self.size += len(line)
            if time.monotonic() - self._synced_s > FSYNC_INTERVAL_S:
                self.sync()
        except BaseException as error:
            if view:
                self._cut()
            if isinstance(error, OSError):
                raise self._write_error(error) from None
            raise

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if self._is_regular:
            os.fsync(self._fd)
        self._synced_s = time.monotonic()

    def _cut(self) -> None:
        if self._is_regular:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)

    def _write_error(self, error: OSError) -> WriteError:
        hint = {
            errno.ENOSPC: "free some space on that disk, then run again with --force",
            errno.EDQUOT: "your disk quota is used up; free some space, then run again with --force",
            errno.EFBIG: "a file size limit (ulimit -f) stops it; raise it, then run again with --force",
        }.get(error.errno or 0)
        return WriteError(f"cannot write {self.path}: {error.strerror}; the lines so far are whole", hint=hint)

    def close(self, discard_if_empty: bool = False) -> None:
        """Sync and unlock; with `discard_if_empty` a file that this run made and never wrote to is removed."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if self._is_regular:
                if discard_if_empty and self._is_new and not self.size:
                    self.path.unlink(missing_ok=True)
                else:
                    os.fsync(fd)
        except OSError as error:
            raise self._write_error(error) from None
        finally:
            os.close(fd)
