"""Outputs that cannot be appended to: written as files in a spool, with their journal, and delivered when complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from batch import remote
from batch.journal import journal_path
from l4tool.core.atomic import write_errors, write_file
from l4tool.core.console import note
from l4tool.core.errors import UsageError, WriteError
from l4tool.core.sizes import format_bytes

UPLOADED_SUFFIX = ".uploaded"
COPY_BYTES = 2**20


class Delivery(Protocol):
    """What is to be done with a complete output file."""

    def is_done(self) -> bool:
        """True when the file as it is was delivered, and is still there."""
        ...

    def deliver(self) -> None:
        """Do it, unless it is done. Raises L4Error."""
        ...


def default_spool() -> Path:
    """The user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "l4tool" / "spool"


def spool_path(url: str, spool: Path) -> Path:
    """Where the output for `url` is written: a folder of its own, by the URL's hash. Makes it. Raises WriteError."""
    folder = spool / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / url.rpartition("/")[2]


@dataclass(frozen=True)
class Upload:
    """A file of the spool that goes to `url` in one piece. A mark beside it remembers what was put when."""

    path: Path
    url: str

    @property
    def _mark(self) -> Path:
        return self.path.with_name(self.path.name + UPLOADED_SUFFIX)

    def check_free(self, force: bool) -> None:
        """Raises WriteError for an object that this spool did not put there."""
        known = journal_path(self.path).exists() or self._mark.exists()
        if not force and not known and remote.describe(self.url) is not None:
            raise WriteError(
                f"{self.url} exists, and the spool {self.path.parent} knows nothing of it",
                hint="choose another output, or --force to overwrite it",
            )

    def _state(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def is_done(self) -> bool:
        try:
            mark = json.loads(self._mark.read_bytes())
            return mark["local"] == self._state() and mark["remote"] == remote.describe(self.url)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def deliver(self) -> None:
        if self.is_done():
            return
        note(f"putting {format_bytes(self.path.stat().st_size)} to {self.url}")
        state = self._state()
        found = remote.put(self.path, self.url)
        write_file(self._mark, json.dumps({"local": state, "remote": found}))


@dataclass(frozen=True)
class CopyToStdout:
    """A finished file that goes to standard output."""

    path: Path

    def is_done(self) -> bool:
        return False

    def deliver(self) -> None:
        with open(self.path, "rb") as file, write_errors(Path("-")):
            while chunk := file.read(COPY_BYTES):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(1, view) :]


@contextlib.contextmanager
def spooled(target: str, spool: Path | None, in_order: bool, force: bool) -> Iterator[tuple[Path, list[Delivery]]]:
    """(the local file to write, how it gets to `target`). Nothing is to be delivered for a local file, nor for
    standard output in the order in which lines finish. Raises L4Error."""
    if target == "-" and in_order:
        with tempfile.TemporaryDirectory(prefix="l4tool-") as folder:
            path = Path(folder) / "out.jsonl"
            yield path, [CopyToStdout(path)]
    elif remote.is_url(target) and (local := remote.local_path(target)) is None:
        if target.endswith("/"):
            raise UsageError(f"{target} is a folder", hint="give the name of an object; many inputs go to a folder")
        upload = Upload(spool_path(target, spool or default_spool()), target)
        upload.check_free(force)
        yield upload.path, [upload]
    else:
        yield (local if remote.is_url(target) and local is not None else Path(target)), []
