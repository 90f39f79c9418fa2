"""Where fetched files go: a plain folder, or the cache that all Hugging Face libraries share, in its own layout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from l4tool.core.atomic import PART_SUFFIX, fsync_dir, part_path, write_errors
from l4tool.core.errors import CheckpointError, WriteError
from l4tool.core.lock import file_lock, output_lock
from l4tool.core.placeholder import filled, is_placeholder
from l4tool.hub.client import RemoteFile, Snapshot
from l4tool.hub.local import cache_folder
from l4tool.hub.manifest import MANIFEST, Entry, Manifest, entry_of, is_unchanged, read_manifest
from l4tool.hub.part import LEDGER_SUFFIX, read_ledger, remove_part
from l4tool.hub.selection import STATE, path_problem
from l4tool.hub.xet import FOLDER_SUFFIX

QUANTIZED = ("l4tool-report.json", "l4tool-journal.jsonl")  # what quantize leaves in its outputs
# right: known to be; unknown: there in its size, bytes not checked; missing: absent or of another size
State = Literal["right", "unknown", "missing"]


class Target(Protocol):
    """One place for one snapshot. `folder` is where the files are seen under their own names."""

    folder: Path

    def prepare(self) -> None:
        """Make the folders that the lock needs."""

    def check_owner(self) -> None:
        """Raises WriteError for a place that holds something else."""

    def lock(self, wait: bool) -> contextlib.AbstractContextManager[None]:
        """Keep other fetches of the same target out. Raises LockHeld."""

    def reload(self) -> None:
        """Read again what is known about the files: another run may have gone by."""

    def state(self, file: RemoteFile) -> State: ...

    def place(self, file: RemoteFile) -> Path:
        """Where the bytes are written."""

    def writing(self, file: RemoteFile) -> contextlib.AbstractContextManager[None]:
        """Held while the file is downloaded, against other programs."""

    def done(self, file: RemoteFile) -> None:
        """The bytes at `place` are right: remember it, and `show` the file."""

    def show(self, file: RemoteFile) -> None:
        """The file is to be seen in `folder`."""

    def sweep(self, snapshot: Snapshot) -> None:
        """Remove what killed runs have left and no file of the snapshot can use."""

    def begin(self, kept: Iterable[RemoteFile], wrong: Iterable[RemoteFile]) -> None:
        """Files are about to change: the folder is no longer complete. `kept` are right, `wrong` must not be used."""

    def finish(self, spec_revision: str | None) -> None:
        """Every file is there."""


class FolderTarget:
    """A plain folder. `.l4tool-fetch/done.jsonl` says which files are finished while the manifest is not there."""

    def __init__(self, folder: Path, repo_id: str = "") -> None:
        self.folder, self.repo_id = folder, repo_id
        self._owner = folder / STATE / "repository"
        self._ledger = folder / STATE / "done.jsonl"
        self._mutex = threading.Lock()
        self.reload()

    def prepare(self) -> None:
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def check_owner(self) -> None:
        """Another repository's files, or a quantized checkpoint, would be overwritten name by name."""
        owner = None
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(self.folder)
            owner = manifest.repo_id if manifest is not None else None
        with contextlib.suppress(OSError):
            owner = owner or self._owner.read_text().strip()
        if any((self.folder / name).exists() for name in QUANTIZED):
            owner = "a quantized checkpoint"
        if owner not in (None, "", self.repo_id):
            raise WriteError(f"{self.folder} holds {owner}, not {self.repo_id}", hint="choose another folder with -o")

    def lock(self, wait: bool) -> contextlib.AbstractContextManager[None]:
        return output_lock(self.folder, wait)

    def reload(self) -> None:
        """The files of the manifest, then those of an unfinished run."""
        self._known: dict[str, Entry] = {}
        with contextlib.suppress(CheckpointError):
            manifest = read_manifest(self.folder)
            self._known.update(manifest.files if manifest is not None else {})
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for line in self._ledger.read_text().splitlines():
                record = json.loads(line)
                path = record.pop("path")
                self._known[path] = Entry(**record)

    def state(self, file: RemoteFile) -> State:
        path, known = self.place(file), self._known.get(file.path)
        if not path.is_file():
            return "missing"
        if known is not None and known.digest == file.digest and is_unchanged(path, known):
            return "right"
        return "unknown" if path.stat().st_size == file.size else "missing"

    def place(self, file: RemoteFile) -> Path:
        """Raises WriteError where a symlink inside the folder leads out of it."""
        path = self.folder / file.path
        root = self.folder.resolve()
        if root != (parent := path.parent.resolve()) and root not in parent.parents:
            raise WriteError(f"{path.parent} leads out of {self.folder}", hint="remove that symlink")
        return path

    @contextlib.contextmanager
    def writing(self, file: RemoteFile) -> Iterator[None]:
        if self.place(file).is_dir():
            raise WriteError(f"{self.place(file)} is a folder, but a file must go there", hint="move it away")
        yield

    def done(self, file: RemoteFile) -> None:
        with self._mutex, write_errors(self._ledger):
            entry = entry_of(file, self.place(file))
            self._known[file.path] = entry
            self._ledger.parent.mkdir(exist_ok=True)
            with open(self._ledger, "a") as ledger:
                ledger.write(json.dumps({"path": file.path, **entry.as_json()}) + "\n")
        if is_placeholder(self.place(file)):
            filled(self.place(file))

    def show(self, file: RemoteFile) -> None:
        """It lies where it is seen."""

    def sweep(self, snapshot: Snapshot) -> None:
        paths = [Path(file.path) for file in snapshot.files if path_problem(file.path) is None]
        for folder in {self.folder, *(self.folder / path.parent for path in paths)}:
            sweep_parts(folder, snapshot)

    def begin(self, kept: Iterable[RemoteFile], wrong: Iterable[RemoteFile]) -> None:
        """The ledger takes over what the manifest knew, without the wrong ones."""
        with write_errors(self._ledger):
            self._ledger.unlink(missing_ok=True)
            self._ledger.parent.mkdir(exist_ok=True)
            self._owner.write_text(self.repo_id + "\n")
        for file in kept:
            self.done(file)
        for file in wrong:
            self._known.pop(file.path, None)
        with write_errors(self.folder / MANIFEST):
            (self.folder / MANIFEST).unlink(missing_ok=True)

    def finish(self, spec_revision: str | None) -> None:
        with contextlib.suppress(OSError):
            self._ledger.unlink(missing_ok=True)
            self._owner.unlink(missing_ok=True)
            self._ledger.parent.rmdir()


class CacheTarget:
    """The shared cache: bytes in blobs/HASH, symlinks to them in snapshots/COMMIT, the commit in refs/REVISION."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.root = cache_folder(snapshot.repo_id)
        self.commit = snapshot.commit
        self.folder = self.root / "snapshots" / snapshot.commit
        self._locks = self.root.parent / ".locks" / self.root.name
        self.reload()

    def reload(self) -> None:
        self._known: Manifest | None = None
        with contextlib.suppress(CheckpointError):
            self._known = read_manifest(self.folder)

    def prepare(self) -> None:
        for folder in (self.root / "blobs", self.folder, self._locks):
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def check_owner(self) -> None:
        """The folder's name is the repository's."""

    def lock(self, wait: bool) -> contextlib.AbstractContextManager[None]:
        return file_lock(self._locks / "l4tool-fetch.lock", f"another run is fetching into {self.root}", wait)

    def state(self, file: RemoteFile) -> State:
        """A blob has its name only since it was found right, by us or by huggingface_hub: its size is enough."""
        path = self.place(file)
        try:
            if path.stat().st_size != file.size:
                return "missing"
        except OSError:
            return "missing"
        known = self._known.files.get(file.path) if self._known is not None else None
        return "right" if known is None or is_unchanged(path, known) else "unknown"

    def place(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / file.digest

    @contextlib.contextmanager
    def writing(self, file: RemoteFile) -> Iterator[None]:
        from huggingface_hub.utils import WeakFileLock

        with WeakFileLock(self._locks / f"{file.digest}.lock"):
            yield

    def done(self, file: RemoteFile) -> None:
        """The blob's name says that it is right."""
        self.show(file)

    def show(self, file: RemoteFile) -> None:
        link, blob = self.folder / file.path, self.place(file)
        relative = os.path.relpath(blob, link.parent)
        with write_errors(link):
            if link.is_symlink() and os.readlink(link) == relative:
                return
            link.parent.mkdir(parents=True, exist_ok=True)
            fresh = link.with_name(f"{link.name}.{os.getpid()}.new")
            fresh.unlink(missing_ok=True)
            os.symlink(relative, fresh)
            os.replace(fresh, link)
            fsync_dir(link.parent)

    def sweep(self, snapshot: Snapshot) -> None:
        sweep_parts(self.root / "blobs", snapshot)

    def begin(self, kept: Iterable[RemoteFile], wrong: Iterable[RemoteFile]) -> None:
        for file in wrong:
            with write_errors(self.place(file)):
                self.place(file).unlink(missing_ok=True)
        with write_errors(self.folder / MANIFEST):
            (self.folder / MANIFEST).unlink(missing_ok=True)

    def finish(self, spec_revision: str | None) -> None:
        """Name the commit, as huggingface_hub does: now the libraries find it."""
        ref = self.root / "refs" / (spec_revision or "main")
        if spec_revision == self.commit:
            return
        with write_errors(ref):
            if ref.is_file() and ref.read_text() == self.commit:
                return
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            fresh.write_text(self.commit)
            os.replace(fresh, ref)


def sweep_parts(folder: Path, snapshot: Snapshot) -> None:
    """Remove the parts in `folder` whose content no file of the snapshot has, and ledgers without a part."""
    digests = {file.digest for file in snapshot.files}
    for left in list(folder.glob(f"*{PART_SUFFIX}{FOLDER_SUFFIX}")):
        shutil.rmtree(left, ignore_errors=True)
    for ledger in list(folder.glob(f"*{PART_SUFFIX}{LEDGER_SUFFIX}")):
        part = ledger.with_name(ledger.name.removesuffix(LEDGER_SUFFIX))
        target = part.with_name(part.stem)
        if part != part_path(target) or ledger.is_symlink():
            continue
        if not part.is_file() or read_ledger(ledger)[0].get("digest") not in digests:
            with write_errors(part):
                remove_part(target)
