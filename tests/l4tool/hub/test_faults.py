"""Every fault of the hub × every state an earlier run can leave: the file is right at the end, or it is not there."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from l4tool.core.atomic import part_path
from l4tool.core.errors import ChecksumError, L4Error, NetworkError, RateLimited
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.fetch import fetch
from l4tool.hub.job import Options
from l4tool.hub.manifest import MANIFEST
from l4tool.hub.names import RepoSpec
from l4tool.hub.transfer import download
from l4tool.hub.transport import RetryPolicy, Stopped
from tests.hub.server import HubServer

NAME = "demo/Random-Scout"
WEIGHTS = "model-00001-of-00001.safetensors"  # in LFS: redirected to the CDN, checked by its SHA-256
TOKENIZER = "tokenizer.json"  # in git: served by the hub, checked by git's SHA-1
DATA = {name: hashlib.shake_256(name.encode()).digest(900_001) for name in (WEIGHTS, TOKENIZER)}
HALF = 400_000
QUICK = RetryPolicy(base_delay_s=0.01, max_delay_s=0.02)
TIMEOUT_S = 0.25


@dataclass
class Case:
    """A server with one fault, and a client that meets it."""

    server: HubServer
    hub: Hub
    snapshot: Snapshot
    target: Path
    said: list[str] = field(default_factory=list)

    def download(self, name: str, stop: threading.Event | None = None, stop_at: int | None = None) -> int:
        """Download to `target`; returns what `on_bytes` added up to."""
        counted = [0]

        def on_bytes(delta: int) -> None:
            counted[0] += delta
            if stop and stop_at is not None and counted[0] >= stop_at:
                stop.set()

        file = self.snapshot.file(name)
        download(self.hub, self.snapshot, file, self.target, on_bytes=on_bytes, stop=stop)
        return counted[0]

    def leave_half(self, name: str) -> None:
        """An earlier run that got HALF of the file."""
        cut = self.server.faults.add(name, "cut", times=None, after_bytes=HALF)
        with pytest.raises(Stopped):
            self.download(name, threading.Event(), stop_at=HALF)
        assert cut.struck == 1 and part_path(self.target).stat().st_size == HALF
        self.server.faults.clear()
        self.server.requests.clear()

    def assert_right(self, name: str) -> None:
        """The whole file and nothing else is there, and the token stayed on the hub."""
        assert self.target.read_bytes() == DATA[name]
        assert [path.name for path in self.target.parent.iterdir()] == [self.target.name]
        tokens = {(request.port, request.authorization) for request in self.server.requests}
        assert tokens <= {("hub", "Bearer good-token"), ("cdn", None)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo")
    for name, data in DATA.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(NAME, folder)
        yield server


@pytest.fixture
def case(server: HubServer, tmp_path: Path) -> Iterator[Case]:
    said: list[str] = []
    hub = Hub(server.url, token="good-token", timeout_s=TIMEOUT_S, policy=QUICK, say=said.append)
    (tmp_path / "out").mkdir()
    snapshot = hub.snapshot(RepoSpec(NAME))
    server.requests.clear()
    yield Case(server, hub, snapshot, tmp_path / "out" / "file", said)
    server.faults.clear()


# Once each. (kind, where, options); where None: the CDN for the weights, the hub for the tokenizer.
PASSING: list[tuple[str, str | None, dict[str, Any]]] = [
    ("status", "resolve", {"status": 500}),
    ("status", "resolve", {"status": 503, "retry_after": "0"}),
    ("status", "resolve", {"status": 429, "retry_after": "0", "times": 3}),
    ("status", "resolve", {"status": 408}),
    ("status", None, {"status": 502, "times": 3}),
    ("status", "cdn", {"status": 403}),  # a signed address that has expired
    ("drop", "resolve", {"times": 3}),
    ("drop", None, {}),
    ("hang", "resolve", {}),
    ("hang", None, {}),
    ("redirect-loop", "resolve", {}),
    ("wrong-etag", "resolve", {}),
    ("wrong-etag", "cdn", {}),
    ("html", "resolve", {}),
    ("html", None, {}),
    ("cut", None, {"after_bytes": 0, "times": 3}),
    ("cut", None, {"after_bytes": 100_000, "times": 8}),
    ("reset", None, {"after_bytes": 100_000, "times": 8}),
    ("stall", None, {"after_bytes": 100_000}),
    ("slow", None, {"bytes_per_s": 3_000_000}),
    ("short", None, {"after_bytes": 1}),
    ("wrong-bytes", None, {"after_bytes": 0}),
    ("wrong-bytes", None, {"after_bytes": 850_000}),
    ("no-range", None, {}),
    ("wrong-range", None, {}),
    ("other-range", None, {}),
    ("no-length", None, {}),
]


def both_files(faults: list[Any]) -> list[Any]:
    """Each fault for a file in LFS and for one in git; those of the CDN are not met by files in git."""
    return [(*fault, name) for fault in faults for name in DATA if not (name == TOKENIZER and fault[1] == "cdn")]


STATES = ("fresh", "half", "spoilt", "foreign", "overlong")


def in_each_state(cases: list[Any]) -> list[Any]:
    """Resuming is the same code for both kinds of file: those in git are spared the rarer states."""
    return [(*case, state) for case in cases for state in (STATES if case[-1] == WEIGHTS else STATES[:2])]


def put_state(case: Case, name: str, state: str) -> None:
    """What lies beside the target when the download begins."""
    part = part_path(case.target)
    if state in ("half", "spoilt", "overlong"):
        case.leave_half(name)
    if state == "spoilt":
        data = bytearray(part.read_bytes())
        data[HALF // 2] ^= 1
        part.write_bytes(data)
    if state == "foreign":
        part.write_bytes(b"not ours" * 10_000)
    if state == "overlong":
        with open(part, "ab") as file:
            file.write(b"x" * (len(DATA[name]) - HALF + 1))


def label(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(map(str, value.values())) or "once"
    return getattr(value, "__name__", str(value or "body"))


@pytest.mark.parametrize(("kind", "where", "options", "name", "state"), in_each_state(both_files(PASSING)), ids=label)
def test_faults_that_pass(
    case: Case, name: str, kind: str, where: str | None, options: dict[str, Any], state: str
) -> None:
    put_state(case, name, state)
    where = where or ("cdn" if name == WEIGHTS else "resolve")
    fault = case.server.faults.add(name, kind, where=where, **options)  # type: ignore[arg-type]
    counted = case.download(name)
    case.assert_right(name)
    assert counted == len(DATA[name])
    assert fault.struck > 0 or state in ("half", "spoilt", "overlong")


# For ever. → the error that comes out; the state is a half file.
LASTING: list[tuple[str, str | None, dict[str, Any], type[L4Error]]] = [
    ("status", "resolve", {"status": 500}, NetworkError),
    ("status", "resolve", {"status": 429, "retry_after": "0"}, RateLimited),
    ("status", None, {"status": 503}, NetworkError),
    ("status", "cdn", {"status": 403}, NetworkError),
    ("drop", "resolve", {}, NetworkError),
    ("hang", None, {}, NetworkError),
    ("redirect-loop", "resolve", {}, NetworkError),
    ("wrong-etag", "resolve", {}, ChecksumError),
    ("html", None, {}, NetworkError),
    ("cut", None, {"after_bytes": 0}, NetworkError),
    ("reset", None, {"after_bytes": 10}, NetworkError),
    ("stall", None, {"after_bytes": 10}, NetworkError),
    ("short", None, {"after_bytes": 1}, NetworkError),
    ("wrong-bytes", None, {"after_bytes": 850_000}, ChecksumError),
]


@pytest.mark.parametrize(("kind", "where", "options", "error", "name"), both_files(LASTING), ids=label)
def test_faults_that_last(
    case: Case, name: str, kind: str, where: str | None, options: dict[str, Any], error: type[L4Error]
) -> None:
    """An error of the right class, nothing under the final name, and the next run carries on."""
    case.leave_half(name)
    where = where or ("cdn" if name == WEIGHTS else "resolve")
    case.server.faults.add(name, kind, where=where, times=None, **options)  # type: ignore[arg-type]
    with pytest.raises(error) as raised:
        case.download(name)
    assert type(raised.value) is error and raised.value.hint
    assert not case.target.exists()
    case.server.faults.clear()
    case.server.requests.clear()
    assert case.download(name) == len(DATA[name])
    case.assert_right(name)
    if error is not ChecksumError or kind == "wrong-etag":  # what was good is not sent again
        assert case.server.bytes_sent(name) <= len(DATA[name]) - HALF


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER], ids=["lfs", "git"])
def test_a_resumed_download_asks_for_what_is_missing(case: Case, name: str) -> None:
    case.leave_half(name)
    case.download(name)
    assert case.server.bytes_sent(name) == len(DATA[name]) - HALF
    assert {request.range for request in case.server.requests} == {f"bytes={HALF}-"}


def test_a_server_without_ranges_sends_the_file_once(case: Case) -> None:
    case.leave_half(WEIGHTS)
    case.server.faults.add(WEIGHTS, "no-range", times=None)
    case.download(WEIGHTS)
    case.assert_right(WEIGHTS)
    assert case.server.bytes_sent(WEIGHTS) == len(DATA[WEIGHTS]) and not case.said


def test_a_range_that_was_not_asked_for_is_not_taken(case: Case) -> None:
    """Found in the headers: what is there stays, and nothing has to be downloaded twice."""
    case.leave_half(WEIGHTS)
    case.server.faults.add(WEIGHTS, "other-range")
    case.download(WEIGHTS)
    case.assert_right(WEIGHTS)
    assert [request.range for request in case.server.requests if request.port == "cdn"] == [f"bytes={HALF}-"] * 2
    assert len(case.said) == 1 and "asked for bytes" in case.said[0]


def test_a_flipped_bit_in_the_part_costs_a_second_download_and_is_never_published(case: Case) -> None:
    put_state(case, WEIGHTS, "spoilt")
    case.download(WEIGHTS)
    case.assert_right(WEIGHTS)
    assert case.server.bytes_sent(WEIGHTS) == len(DATA[WEIGHTS]) - HALF + len(DATA[WEIGHTS])
    assert any("SHA-256" in line for line in case.said)


def test_another_revision_does_not_use_the_part_of_this_one(case: Case, tmp_path: Path) -> None:
    case.leave_half(WEIGHTS)
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / WEIGHTS).write_bytes(DATA[WEIGHTS][::-1])
    case.server.add_repo(NAME, tmp_path / "next", branch="next")
    snapshot = case.hub.snapshot(RepoSpec(NAME, "next"))
    case.server.requests.clear()
    download(case.hub, snapshot, snapshot.file(WEIGHTS), case.target)
    assert case.target.read_bytes() == DATA[WEIGHTS][::-1]
    assert case.server.bytes_sent(WEIGHTS) == len(DATA[WEIGHTS])


def test_retry_after_is_honoured(case: Case) -> None:
    case.server.faults.add(WEIGHTS, "status", status=429, retry_after="1", where="resolve")
    started_s = time.monotonic()
    case.download(WEIGHTS)
    first, second = (r.at for r in case.server.requests if r.port == "hub")
    assert second - first >= 1 and time.monotonic() - started_s < 5


def test_a_hash_the_hub_does_not_keep_is_never_accepted(case: Case) -> None:
    """The list names a hash that the content does not have: three tries, then an error; nothing is published."""
    real = case.snapshot.file(WEIGHTS)
    wrong = RemoteFile(real.path, real.size, "0" * 64, real.git_oid)
    with pytest.raises(ChecksumError):
        download(case.hub, case.snapshot, wrong, case.target)
    assert not case.target.exists()


@pytest.mark.parametrize("xet", [False, True], ids=["", "xet"])
@pytest.mark.parametrize("resolve_cache", [False, True], ids=["", "resolve-cache"])
def test_other_ways_of_a_hub(folder: Path, tmp_path: Path, xet: bool, resolve_cache: bool) -> None:
    """Small files behind a relative redirect; weights that are in Xet come over HTTP all the same."""
    with HubServer() as server:
        server.resolve_cache = resolve_cache
        server.add_repo(NAME, folder, xet=xet)
        hub = Hub(server.url, token="good-token", policy=QUICK)
        case = Case(server, hub, hub.snapshot(RepoSpec(NAME)), tmp_path / "out" / "file")
        for name in DATA:
            case.download(name)
            case.assert_right(name)
            case.target.unlink()


@pytest.mark.parametrize("seed", range(8))
def test_many_faults_at_once(server: HubServer, case: Case, seed: int) -> None:
    """Whole fetches of both files from a hub where anything can go wrong at any time."""
    dice, faults = random.Random(seed), []
    for _ in range(14):
        kind, where, options = dice.choice([fault for fault in PASSING if fault[0] != "hang"])
        options = {**options, "times": 1}
        faults.append(server.faults.add(dice.choice(["*", *DATA]), kind, where=where, **options))  # type: ignore[arg-type]
    out = case.target.parent
    options = Options(endpoint=server.url, timeout_s=TIMEOUT_S, policy=replace(QUICK, attempts=2), token="good-token")
    for _ in range(20):
        try:
            fetch(NAME, out, options)
            break
        except (NetworkError, RateLimited, ChecksumError):
            for name, data in DATA.items():
                assert not (out / name).exists() or (out / name).read_bytes() == data
            assert not (out / MANIFEST).exists()
    assert {path.name for path in out.iterdir() if path.suffix != ".lock"} == {*DATA, MANIFEST}
    assert all((out / name).read_bytes() == data for name, data in DATA.items())
    assert sum(fault.struck for fault in faults) >= 5
