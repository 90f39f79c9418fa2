"""--xet: through huggingface_hub's Xet client while that works, over HTTP as soon as it does not."""

import os
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("hf_xet")

from l4tool.hub.fetch import fetch
from l4tool.hub.transport import Stopped
from l4tool.hub.xet import Xet, xet_folder
from tests.l4tool.hub.hub_fixtures import OTHER, REPO, SHARD, WANTED, files_below, open_hub, options


@pytest.fixture
def big(server, source, tmp_path, monkeypatch):
    """Both shards in Xet, and big enough for it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of the children
    for name in (SHARD, OTHER):
        (source / name).write_bytes(os.urandom(3_000_000))
    server.add_repo(REPO, source, xet=True)
    return server


def cdn(server):
    return {r.file for r in server.requests if r.port == "cdn"}


def right(out, source):
    return all(files_below(out)[path] == (source / path).read_bytes() for path in WANTED) and not xet_left(out)


def xet_left(out):
    return [path for path in out.rglob("*") if path.name.endswith(".l4tool-xet")]


def test_files_come_through_xet(big, source, tmp_path):
    fetch(REPO, tmp_path / "out", options(big, xet=True, timeout_s=30))
    assert right(tmp_path / "out", source) and not cdn(big)
    assert [r for r in big.requests if r.port == "xet"]


def test_http_is_the_default(big, source, tmp_path):
    fetch(REPO, tmp_path / "out", options(big))
    assert right(tmp_path / "out", source) and cdn(big) == {SHARD, OTHER}
    assert not [r for r in big.requests if r.port == "xet"]


@pytest.mark.parametrize("path", ["reconstruction", "xorb"])
def test_hang_is_ended_and_http_takes_over(big, source, tmp_path, path):
    big.faults.add(path, "hang", where="xet", times=None)
    started = time.monotonic()
    fetch(REPO, tmp_path / "out", options(big, xet=True, timeout_s=3, jobs=1))
    assert time.monotonic() - started < 25
    assert right(tmp_path / "out", source) and cdn(big) == {SHARD, OTHER}


def test_wrong_bytes_from_xet_are_found(big, source, tmp_path, monkeypatch):
    def bring(self, file, target, on_bytes, stop):
        from l4tool.hub.part import claim_part

        if file.path == SHARD:
            (tmp_path / "received").write_bytes(bytes(file.size))
            claim_part(target, file, tmp_path / "received")

    monkeypatch.setattr(Xet, "bring", bring)
    fetch(REPO, tmp_path / "out", options(big, xet=True))
    assert right(tmp_path / "out", source) and SHARD in cdn(big)


def test_stop_ends_the_child(big, tmp_path):
    big.faults.add("*", "hang", where="xet", times=None)
    hub, snapshot = open_hub(big, timeout_s=60)
    target, stop = tmp_path / "f", threading.Event()
    threading.Timer(1, stop.set).start()
    with pytest.raises(Stopped):
        Xet(hub, snapshot).bring(snapshot.file(SHARD), target, lambda delta: None, stop)
    assert not xet_folder(target).exists()


def test_child_ends_with_its_parent(big, tmp_path):
    """Its end closes the pipe, also when it is killed."""
    big.faults.add("*", "hang", where="xet", times=None)
    _, snapshot = open_hub(big)
    command = [sys.executable, "-m", "l4tool.hub.xet", REPO, snapshot.commit, SHARD, str(tmp_path / "x")]
    child = subprocess.Popen(command, env={**os.environ, "HF_ENDPOINT": big.url}, stdin=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not any(r.port == "xet" for r in big.requests):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.stdin.close()
    assert child.wait(timeout=30) == 1
