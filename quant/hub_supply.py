"""Shards that are downloaded ahead of a run, checked, and deleted as soon as the output has their tensors."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.reader import Reader
from converters.writing.journal import STAGING
from l4tool.core.atomic import write_errors
from l4tool.core.console import Progress
from l4tool.core.errors import CheckpointError, ChecksumError, InputMissing
from l4tool.core.placeholder import filled, is_placeholder
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.manifest import check_file
from l4tool.hub.part import part_bytes, remove_part
from l4tool.hub.selection import wanted_files
from l4tool.hub.targets import FolderTarget
from l4tool.hub.transfer import download
from l4tool.hub.transport import Stopped

AHEAD = 2  # shards beyond the one that is being quantized
STOP_GRACE_S = 3.0


def window_bytes(sizes: Sequence[int], at_once: int = AHEAD + 1) -> int:
    """Most bytes that lie there at a time when files of these sizes come in this order, `at_once` of them together."""
    return max((sum(sizes[start : start + at_once]) for start in range(len(sizes))), default=0)


def describe(snapshot: Snapshot, revision: str | None) -> dict[str, Any]:
    """What a job made from this snapshot is fingerprinted by: the commit, and the hub's hash of every file."""
    files = {file.path: file.digest for file in wanted_files(snapshot)}
    return {"repo": snapshot.repo_id, "revision": revision, "commit": snapshot.commit, "files": files}


class HubSupply:
    """Fills the placeholders in `folder`, a skeleton of `snapshot`. At most `ahead` + 1 shards are there at a time.

    `keep`: nothing is deleted. A shard stands at its final name only after its hash was found right; its mark as a
    placeholder goes after that.
    """

    def __init__(
        self, hub: Hub, snapshot: Snapshot, revision: str | None, folder: Path, ahead: int = AHEAD, keep: bool = False
    ) -> None:
        self.hub, self.snapshot, self.revision = hub, snapshot, revision
        self.folder, self.ahead, self.keep = folder, ahead, keep
        self._target = FolderTarget(folder)
        self._order: list[Path] = []
        self._here: set[Path] = set()
        self._errors: dict[Path, BaseException] = {}
        self._changed = threading.Condition()
        self._room, self._next = ahead + 1, 0
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._progress: Progress | None = None

    def describe(self, reader: Reader) -> dict[str, Any]:
        return describe(self.snapshot, self.revision)

    def room_bytes(self, files: Sequence[Path]) -> int:
        sizes = [self._remote(file).size for file in files]
        at_once = len(files) if self.keep else self.ahead + 1
        return window_bytes(sizes, at_once) - sum(map(self._bytes_here, files))

    def _bytes_here(self, file: Path) -> int:
        if file.exists() and not is_placeholder(file):
            return file.stat().st_size
        return part_bytes(file, self._remote(file))

    def begin(self, files: Sequence[Path]) -> None:
        """Clear away what an earlier run left and this one does not need, and start downloading."""
        self._order = list(files)
        if not self.keep:
            self._sweep(set(self._order[: self._room]))
            for other in self.folder.parent.iterdir() if self.folder.parent.name == STAGING else ():
                if other != self.folder:  # another commit, which this job has replaced
                    shutil.rmtree(other, ignore_errors=True)
        total, there = sum(self._remote(file).size for file in files), sum(map(self._bytes_here, files))
        if total > there:
            self._progress = Progress("download", total, line=1)
        for _ in range(min(max(self.ahead, 1), len(self._order))):
            self._threads.append(threading.Thread(target=self._work, name="download", daemon=True))
            self._threads[-1].start()

    def _sweep(self, needed: set[Path]) -> None:
        for remote in wanted_files(self.snapshot):
            path = self._target.place(remote)
            if path.suffix == ".safetensors" and path not in needed:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        with write_errors(path):
            remove_part(path)
            if not is_placeholder(path):
                path.unlink(missing_ok=True)

    def ready(self, file: Path) -> bool:
        with self._changed:
            return file in self._here or file in self._errors

    def ensure(self, file: Path) -> None:
        with self._changed:
            while file not in self._here and file not in self._errors:
                self._changed.wait(0.5)
            if file in self._errors:
                raise self._errors[file]

    def used_up(self, file: Path) -> None:
        if not self.keep:
            self._remove(file)
        with self._changed:
            self._room += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Stop downloading; what has arrived can be resumed."""
        self._stop.set()
        deadline_s = time.monotonic() + STOP_GRACE_S
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline_s:
            with self._changed:
                self._changed.notify_all()
            self.hub.abort()
            time.sleep(0.02)
        if self._progress is not None:
            self._progress.close()

    def _work(self) -> None:
        """A download thread: the next shard whenever there is room for one. Ends with its first error."""
        while (file := self._take()) is not None:
            error: BaseException | None = None
            try:
                self._bring(file)
            except Stopped:
                return
            except BaseException as failure:
                error = failure
            with self._changed:
                if error is None:
                    self._here.add(file)
                else:
                    self._errors |= dict.fromkeys([file, *self._order[self._next :]], error)
                    self._next = len(self._order)
                self._changed.notify_all()

    def _take(self) -> Path | None:
        with self._changed:
            while self._room == 0 and self._next < len(self._order) and not self._stop.is_set():
                self._changed.wait(0.5)
            if self._stop.is_set() or self._next == len(self._order):
                return None
            self._room -= 1
            self._next += 1
            return self._order[self._next - 1]

    def _bring(self, file: Path) -> None:
        """Make the file real: a finished download of an earlier run counts if its hash is right."""
        remote = self._remote(file)
        if not self._is_right(file, remote):
            planned = _header(file)
            download(self.hub, self.snapshot, remote, file, on_bytes=self._count, stop=self._stop)
            if _header(file) != planned:
                raise ChecksumError(f"{file.name} does not begin with the header that the hub gave for it before")
        self._target.done(remote)
        filled(file)

    def _is_right(self, file: Path, remote: RemoteFile) -> bool:
        state = self._target.state(remote)
        if state == "unknown" and file.stat().st_blocks * 512 >= remote.size:  # no placeholder, which is sparse
            try:
                check_file(file, remote)
                state = "right"
            except (ChecksumError, CheckpointError, InputMissing):
                return False
        return state == "right"

    def _count(self, delta: int) -> None:
        with self._changed:
            if self._progress is not None:
                self._progress.advance(delta)

    def _remote(self, file: Path) -> RemoteFile:
        return self.snapshot.file(file.name)


def _header(file: Path) -> bytes:
    with write_errors(file), open(file, "rb") as opened:
        prefix = opened.read(8)
        return prefix + opened.read(int.from_bytes(prefix, "little"))
