"""The shared cache: huggingface_hub finds what we fetch, and we use what it has fetched."""

import os
import shutil

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download, try_to_load_from_cache

from l4tool.core.errors import InputMissing, LockHeld
from l4tool.hub.fetch import fetch
from l4tool.hub.local import locate, require_local
from l4tool.hub.manifest import MANIFEST
from l4tool.hub.targets import CacheTarget
from tests.l4tool.hub.hub_fixtures import OTHER, REPO, SHARD, WANTED, files_below, open_hub, options


def hub_download(server, cache, **kwargs):
    return snapshot_download(REPO, cache_dir=cache, endpoint=server.url, token=False, **kwargs)


def test_huggingface_hub_finds_it(server, source, cache):
    folder = fetch(REPO, None, options(server)).folder
    assert hub_download(server, cache, local_files_only=True) == str(folder)
    assert try_to_load_from_cache(REPO, SHARD, cache_dir=cache) == str(folder / SHARD)
    assert all((folder / path).read_bytes() == (source / path).read_bytes() for path in WANTED)
    report = scan_cache_dir(cache)
    assert not report.warnings and [repo.repo_id for repo in report.repos] == [REPO]
    assert (folder / SHARD).is_symlink() and not os.path.isabs(os.readlink(folder / SHARD))


def test_it_then_downloads_nothing(server, source, cache):
    fetch(REPO, None, options(server, include=("*",)))
    server.requests.clear()
    hub_download(server, cache)
    assert not [r for r in server.requests if r.file and r.method == "GET"]


def test_what_it_has_fetched_is_used(server, source, cache):
    theirs = hub_download(server, cache)
    server.requests.clear()
    result = fetch(REPO, None, options(server))
    assert str(result.folder) == theirs and result.fetched_bytes == 0 and (result.folder / MANIFEST).is_file()
    assert not [r for r in server.requests if r.file]


def test_verify_replaces_a_rotten_blob(server, source, cache):
    folder = fetch(REPO, None, options(server)).folder
    blob = (folder / SHARD).resolve()
    stat = blob.stat()
    raw = bytearray(blob.read_bytes())
    raw[5] ^= 1
    blob.write_bytes(raw)
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fetch(REPO, None, options(server))
    assert (folder / SHARD).read_bytes() != (source / SHARD).read_bytes()
    fetch(REPO, None, options(server, verify=True))
    assert (folder / SHARD).read_bytes() == (source / SHARD).read_bytes()


def test_lost_link_is_made_again(server, cache):
    folder = fetch(REPO, None, options(server)).folder
    (folder / SHARD).unlink()
    assert fetch(REPO, None, options(server)).fetched_bytes == 0 and (folder / SHARD).is_file()


def test_revisions_share_blobs(server, source, cache, tmp_path):
    first = fetch(REPO, None, options(server)).folder
    new = tmp_path / "new"
    shutil.copytree(source, new)
    (new / "config.json").write_text("{}")
    server.add_repo(REPO, new, branch="dev")
    server.requests.clear()
    second = fetch(REPO + "@dev", None, options(server)).folder
    assert [r.file for r in server.requests if r.file and r.status == 200] == ["config.json"]
    assert (first / SHARD).resolve() == (second / SHARD).resolve() and first != second
    assert locate(REPO) == first and locate(REPO + "@dev") == second


def test_files_of_the_same_content(server, source, cache):
    (source / OTHER).write_bytes((source / SHARD).read_bytes())
    server.add_repo(REPO, source)
    folder = fetch(REPO, None, options(server)).folder
    assert (folder / OTHER).read_bytes() == (folder / SHARD).read_bytes()


def test_killed_run_is_resumed_and_not_seen_as_complete(server, source, cache):
    server.faults.add(SHARD, "cut", after_bytes=300_000, times=1)
    server.faults.add(SHARD, "status", status=404, where="resolve", times=1)
    server.faults._faults.reverse()
    server.faults.clear()
    server.faults.add(SHARD, "cut", after_bytes=300_000, times=None)
    with pytest.raises(Exception, match=SHARD):
        fetch(REPO, None, options(server, policy=type(options(server).policy)(attempts=1)))
    assert locate(REPO) is None
    server.faults.clear()
    server.requests.clear()
    fetch(REPO, None, options(server))
    ranges = [r.range for r in server.requests if r.file == SHARD and r.port == "cdn"]
    assert ranges == ["bytes=300000-"] and locate(REPO) is not None


def test_second_fetch(server, cache):
    _, snapshot = open_hub(server)
    target = CacheTarget(snapshot)
    target.prepare()
    with target.lock(wait=False), pytest.raises(LockHeld):
        fetch(REPO, None, options(server))


def test_locate(server, source, cache, tmp_path, monkeypatch):
    assert locate(str(tmp_path)) == tmp_path and locate(str(tmp_path / "none")) is None
    assert locate("scout") is None and locate(REPO) is None
    with pytest.raises(InputMissing) as error:
        require_local(REPO)
    assert f"l4tool fetch {REPO}" in error.value.hint
    assert require_local(str(tmp_path / "none")) == tmp_path / "none"
    theirs = hub_download(server, cache)  # without a manifest
    assert str(locate(REPO)) == theirs == str(require_local(REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(fetch(REPO, None, options(server)).folder) == theirs
    (locate(REPO) / OTHER).unlink()
    assert locate(REPO) is None


def test_what_is_in_the_cache(server, cache):
    """Nothing of ours stays but the manifest."""
    fetch(REPO, None, options(server))
    names = {path.rsplit("/", 1)[-1] for path in files_below(cache)}
    assert not [name for name in names if "part" in name or "ledger" in name or name == "l4tool-fetch.lock"]
