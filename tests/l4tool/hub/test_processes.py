"""`l4tool fetch` as processes: two for one target, and disks that fill up."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from l4tool.core.atomic import part_path
from l4tool.core.errors import EXIT_CANT_WRITE, EXIT_TEMPFAIL
from l4tool.hub.manifest import MANIFEST
from tests.hub.server import HubServer
from tests.l4tool.hub.fetching import RATE, SIZES, Fetcher, make_fetcher, wait_until

TOTAL_BYTES = sum(SIZES.values())
DISK_BYTES = 40 * 2**20
CRAWL = 20_000  # bytes/s: nothing gets through while the test looks


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(rate=RATE, send_buffer_bytes=2**16) as server:
        yield server


@pytest.fixture(params=["folder", "cache"])
def fetcher(request: pytest.FixtureRequest, server: HubServer, tmp_path: Path) -> Fetcher:
    return make_fetcher(server, tmp_path, tmp_path / "out" if request.param == "folder" else None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of DISK_BYTES."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a tmpfs cannot be mounted here (it needs root)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Another program's file, that leaves `leave_bytes` free; a fetch may be writing at the same time."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        size = 0
        while (room := shutil.disk_usage(disk).free - leave_bytes) > 0:
            with contextlib.suppress(OSError):  # taken in between
                os.posix_fallocate(file.fileno(), size, room)
                size += room
    return ballast


def test_the_second_of_two_exits_75(fetcher: Fetcher) -> None:
    first = fetcher.start()
    fetcher.wait_for_bytes(first, 1)
    fetcher.server.rate = CRAWL
    code, message = fetcher.run()
    assert code == EXIT_TEMPFAIL and "wait for it" in message, message
    fetcher.server.rate = None
    assert first.wait(60) == 0, first.communicate()
    assert fetcher.sent() == TOTAL_BYTES
    assert fetcher.run()[0] == 0


@pytest.mark.parametrize("end", ["through", "killed"])
def test_the_second_of_two_waits(fetcher: Fetcher, end: str) -> None:
    """And finds everything done; or takes over, with every byte that the killed one has written."""
    first = fetcher.start()
    fetcher.wait_for_bytes(first, TOTAL_BYTES // 3)
    fetcher.server.rate = CRAWL
    second = fetcher.start("--wait")
    wait_until(lambda: second.stderr is not None and "wait" in second.stderr.readline())
    assert second.poll() is None
    before = len(fetcher.server.requests)
    if end == "killed":
        first.send_signal(signal.SIGKILL)
    fetcher.server.rate = None
    first.communicate(timeout=60)
    message = second.communicate(timeout=60)[1]
    assert second.returncode == 0, message
    if end == "killed":
        resumed = [request.range for request in fetcher.transfers(before)]
        assert len(resumed) == len(SIZES) and all(resumed)
    else:
        assert fetcher.sent() == TOTAL_BYTES
    assert fetcher.run()[0] == 0 and fetcher.sent(before) <= TOTAL_BYTES


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(server: HubServer, small_disk: Path) -> None:
    fetcher = make_fetcher(server, small_disk.parent, small_disk / "out")
    ballast = fill(small_disk, leave_bytes=5_000_000)
    code, message = fetcher.run()
    assert code == EXIT_CANT_WRITE and "free" in message, message
    assert not fetcher.sent() and not list(small_disk.rglob("*.part"))
    ballast.unlink()
    server.rate = None
    assert fetcher.run()[0] == 0


def test_a_disk_that_fills_up_on_the_way(server: HubServer, small_disk: Path) -> None:
    """Exit 73; nothing wrong under a final name; with room again it carries on with what it has."""
    fetcher = make_fetcher(server, small_disk.parent, small_disk / "out")
    process = fetcher.start()
    fetcher.wait_for_bytes(process, TOTAL_BYTES // 3)
    ballast = fill(small_disk)
    server.rate = None
    message = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_CANT_WRITE and "Traceback" not in message, message
    assert "space" in message
    assert_carries_on(fetcher, small_disk / "out", ballast.unlink)


def test_a_file_size_limit(server: HubServer, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: as a full disk, where none can be mounted."""
    fetcher = make_fetcher(server, tmp_path, tmp_path / "out")
    server.rate = None

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    code, message = fetcher.run(preexec_fn=limit)
    assert code == EXIT_CANT_WRITE and "ulimit -f" in message, message
    assert_carries_on(fetcher, tmp_path / "out", lambda: None)


def assert_carries_on(fetcher: Fetcher, out: Path, make_room: Callable[[], object]) -> None:
    """Parts are there and nothing else of the big files; the next run asks for what they lack."""
    assert not (out / MANIFEST).exists()
    parts = {name: part_path(out / name) for name in SIZES}
    assert not [name for name in SIZES if (out / name).exists()]
    sizes = {name: part.stat().st_size for name, part in parts.items() if part.exists()}
    assert sum(sizes.values()) > 0
    before = len(fetcher.server.requests)
    fetcher.server.rate = None
    make_room()
    code, message = fetcher.run()
    assert code == 0, message
    for request in fetcher.transfers(before):
        size = sizes.get(request.file or "", 0)
        assert request.range == (f"bytes={size}-" if size else None)
    for name in fetcher.digests:
        assert fetcher.is_right(out / name, name)
