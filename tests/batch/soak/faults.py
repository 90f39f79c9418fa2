"""What can happen to a run's files: a kill, a failing call or a power cut at a chosen system call. For child processes.

`Disk` remembers what a disk would hold: the bytes that were there at the last sync of each file, and the names that
were there at the last sync of the folder. After a power cut everything else may be old, new or zero, sector by sector.
"""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 512
CALLS = ("write", "fdatasync", "fsync", "replace", "ftruncate")
REAL = {name: getattr(os, name) for name in CALLS}


@dataclass(frozen=True)
class Fault:
    """At the `number`-th `call` on the run's files: 'kill' before it, after it or 'torn' in the middle of a write, or
    an error number for `times` calls."""

    call: str
    number: int
    action: str | int
    times: int = 1


class Disk:
    """Durable images of the files of one folder, kept in `store` (another folder of the same file system)."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self.clean_to: dict[int, int] = {}  # inode → bytes that are as they were at its last sync
        store.mkdir(exist_ok=True)

    def image(self, inode: int) -> Path:
        return self.store / f"inode-{inode}"

    def changed(self, inode: int, offset: int) -> None:
        if inode in self.clean_to:
            self.clean_to[inode] = min(self.clean_to[inode], offset)

    def synced(self, fd: int) -> None:
        """The file's bytes, or the folder's names, are durable now."""
        path, inode = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_ino
        if path == self.folder:
            self._save_names({p.name: p.stat().st_ino for p in self.folder.iterdir() if p.is_file()})
            return
        size, image = os.fstat(fd).st_size, self.image(inode)
        start = min(self.clean_to.get(inode, 0), size)
        if start == 0 or not image.exists():
            part = image.with_suffix(".new")
            part.write_bytes(path.read_bytes())
            REAL["replace"](part, image)
        else:
            with open(image, "r+b") as file, open(path, "rb") as now:
                now.seek(start)
                file.seek(start)
                file.write(now.read(size - start))
                file.truncate()
        self.clean_to[inode] = size

    def replacing(self, path: Path) -> None:
        """Keep the file that is about to lose its name: on the disk it may have it still."""
        if path.parent == self.folder and path.exists():
            kept = self.store / f"kept-{path.stat().st_ino}"
            if not kept.exists():
                os.link(path, kept)

    def names(self) -> dict[str, int]:
        path = self.store / "names.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _save_names(self, names: dict[str, int]) -> None:
        part = self.store / "names.new"
        part.write_text(json.dumps(names))
        REAL["replace"](part, self.store / "names.json")

    def power_cut(self, draw: random.Random) -> None:
        """Leave in the folder what a disk might hold; that is durable then."""
        now = {p.name: p.stat().st_ino for p in self.folder.iterdir() if p.is_file()}
        before, found, chosen = self.names(), {}, {}
        for name in {**before, **now}:
            place = name.removesuffix(".part")  # a rename changes both of its names or none, on every file system
            if place not in chosen:
                chosen[place] = draw.choice([before, now])
            inode = chosen[place].get(name)
            if inode is not None:
                found[name] = self._mixed(inode, now, draw)
        for name in now:
            (self.folder / name).unlink()
        self.settle(found)

    def settle(self, contents: dict[str, bytes]) -> None:
        """These are the folder's files, and durable."""
        shutil.rmtree(self.store)
        self.store.mkdir()
        for name, data in contents.items():
            (self.folder / name).write_bytes(data)
            self.image((self.folder / name).stat().st_ino).write_bytes(data)
        self._save_names({name: (self.folder / name).stat().st_ino for name in contents})
        self.clean_to.clear()

    def _mixed(self, inode: int, now: dict[str, int], draw: random.Random) -> bytes:
        """A file's bytes on the disk: each sector as it was at the last sync, or as it is now."""
        old = self.image(inode).read_bytes() if self.image(inode).exists() else b""
        names = [name for name, number in now.items() if number == inode]
        path = self.folder / names[0] if names else self.store / f"kept-{inode}"
        new = path.read_bytes() if path.exists() else old
        size = draw.choice([len(old), len(new), draw.randint(min(len(old), len(new)), max(len(old), len(new)))])
        if draw.random() < 0.3:
            return (new if draw.random() < 0.5 else old).ljust(size, b"\0")[:size]
        old, new = old.ljust(size, b"\0")[:size], new.ljust(size, b"\0")[:size]
        keep = draw.random()
        return b"".join(
            (new if draw.random() < keep else old)[at : at + SECTOR_BYTES] for at in range(0, size, SECTOR_BYTES)
        )


class Injector:
    """Stands between this process and its files; `disk` may be None where power cuts are not asked for."""

    def __init__(self, folder: Path, fault: Fault | None, disk: Disk | None) -> None:
        self.folder, self.fault, self.disk = folder, fault, disk
        self.count = 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, getattr(self, name))

    def _is_ours(self, target: "int | str | Path") -> bool:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(target)
        return path == str(self.folder) or os.path.dirname(path) == str(self.folder)

    def _before(self, call: str, target: "int | str | Path") -> bool:
        """False for files of others. May kill, or raise OSError; a kill after the call is left to `_after`."""
        if not self._is_ours(target):
            return False
        fault = self.fault
        if fault is not None and fault.call == call:
            self.count += 1
            if self.count >= fault.number and isinstance(fault.action, int):
                if self.count < fault.number + fault.times:
                    raise OSError(fault.action, os.strerror(fault.action))
            elif self.count == fault.number and fault.action == "before":
                os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _after(self, call: str) -> None:
        fault = self.fault
        if fault is not None and (fault.call, fault.action) == (call, "after") and self.count == fault.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, fd: int, data: bytes) -> int:
        if not self._is_ours(fd):
            return REAL["write"](fd, data)
        fault, view = self.fault, memoryview(data)
        if fault is not None and fault.call == "write" and self.count + 1 == fault.number:
            if fault.action == "torn":
                self.count += 1
                REAL["write"](fd, view[: max(1, len(view) // 2)])
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.action == errno.ENOSPC and len(view) > 1:  # a full disk takes a part first, and then says so
                self.fault = Fault("write", fault.number + 1, fault.action, fault.times)
                view = view[: len(view) // 3 or 1]
        self._before("write", fd)
        if self.disk is not None:
            self.disk.changed(os.fstat(fd).st_ino, os.lseek(fd, 0, os.SEEK_CUR))
        written = REAL["write"](fd, view)
        self._after("write")
        return written

    def ftruncate(self, fd: int, size: int) -> None:
        ours = self._before("ftruncate", fd)
        if ours and self.disk is not None:
            self.disk.changed(os.fstat(fd).st_ino, size)
        REAL["ftruncate"](fd, size)
        if ours:
            self._after("ftruncate")

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _sync(self, call: str, fd: int) -> None:
        """The disk is modelled, so nothing waits for the real one."""
        if self._before(call, fd):
            if self.disk is not None:
                self.disk.synced(fd)
            self._after(call)

    def replace(self, source: "str | Path", target: "str | Path") -> None:
        ours = self._before("replace", target)
        if ours and self.disk is not None:
            self.disk.replacing(Path(target))
        REAL["replace"](source, target)
        if ours:
            self._after("replace")
