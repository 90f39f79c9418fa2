"""kill -9 of the real `l4tool fetch` at random moments: it carries on at the byte, and only right files get their name.

python -m tests.l4tool.hub.test_kill 200        that many kills, and what they cost
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from l4tool.core.atomic import PART_SUFFIX
from l4tool.hub.manifest import MANIFEST
from l4tool.hub.part import LEDGER_SUFFIX
from tests.hub.server import HubServer
from tests.l4tool.hub.fetching import RATE, SIZES, Fetcher, make_fetcher, wait_until

LOST_S = 0.5  # what a kill may lose: bytes received, but not yet written


@dataclass
class Killer:
    """Fetches to one place, killed again and again."""

    fetcher: Fetcher
    dice: random.Random
    kills: int = 0
    finished: int = 0  # runs that were through before they were to be killed
    lost_bytes: int = 0
    resumed_bytes: int = 0
    in_transfer: int = 0  # kills while big files were coming in

    def kill_once(self) -> None:
        """One run, killed at a random moment: mostly while it transfers, sometimes while it starts or ends."""
        before, parts = len(self.fetcher.server.requests), self.sizes()
        process = self.fetcher.start()
        if self.dice.random() < 0.85:
            wait_until(lambda: process.poll() is not None or self.fetcher.sent(before))
        time.sleep(self.dice.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        message = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), message
        self.check_resumed(before, parts)
        self.check_published()
        if process.returncode == 0:
            self.check_complete()
            self.finished += 1
            shutil.rmtree(self.place)
        else:
            self.kills += 1
            self.in_transfer += 0 < self.fetcher.sent(before) < sum(SIZES.values()) - sum(parts.values())
            self.lost_bytes += self.fetcher.sent(before) - (sum(self.sizes().values()) - sum(parts.values()))

    @property
    def place(self) -> Path:
        """The folder with everything that a fetch writes."""
        return self.fetcher.out or self.fetcher.home / "hub" / "models--demo--Random-Scout"

    @property
    def folder(self) -> Path | None:
        """Where the files are seen under their names."""
        return self.fetcher.out or next((self.place / "snapshots").glob("*"), None)

    def final(self, name: str) -> Path:
        """What the bytes of a big file are called when they are complete."""
        return self.fetcher.out / name if self.fetcher.out else self.place / "blobs" / self.fetcher.digests[name]

    def sizes(self) -> dict[str, int]:
        """Bytes of the big files that are on disk, in parts or finished."""
        sizes = {}
        for name in SIZES:
            path = self.final(name)
            part = path.with_name(path.name + PART_SUFFIX)
            sizes[name] = next((p.stat().st_size for p in (path, part) if p.exists()), 0)
        return sizes

    def check_resumed(self, before: int, parts: dict[str, int]) -> None:
        """The first request for a file asks for exactly what the part does not have yet."""
        asked: dict[str, str | None] = {}
        for request in self.fetcher.transfers(before):
            asked.setdefault(request.file or "", request.range)
        for name, header in asked.items():
            assert parts[name] < SIZES[name], f"{name} was whole and is fetched again"
            assert header == (f"bytes={parts[name]}-" if parts[name] else None), name
            self.resumed_bytes += parts[name]

    def check_published(self) -> None:
        """What has its final name is right; a manifest means that everything has."""
        for name in SIZES:
            assert not self.final(name).exists() or self.fetcher.is_right(self.final(name), name)
        if self.folder is not None and (self.folder / MANIFEST).exists():
            self.check_complete()

    def check_complete(self) -> None:
        assert self.folder is not None and (self.folder / MANIFEST).exists()
        for name in self.fetcher.digests:
            assert self.fetcher.is_right(self.folder / name, name)
        left = [path for path in self.place.rglob("*") if path.name.endswith((PART_SUFFIX, LEDGER_SUFFIX))]
        assert not left

    def finish(self) -> None:
        """Nobody kills this one, and the server is fast; the next one finds nothing to do."""
        self.fetcher.server.rate = None
        before, parts = len(self.fetcher.server.requests), self.sizes()
        for missing in (sum(SIZES.values()) - sum(parts.values()), 0):
            since = len(self.fetcher.server.requests)
            code, message = self.fetcher.run()
            assert code == 0, message
            assert self.fetcher.sent(since) == missing
        self.check_resumed(before, parts)
        self.check_complete()
        lost = f"{self.kills} kills lost {self.lost_bytes:,} bytes"
        assert self.lost_bytes <= self.kills * len(SIZES) * RATE * LOST_S, lost
        assert self.resumed_bytes and self.in_transfer


def kill(kills: int, work: Path, to_cache: bool = False) -> Killer:
    with HubServer(rate=RATE, send_buffer_bytes=2**16) as server:
        killer = Killer(make_fetcher(server, work, None if to_cache else work / "out"), random.Random(kills))
        while killer.kills < kills:
            killer.kill_once()
        killer.finish()
        return killer


@pytest.mark.parametrize("to_cache", [False, True], ids=["folder", "cache"])
def test_killed_again_and_again(tmp_path: Path, to_cache: bool) -> None:
    kill(6, tmp_path, to_cache)


@pytest.mark.slow
def test_killed_200_times(tmp_path: Path) -> None:
    kill(200, tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        done = kill(int(sys.argv[1]), Path(temporary))
    print(f"{done.kills} kills, {done.in_transfer} of them in transfer; every file right, every request at the byte")
    print(f"{done.finished} fetches got through and began anew; {done.resumed_bytes:,} bytes were resumed")
    print(f"{done.lost_bytes / done.kills:,.0f} bytes lost per kill")
