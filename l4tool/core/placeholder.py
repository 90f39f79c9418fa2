"""Placeholders: a shard's header and size without its contents, until the bytes themselves are downloaded.

A placeholder is a sparse file of the real size that begins with the real safetensors header; the rest reads as zeros.
So that nobody takes those zeros for weights, every placeholder has a mark beside it, `NAME.header-only`, which is
there before the placeholder takes its name. Whoever puts the real file in its place calls `filled` afterwards; killed
between the two, the real file still counts as a placeholder, which costs a download and never a wrong weight.
"""

from __future__ import annotations

import os
from pathlib import Path

from l4tool.core.atomic import fsync_dir, part_path, publish, write_errors, write_file
from l4tool.core.errors import InputMissing

MARK_SUFFIX = ".header-only"


def is_placeholder(path: Path) -> bool:
    """True for a file of which only the header is there."""
    return _mark(path).exists()


def require_contents(path: Path) -> None:
    """Raises InputMissing for a placeholder."""
    if is_placeholder(path):
        raise InputMissing(
            f"{path} holds a header only, its weights are not here",
            hint="download the checkpoint first: l4tool fetch",
        )


def write_placeholder(path: Path, header: bytes, size: int, origin: str) -> None:
    """A placeholder of `size` bytes in place of whatever `path` was. `origin` tells people where the rest lies."""
    mark = _mark(path)
    write_file(mark, f"l4tool: only the header of {path.name} is here; the rest lies in {origin}\n")
    part = part_path(mark)  # `NAME.part` belongs to the download of the real file
    with write_errors(path):
        with open(part, "wb") as file:
            file.write(header)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)


def filled(path: Path) -> None:
    """The real file stands at `path` now, durably: drop the mark."""
    mark = _mark(path)
    with write_errors(mark):
        mark.unlink(missing_ok=True)
        fsync_dir(mark.parent)


def _mark(path: Path) -> Path:
    return path.with_name(path.name + MARK_SUFFIX)
