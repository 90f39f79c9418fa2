"""One fetch under its lock: check what is there, make room, download what is missing, and say so in the manifest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from l4tool.core import licence
from l4tool.core.atomic import write_errors
from l4tool.core.console import note, table
from l4tool.core.errors import CheckpointError, ChecksumError, InputMissing, WriteError
from l4tool.core.sizes import format_bytes
from l4tool.hub.board import Board
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.manifest import (
    Manifest,
    check_file,
    entry_of,
    is_unchanged,
    read_manifest,
    total_bytes,
    write_manifest,
)
from l4tool.hub.names import RepoSpec
from l4tool.hub.part import part_bytes, remove_part
from l4tool.hub.targets import Target
from l4tool.hub.transfer import download
from l4tool.hub.transport import DEFAULT_POLICY, RetryPolicy, Stopped
from l4tool.hub.workers import run_all
from l4tool.hub.xet import Xet

SPARE_BYTES = 16 * 2**20  # for ledgers, the manifest and the file system's own needs


@dataclass(frozen=True)
class Options:
    """How to fetch. `layout`, `include` and `exclude` are those of `wanted_files`.

    `verify` reads files again that are known to be right; `wait` waits for another fetch of the same target instead of
    raising LockHeld; `accept_license` accepts the licence where nobody can be asked; `xet` tries Xet before HTTP.
    """

    layout: str = "hf"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    jobs: int = 8
    verify: bool = False
    wait: bool = False
    accept_license: bool = False
    xet: bool = False
    token: str | None = None
    endpoint: str | None = None
    timeout_s: float = 30.0
    policy: RetryPolicy = DEFAULT_POLICY

    @property
    def selection(self) -> dict[str, object]:
        """What the manifest remembers of the choice of files."""
        return {"layout": self.layout, "include": sorted(self.include), "exclude": sorted(self.exclude)}


DEFAULT_OPTIONS = Options()


class Job:
    """`files` of `snapshot`, to be whole and right at `target`."""

    def __init__(
        self,
        hub: Hub,
        spec: RepoSpec,
        snapshot: Snapshot,
        files: Sequence[RemoteFile],
        target: Target,
        options: Options,
        offline: bool,
    ) -> None:
        self.hub, self.spec, self.snapshot, self.files = hub, spec, snapshot, files
        self.target, self.options, self.offline = target, options, offline
        self.stop = threading.Event()

    def is_complete(self) -> bool:
        """The manifest is that of this commit and covers every file, and none has changed since."""
        known = self._manifest()
        return known is not None and all(
            file.path in known.files
            and known.files[file.path].digest == file.digest
            and self.target.state(file) == "right"
            and (self.target.folder / file.path).is_file()
            for file in self.files
        )

    def run(self) -> int:
        """Do it all; returns the bytes that came over the network. Raises as `fetch`."""
        self.target.check_owner()
        if any(self.target.state(file) == "missing" for file in self.files):
            if licence.is_llama(self.snapshot.card, self.snapshot.repo_id):
                licence.accept(self.snapshot.repo_id, self.options.accept_license)
            self.hub.check_access(self.snapshot)
            self._check_space([file for file in self.files if self.target.state(file) == "missing"])
        self.target.prepare()
        with self.target.lock(self.options.wait):
            self.target.reload()
            self.target.sweep(self.snapshot)
            right = [file for file in self.files if self.target.state(file) == "right"]
            missing = [file for file in self.files if self.target.state(file) == "missing"]
            unknown = [file for file in self.files if file not in right and file not in missing]
            if self.options.verify:
                right, unknown = [], right + unknown
            wrong = self._check(unknown)
            missing += wrong
            fetched = self._download(missing, wrong) if missing else 0
            self._complete()
        return fetched

    def preview(self) -> str:
        """The files, what is there of each, and whether the rest has room."""
        rows, states = [], {file: self.target.state(file) for file in self.files}
        words = {"right": "there", "unknown": "there, to be checked", "missing": "to fetch"}
        for file, state in states.items():
            part = part_bytes(self.target.place(file), file) if state == "missing" else 0
            rows.append(
                (file.path, format_bytes(file.size), words[state] + (f", {format_bytes(part)} there" if part else ""))
            )
        missing = [file for file, state in states.items() if state == "missing"]
        needed, free = self._needed_bytes(missing), _free_bytes(self.target.folder)
        total = [("total", format_bytes(total_bytes(self.files)), f"{format_bytes(needed)} to fetch")]
        lines = [table(rows + total, header=(self.snapshot.repo_id, "size", "state"))]
        lines.append(f"commit {self.snapshot.commit}")
        lines.append(f"into {self.target.folder}, free on that disk: {format_bytes(free)}")
        if (short := needed + SPARE_BYTES - free) > 0 and missing:
            lines.append(f"that is not enough: {format_bytes(short)} are missing")
        return "\n".join(lines)

    def _check(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """Hash files on disk; returns the wrong ones. Offline, where they cannot be replaced, raises ChecksumError."""
        wrong: list[RemoteFile] = []
        if not files:
            return wrong
        with Board("checking files", total_bytes(files)) as board:
            self.hub.say = board.say
            tasks = [partial(self._check_one, file, board, wrong) for file in files]
            run_all(tasks, min(self.options.jobs, os.cpu_count() or 1), self.stop)
        return wrong

    def _check_one(self, file: RemoteFile, board: Board, wrong: list[RemoteFile]) -> None:
        with board.file(file.path, file.size) as count:
            try:
                check_file(self.target.place(file), file, partial(self._count_until_stop, count))
            except (ChecksumError, CheckpointError, InputMissing) as error:
                if self.offline:
                    raise
                board.say(f"{error.message}; fetching it again")
                wrong.append(file)
                return
        self.target.done(file)

    def _count_until_stop(self, count: Callable[[int], None], delta: int) -> None:
        if self.stop.is_set():
            raise Stopped
        count(delta)

    def _download(self, missing: Sequence[RemoteFile], wrong: Sequence[RemoteFile]) -> int:
        self._check_space(missing)
        self.target.begin([file for file in self.files if file not in missing], wrong)
        total, needed = total_bytes(missing), self._needed_bytes(missing)
        note(
            f"{self.snapshot.repo_id} @ {self.snapshot.commit[:12]}: {len(missing)} of {len(self.files)} files, "
            f"{format_bytes(needed)} to fetch into {self.target.folder}"
        )
        with Board(self.snapshot.repo_id.split("/")[-1], total) as board:
            self.hub.say = board.say
            xet = Xet(self.hub, self.snapshot) if self.options.xet else None
            tasks = [partial(self._download_one, file, board, file in wrong, xet) for file in missing]
            run_all(tasks, self.options.jobs, self.stop, self.hub.abort)
        return needed

    def _download_one(self, file: RemoteFile, board: Board, is_wrong: bool, xet: Xet | None) -> None:
        with self.target.writing(file), board.file(file.path, file.size) as count:
            if not is_wrong and self.target.state(file) == "right":
                count(file.size)  # another program was faster
            else:
                place = self.target.place(file)
                if xet is not None:
                    xet.bring(file, place, count, self.stop)
                download(
                    self.hub, self.snapshot, file, place, on_bytes=count, stop=self.stop, policy=self.options.policy
                )
            self.target.done(file)

    def _complete(self) -> None:
        """Show every file, write the manifest, and only then let the commit be found."""
        old, entries = self._manifest(), {}
        if old is not None:
            entries = {path: e for path, e in old.files.items() if is_unchanged(self.target.folder / path, e)}
        for file in self.files:
            self.target.show(file)
            with write_errors(self.target.place(file)):
                remove_part(self.target.place(file))
                entries[file.path] = entry_of(file, self.target.folder / file.path)
        manifest = Manifest(
            self.snapshot.repo_id, self.snapshot.commit, self.hub.endpoint, entries, self.spec.revision,
            self.options.selection,
        )  # fmt: skip
        if manifest != old:
            write_manifest(self.target.folder, manifest)
        self.target.finish(self.spec.revision)

    def _manifest(self) -> Manifest | None:
        """The manifest in the folder, if it is of this commit."""
        try:
            manifest = read_manifest(self.target.folder)
        except CheckpointError:
            return None
        same = manifest is not None and (manifest.repo_id, manifest.commit) == (
            self.snapshot.repo_id,
            self.snapshot.commit,
        )
        return manifest if same else None

    def _needed_bytes(self, missing: Sequence[RemoteFile]) -> int:
        return sum(file.size - part_bytes(self.target.place(file), file) for file in missing)

    def _check_space(self, missing: Sequence[RemoteFile]) -> None:
        """Raises WriteError before the first byte when the rest has no room."""
        needed, free = self._needed_bytes(missing) + SPARE_BYTES, _free_bytes(self.target.folder)
        if needed > free:
            message = f"{self.target.folder}: {format_bytes(needed)} more are needed, {format_bytes(free)} are free"
            hint = f"free {format_bytes(needed - free)} on that disk, or choose another with -o"
            raise WriteError(message, hint=hint)


def _free_bytes(folder: Path) -> int:
    """Bytes that we may use on the disk of a folder that may not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
