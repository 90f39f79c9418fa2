"""Files that are either whole or not there: `.part` → fsync → rename → fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from l4tool.core.errors import WriteError

PART_SUFFIX = ".part"


def part_path(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + PART_SUFFIX)


def fsync_dir(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(part: Path, final: Path) -> None:
    """Rename a complete, fsynced `.part` file to its final name, durably."""
    os.replace(part, final)
    fsync_dir(final.parent)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a small file whole or not at all; mode by umask. Raises WriteError."""
    raw = data.encode() if isinstance(data, str) else data
    part = part_path(path)
    with write_errors(path, resumes=False):
        with open(part, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)


@contextlib.contextmanager
def write_errors(path: Path, resumes: bool = True) -> Iterator[None]:
    """Turn an OSError while writing `path` into a WriteError with a hint; `resumes`: the same command carries on."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space on that disk and run the same command again"
            + (": it carries on where it stopped" if resumes else ""),
            errno.EDQUOT: "your disk quota is used up; free some space and run the same command again",
            errno.EFBIG: "a file size limit (ulimit -f) stops it; raise it and run the same command again",
            errno.EROFS: "that file system is read-only; choose another output",
            errno.EACCES: "you have no permission to write there; choose another output",
        }.get(error.errno or 0)
        raise WriteError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
