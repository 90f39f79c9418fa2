"""An output file: append-only, whole lines only, whatever happens. The journal beside it says what the lines are."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from l4tool.core.errors import WriteError


class OutputFile:
    """Writes whole lines. A line that cannot be written whole is cut off again before the error is raised.

    Opening changes nothing; `start` cuts the file to what is kept. `fd` writes to a descriptor that is open already
    (standard output). Raises WriteError.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        self.size = 0  # bytes of whole lines
        self._is_new = not path.exists()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) if fd is None else os.dup(fd)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error.strerror}", hint="choose another output file") from None
        self.is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode) and fd is None
        self._is_changed = False

    def found_bytes(self) -> int:
        """The file's size as it is."""
        return os.fstat(self._fd).st_size if self.is_regular else 0

    def start(self, keep_bytes: int = 0) -> None:
        """Cut the file to its first `keep_bytes`: the next line comes now."""
        self.size = keep_bytes
        self._is_changed = True  # by a killed run that never synced its end, or by the cut below
        if self.is_regular:
            try:
                os.ftruncate(self._fd, keep_bytes)
                os.lseek(self._fd, keep_bytes, os.SEEK_SET)
            except OSError as error:
                raise self._write_error(error) from None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends."""
        return os.pread(self._fd, length, offset)

    def write(self, line: bytes) -> None:
        """Append one line. On any failure, a signal included, the file is cut back to whole lines."""
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            self.size += len(line)
            self._is_changed = True
        except BaseException as error:
            if view:
                self._cut()
            if isinstance(error, OSError):
                raise self._write_error(error) from None
            raise

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if self.is_regular and self._is_changed:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                raise self._write_error(error) from None
            self._is_changed = False

    def _cut(self) -> None:
        if self.is_regular:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)

    def _write_error(self, error: OSError) -> WriteError:
        hint = {
            errno.ENOSPC: "free some space on that disk and run the same command again: it carries on",
            errno.EDQUOT: "your disk quota is used up; free some space and run the same command again: it carries on",
            errno.EFBIG: "a file size limit (ulimit -f) stops it; raise it and run the same command again",
        }.get(error.errno or 0)
        return WriteError(f"cannot write {self.path}: {error.strerror}; the lines so far are whole", hint=hint)

    def close(self, discard: bool = False) -> None:
        """Give the file back; with `discard` one that this run made and never wrote to is removed."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        if discard and self.is_regular and self._is_new and not self.size:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
