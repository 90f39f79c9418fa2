"""`l4tool fetch` as a process of its own, on a repository that takes a slow server some seconds."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub.server import HubServer, Request

ROOT = Path(__file__).parents[3]
NAME = "demo/Random-Scout"
SIZES = {f"model-{number:05}-of-00003.safetensors": 2_500_000 + number for number in (1, 2, 3)}
SMALL = {"config.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n"}
RATE = 1_800_000  # bytes/s of each connection: a second and a half for three files at once
JOBS = len(SIZES)


@dataclass
class Fetcher:
    """Starts fetches from `server`, each to `out`, or to the shared cache below `home` if that is None."""

    server: HubServer
    digests: dict[str, str]  # path → SHA-256
    home: Path
    out: Path | None

    def start(self, *options: str, **popen: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "l4tool.main", "fetch", NAME, "--jobs", str(JOBS), *options]
        command += ["-o", str(self.out)] if self.out else []
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self.home)}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, **streams, **popen)

    def run(self, *options: str, **popen: Any) -> tuple[int, str]:
        """(exit code, stderr)"""
        process = self.start(*options, **popen)
        message = process.communicate(timeout=60)[1]
        assert "Traceback" not in message, message
        return process.returncode, message

    def transfers(self, since: int = 0) -> list[Request]:
        """Requests for files in LFS, the big ones, from the `since`-th request on."""
        return [request for request in self.server.requests[since:] if request.port == "cdn" and request.file]

    def sent(self, since: int = 0) -> int:
        return sum(request.sent for request in self.transfers(since))

    def wait_for_bytes(self, process: subprocess.Popen[str], count: int) -> None:
        """Until the server has sent `count` bytes of big files."""
        wait_until(lambda: self.sent() >= count or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]

    def is_right(self, path: Path, name: str) -> bool:
        return hashlib.sha256(path.read_bytes()).hexdigest() == self.digests[name]


def make_fetcher(server: HubServer, work: Path, out: Path | None) -> Fetcher:
    """A repository below `work`, served by `server`."""
    source = work / "source"
    source.mkdir()
    contents = {name: hashlib.shake_256(name.encode()).digest(size) for name, size in SIZES.items()} | SMALL
    for name, data in contents.items():
        (source / name).write_bytes(data)
    server.add_repo(NAME, source)
    return Fetcher(server, {n: hashlib.sha256(d).hexdigest() for n, d in contents.items()}, work / "home", out)


def wait_until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)
