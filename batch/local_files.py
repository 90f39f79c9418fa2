"""Local pictures: regular files below one folder, and nothing else, whatever the path says and whoever changes links.

The path is walked one component at a time from an open folder, links read by us, so that what is checked is what is
opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from batch.schema import LineError
from l4tool.core.sizes import format_bytes

MAX_FILE_BYTES = 64 * 2**20
MAX_LINKS = 16
MAX_DEPTH = 64  # each folder on the way is open until the file is
_FILE_SCHEME = "file:"
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW | getattr(os, "O_NOCTTY", 0)


def local_path(source: str) -> str:
    """The path that `source` names: itself, or that of a `file:///…` URL. Raises LineError for other file: forms."""
    if source[:5].lower() != _FILE_SCHEME:
        return source
    path = source[5:]
    if path[:12].lower() == "//localhost/":
        path = path[11:]
    elif path.startswith("///") and not path.startswith("////"):
        path = path[2:]
    else:
        raise LineError("invalid_image", f"{shown(source)}: write it as file:///folder/file, or as a plain path")
    if any(mark in path for mark in "%?#"):
        raise LineError("invalid_image", f"{shown(source)}: no %, ? or # in a file: URL; give a plain path")
    return path


def read_file(source: str, root: Path) -> bytes:
    """The bytes of the file that `source` names, relative to `root` or absolute below it. Raises LineError."""
    path = local_path(source)
    try:
        fd = _open_below(path, root, source)
    except LineError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise LineError("image_not_found", f"cannot open the image {shown(source)}: {reason}") from None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LineError("invalid_image", f"{shown(source)} is not a file")
        if status.st_size > MAX_FILE_BYTES:
            size, limit = format_bytes(status.st_size), format_bytes(MAX_FILE_BYTES)
            raise LineError("image_too_large", f"{shown(source)} has {size}, more than {limit}")
        try:
            data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise LineError("image_not_found", f"cannot read {shown(source)}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise LineError("image_too_large", f"{shown(source)} has more than {format_bytes(MAX_FILE_BYTES)}")
    return data


def _open_below(path: str, root: Path, source: str) -> int:
    """A descriptor of the file at `path`. Raises LineError when it leads out of `root`, OSError, ValueError."""
    todo = _parts_below(path, root, source)[::-1]
    with contextlib.ExitStack() as stack:
        folders = [_open_folder(stack, str(root), None)]
        links = 0
        while todo:
            name = todo.pop()
            if name == "..":  # only from a link: a path itself has none
                if len(folders) == 1:
                    raise _outside(source)
                folders.pop()
                continue
            status = os.stat(name, dir_fd=folders[-1], follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = os.readlink(name, dir_fd=folders[-1])
                if target.startswith("/"):
                    del folders[1:]
                    target = "/".join(_parts_below(target, root, source))
                todo += _components(target)[::-1]
            elif stat.S_ISDIR(status.st_mode):
                folders.append(_open_folder(stack, name, folders[-1]))
            elif not stat.S_ISREG(status.st_mode):  # not even opened: devices act on that
                raise LineError("invalid_image", f"{shown(source)} is not a file")
            elif todo:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            else:
                return os.open(name, _OPEN, dir_fd=folders[-1])
    raise LineError("invalid_image", f"{shown(source)} is not a file")


def _open_folder(stack: contextlib.ExitStack, name: str, parent: int | None) -> int:
    follow = os.O_NOFOLLOW if parent is not None else 0
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=parent)
    stack.callback(os.close, fd)
    return fd


def _parts_below(path: str, root: Path, source: str) -> list[str]:
    """The components of `path` below `root`; an absolute path must begin with it, as given or with links resolved."""
    parts = _components(path)
    if ".." in parts:
        raise _outside(source, "no '..' in a picture's path:")
    if not path.startswith("/"):
        return parts
    for start in (os.path.abspath(root), os.path.realpath(root)):
        above = _components(start)
        if parts[: len(above)] == above:
            return parts[len(above) :]
    raise _outside(source)


def _components(path: str) -> list[str]:
    if "\0" in path:
        raise ValueError("embedded null byte")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if len(parts) > MAX_DEPTH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return parts


def _outside(source: str, what: str = "a place outside the pictures' folder:") -> LineError:
    return LineError("image_outside_root", f"{what} {shown(source)}; with --image-root DIR, paths begin at DIR")


def shown(text: str) -> str:
    """A path as an error message quotes it."""
    return repr(text if len(text) <= 100 else text[:97] + "…")
