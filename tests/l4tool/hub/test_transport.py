import email.utils
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub.errors import HfHubHTTPError

from l4tool.core.errors import AuthError, ChecksumError, NetworkError, RateLimited
from l4tool.hub import transfer
from l4tool.hub.client import Hub
from l4tool.hub.transfer import download
from l4tool.hub.transport import Retry, RetryPolicy, Stopped, http, retry_after_s, retrying, short_url
from tests.l4tool.hub.hub_fixtures import FAST, OTHER, SHARD, open_hub


def test_exceptions_are_those_of_huggingface_hub():
    assert issubclass(HfHubHTTPError, http().HTTPError) and issubclass(http().ReadTimeout, http().HTTPError)


def test_retry_after():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert retry_after_s({"retry-after": "7"}) == 7
    assert 50 < retry_after_s({"retry-after": in_a_minute}) <= 60
    assert retry_after_s({"retry-after": email.utils.formatdate(0, usegmt=True)}) == 0
    assert retry_after_s({"retry-after": "soon"}) is None and retry_after_s({}) is None
    assert retry_after_s({"ratelimit": '"api";r=0;t=55'}) == 55
    assert retry_after_s({"ratelimit": '"api";r=9;t=55'}) is None


def test_delays_are_drawn_below_a_growing_bound():
    policy = RetryPolicy(base_delay_s=1, max_delay_s=10, max_retry_after_s=100)
    for failures, bound in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (50, 10)):
        drawn = [policy.delay_s(failures, None) for _ in range(200)]
        assert bound * 0.7 < max(drawn) <= bound and min(drawn) < bound * 0.3
    assert policy.delay_s(1, 42) == 42 and policy.delay_s(1, 4200) == 100


def failing(times, **retry):
    calls = []

    def attempt():
        calls.append(1)
        if len(calls) <= times:
            raise Retry(NetworkError("no"), **retry)
        return "done"

    return attempt, calls


def test_attempts_are_counted():
    attempt, calls = failing(5)
    assert retrying(attempt, FAST, lambda text: None) == "done" and len(calls) == 6
    attempt, calls = failing(6)
    with pytest.raises(NetworkError):
        retrying(attempt, FAST, lambda text: None)
    assert len(calls) == 6


def test_progress_resets_the_count():
    attempt, calls = failing(30, progressed=True)
    assert retrying(attempt, FAST, lambda text: None) == "done" and len(calls) == 31


def test_stop_ends_the_wait_between_attempts():
    stop = threading.Event()
    attempt, _ = failing(1, wait_s=60)
    threading.Timer(0.1, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        retrying(attempt, RetryPolicy(), lambda text: None, stop)
    assert time.monotonic() - started < 5


def test_signatures_are_not_shown():
    assert short_url("https://cdn/x?Signature=secret&y#z") == "https://cdn/x"


def test_token_that_breaks_headers_is_refused_unseen():
    with pytest.raises(AuthError) as error:
        Hub("http://127.0.0.1:1", token="hf_secret\nX: y")
    assert "secret" not in error.value.message + error.value.hint


def test_nobody_listens():
    with pytest.raises(NetworkError) as error:
        open_hub(type("Server", (), {"url": "http://127.0.0.1:1"}), policy=RetryPolicy(attempts=1))
    assert "127.0.0.1:" in error.value.message


def test_retry_after_is_waited_for(server, tmp_path):
    hub, snapshot = open_hub(server)
    server.faults.add(SHARD, "status", status=429, retry_after="1", where="resolve")
    started = time.monotonic()
    download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f")
    assert 1 <= time.monotonic() - started < 10


def test_rate_limit_that_stays(server, tmp_path):
    hub, snapshot = open_hub(server)
    server.faults.add(SHARD, "status", status=429, retry_after="0", where="resolve", times=None)
    with pytest.raises(RateLimited):
        download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f")


def test_trickle_is_a_stall(server, tmp_path):
    hub, snapshot = open_hub(server, timeout_s=0.5, policy=RetryPolicy(base_delay_s=0.01, floor_bytes_per_s=100_000))
    server.faults.add(OTHER, "slow", bytes_per_s=20_000)
    said = []
    hub.say = said.append
    download(hub, snapshot, snapshot.file(OTHER), tmp_path / "f")
    assert len(server.requests) and any("only" in line for line in said)


def test_server_that_begins_again_each_time_does_not_go_on_for_ever(server, tmp_path):
    """Every attempt brings 100 kB, but never one byte further."""
    hub, snapshot = open_hub(server)
    hub.get = lambda snapshot, path, headers: Hub.get(hub, snapshot, path, {})  # as if the server knew no ranges
    server.faults.add(SHARD, "cut", after_bytes=100_000, times=None, where="cdn")
    with pytest.raises(NetworkError):
        download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f")


def test_wrong_bytes_that_stay_leave_nothing_behind(server, tmp_path):
    hub, snapshot = open_hub(server)
    server.faults.add(SHARD, "wrong-bytes", after_bytes=1234, times=None)
    with pytest.raises(ChecksumError) as error:
        download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f")
    assert SHARD in error.value.message and snapshot.file(SHARD).sha256 in error.value.message
    assert not list(tmp_path.glob("f*"))
    assert len([r for r in server.requests if r.port == "cdn"]) == FAST.checksum_attempts


def test_login_page_instead_of_the_api(server):
    server.faults.add("info", "html", times=None)
    with pytest.raises(NetworkError) as error:
        open_hub(server)
    assert "does not answer like a hub" in error.value.message


def test_read_range(server, source):
    hub, snapshot = open_hub(server)
    data = (source / SHARD).read_bytes()
    for start, stop in ((0, 1), (8, 1000), (699_000, 700_001), (5, 5)):
        assert hub.read_range(snapshot, SHARD, start, stop) == data[start:stop]
    server.faults.add(SHARD, "no-range")
    assert hub.read_range(snapshot, SHARD, 100, 200) == data[100:200]
    server.faults.add(SHARD, "cut", after_bytes=10)
    assert hub.read_range(snapshot, SHARD, 100, 200) == data[100:200]


def test_huge_files_come_in_several_answers(server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_ANSWER_BYTES", 300_000)
    hub, snapshot = open_hub(server)
    download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == (source / SHARD).read_bytes()
    ranges = [r.range for r in server.requests if r.port == "cdn"]
    assert ranges == ["bytes=0-299999", "bytes=300000-599999", "bytes=600000-"]
    server.faults.add(SHARD, "no-range")  # all of it, though a piece was asked for
    download(hub, snapshot, snapshot.file(SHARD), tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == (source / SHARD).read_bytes()


def test_stop_breaks_a_wait_for_bytes(server, tmp_path):
    hub, snapshot = open_hub(server, timeout_s=60)
    server.faults.add(SHARD, "stall", after_bytes=100_000)
    stop = threading.Event()

    def end():
        stop.set()
        hub.abort()

    threading.Timer(0.5, end).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        download(hub, snapshot, snapshot.file(SHARD), tmp_path / "f", stop=stop)
    assert time.monotonic() - started < 5
    assert (tmp_path / "f.part").stat().st_size == 100_000


def test_the_package_needs_no_torch():
    code = "import sys, l4tool.hub.fetch; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
