"""kill -9 of the real `l4tool fetch` at random moments: it carries on at the byte, and only right files get their name.

python -m tests.l4tool.hub.test_kill 200        that many kills, and what they cost
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from l4tool.core.atomic import PART_SUFFIX
from l4tool.hub.manifest import MANIFEST
from l4tool.hub.part import LEDGER_SUFFIX
from tests.hub.server import HubServer

ROOT = Path(__file__).parents[3]
NAME = "demo/Random-Scout"
SIZES = {f"model-{number:05}-of-00003.safetensors": 2_500_000 + number for number in (1, 2, 3)}
SMALL = {"config.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n"}
RATE = 900_000  # bytes/s of each connection: a run that nobody kills transfers for three seconds
LOST_S = 0.5  # what a kill may lose: bytes received, but not yet written


@dataclass
class Killer:
    """Fetches from a slow server to one place, killed again and again."""

    server: HubServer
    digests: dict[str, str]  # path → SHA-256
    home: Path
    out: Path | None  # None: the shared cache
    dice: random.Random
    kills: int = 0
    finished: int = 0  # runs that were through before they were to be killed
    lost_bytes: int = 0
    resumed_bytes: int = 0
    ends: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "l4tool.main", "fetch", NAME, "--jobs", "3"]
        command += ["-o", str(self.out)] if self.out else []
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self.home)}
        return subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)

    def kill_once(self) -> None:
        """One run, killed at a random moment: mostly while it transfers, sometimes while it starts or ends."""
        before, parts = len(self.server.requests), self.parts()
        process = self.start()
        if self.dice.random() < 0.85:
            while process.poll() is None and not self.transfers(before):
                time.sleep(0.01)
        time.sleep(self.dice.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        message = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), message
        self.check_resumed(before, parts)
        self.check_published()
        if process.returncode == 0:
            self.check_complete()
            self.finished += 1
            self.wipe()
        else:
            self.kills += 1
            self.count_lost(before, parts)

    def transfers(self, before: int) -> list[str]:
        return [r.file for r in self.server.requests[before:] if r.port == "cdn" and r.sent and r.file]

    def place(self, name: str) -> Path:
        """Where the bytes of a file get their final name."""
        return self.out / name if self.out else self.repo / "blobs" / self.digests[name]

    @property
    def repo(self) -> Path:
        return self.home / "hub" / "models--demo--Random-Scout"

    def parts(self) -> dict[str, int]:
        """Bytes that are on disk: of parts, and of finished files."""
        sizes = {}
        for name in SIZES:
            path = self.place(name)
            part = path.with_name(path.name + PART_SUFFIX)
            sizes[name] = next((p.stat().st_size for p in (path, part) if p.exists()), 0)
        return sizes

    def check_resumed(self, before: int, parts: dict[str, int]) -> None:
        """The first request for a file asks for exactly what the part does not have yet."""
        asked: dict[str, str | None] = {}
        for request in self.server.requests[before:]:
            if request.port == "cdn" and request.file:
                asked.setdefault(request.file, request.range)
        for name, header in asked.items():
            assert parts[name] < SIZES[name], f"{name} was whole and is fetched again"
            assert header == (f"bytes={parts[name]}-" if parts[name] else None), name
            self.resumed_bytes += parts[name]

    def check_published(self) -> None:
        """What has its final name is right; a manifest means that all of them have."""
        wrong = [name for name in self.digests if self.place(name).exists() and not self.is_right(name)]
        assert not wrong
        folder = self.out or next((self.repo / "snapshots").glob("*"), None)
        if folder is not None and (folder / MANIFEST).exists():
            assert all(self.is_right(name) for name in self.digests)

    def is_right(self, name: str) -> bool:
        path = self.place(name)
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == self.digests[name]

    def count_lost(self, before: int, parts: dict[str, int]) -> None:
        sent = sum(r.sent for r in self.server.requests[before:] if r.port == "cdn")
        self.lost_bytes += sent - (sum(self.parts().values()) - sum(parts.values()))

    def check_complete(self) -> None:
        folder = self.out or next((self.repo / "snapshots").glob("*"))
        for name, digest in self.digests.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert (folder / MANIFEST).exists()
        for place in {folder, self.place(MANIFEST).parent} if self.out else {folder, self.repo / "blobs"}:
            left = [path.name for path in place.rglob("*") if path.name.endswith((PART_SUFFIX, LEDGER_SUFFIX))]
            assert not left

    def finish(self) -> None:
        """Nobody kills this one, and the server is fast; the next one finds nothing to do."""
        self.server.rate = None
        before, parts = len(self.server.requests), self.parts()
        for expected in (sum(SIZES.values()) - sum(parts.values()), 0):
            mark = len(self.server.requests)
            process = self.start()
            message = process.communicate(timeout=60)[1]
            assert process.returncode == 0, message
            assert sum(r.sent for r in self.server.requests[mark:] if r.port == "cdn") == expected
        self.check_resumed(before, parts)
        self.check_complete()

    def wipe(self) -> None:
        subprocess.run(["rm", "-rf", str(self.out or self.repo)], check=True)

    def check_loss(self) -> None:
        """Together the kills lose less than what three connections bring in LOST_S each."""
        assert self.lost_bytes <= self.kills * len(SIZES) * RATE * LOST_S, f"{self.kills} kills: {self.lost_bytes:,}"


def make_killer(server: HubServer, work: Path, to_cache: bool, seed: int) -> Killer:
    source = work / "source"
    source.mkdir()
    contents = {name: hashlib.shake_256(name.encode()).digest(size) for name, size in SIZES.items()} | SMALL
    for name, data in contents.items():
        (source / name).write_bytes(data)
    server.add_repo(NAME, source)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    if to_cache:  # blobs are named by the hub's own hashes
        digests = {name: digest for name, digest in digests.items() if name in SIZES}
    return Killer(server, digests, work / "home", None if to_cache else work / "out", random.Random(seed))


@pytest.mark.parametrize("to_cache", [False, True], ids=["folder", "cache"])
def test_killed_again_and_again(tmp_path: Path, to_cache: bool) -> None:
    with HubServer(rate=RATE, send_buffer_bytes=2**16) as server:
        killer = make_killer(server, tmp_path, to_cache, seed=int(to_cache))
        while killer.kills < 6:
            killer.kill_once()
        killer.finish()
        killer.check_loss()
        assert killer.resumed_bytes > 0


@pytest.mark.slow
def test_killed_200_times(tmp_path: Path) -> None:
    assert run(200, tmp_path).kills == 200


def run(kills: int, work: Path) -> Killer:
    with HubServer(rate=RATE, send_buffer_bytes=2**16) as server:
        killer = make_killer(server, work, to_cache=False, seed=kills)
        while killer.kills < kills:
            killer.kill_once()
        killer.finish()
        killer.check_loss()
        return killer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        done = run(int(sys.argv[1]), Path(folder))
    print(f"{done.kills} kills, {done.finished} fetches got through and began anew, every file right")
    print(f"{done.resumed_bytes:,} bytes resumed, {done.lost_bytes / done.kills:,.0f} bytes lost per kill")
