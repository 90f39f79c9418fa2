"""The whole of fetch into a plain folder, in this process."""

import json
import os
import threading

import pytest
from huggingface_hub import constants, snapshot_download

from l4tool.core.errors import (
    AccessDenied,
    AuthError,
    CheckpointError,
    ChecksumError,
    InputMissing,
    LockHeld,
    NetworkError,
    WriteError,
)  # fmt: skip
from l4tool.core.lock import output_lock
from l4tool.hub import job as job_module
from l4tool.hub.fetch import fetch, preview
from l4tool.hub.manifest import MANIFEST, read_manifest
from l4tool.hub.selection import STATE
from l4tool.hub.transport import RetryPolicy
from tests.l4tool.hub.hub_fixtures import INDEX, OTHER, REPO, SHARD, WANTED, files_below, make_files, options


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def right(out, source):
    """Every wanted file is there and like the source's, and nothing else but the manifest."""
    found = files_below(out)
    assert found.keys() == WANTED | {MANIFEST}
    assert all(found[path] == (source / path).read_bytes() for path in WANTED)
    return True


def bodies(server):
    """Paths of the files of which bytes went out."""
    return sorted(r.file for r in server.requests if r.file and r.sent and r.status in (200, 206))


def test_like_huggingface_hub(server, source, out, tmp_path):
    result = fetch(REPO, out, options(server))
    assert right(out, source)
    theirs = tmp_path / "theirs"
    snapshot_download(REPO, local_dir=theirs, endpoint=server.url, token=False, cache_dir=tmp_path / "c")
    assert all(files_below(theirs)[path] == files_below(out)[path] for path in WANTED)
    assert result.num_files == len(WANTED) and result.fetched_bytes == result.total_bytes


def test_manifest(server, source, out):
    result = fetch(REPO + "@main", out, options(server))
    manifest = read_manifest(out)
    assert (manifest.repo_id, manifest.commit, manifest.revision) == (REPO, result.commit, "main")
    assert manifest.files.keys() == WANTED and manifest.endpoint == server.url
    assert manifest.files[SHARD].sha256 and manifest.files["config.json"].git_oid


def test_complete_folder_asks_for_the_commit_only(server, source, out):
    fetch(REPO, out, options(server))
    server.requests.clear()
    assert fetch(REPO, out, options(server)).fetched_bytes == 0
    assert [r.path.split("?")[0] for r in server.requests] == [f"/api/models/{REPO}"]


def test_named_commit_and_offline_ask_nothing(server, source, out, monkeypatch):
    commit = fetch(REPO, out, options(server)).commit
    pinned = f"{REPO}@{commit}"
    server.requests.clear()
    fetch(pinned, out, options(server))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch(REPO, out, options(server))
    fetch(REPO, out, options(server, verify=True))
    assert not server.requests
    (out / OTHER).unlink()
    with pytest.raises(NetworkError) as error:
        fetch(REPO, out, options(server))
    assert "offline" in error.value.message and not server.requests


def test_offline_verify_finds_wrong_bytes(server, source, out, monkeypatch):
    fetch(REPO, out, options(server))
    flip(out / SHARD, keep_mtime=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch(REPO, out, options(server))
    with pytest.raises(ChecksumError):
        fetch(REPO, out, options(server, verify=True))


def flip(path, keep_mtime):
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    if keep_mtime:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(path, ns=(1, 1))


def test_changed_file_is_found_by_its_mtime(server, source, out):
    fetch(REPO, out, options(server))
    flip(out / SHARD, keep_mtime=False)
    server.requests.clear()
    fetch(REPO, out, options(server))
    assert right(out, source) and bodies(server) == [SHARD]


def test_verify_reads_everything(server, source, out):
    fetch(REPO, out, options(server))
    flip(out / SHARD, keep_mtime=True)
    assert fetch(REPO, out, options(server)).fetched_bytes == 0  # nothing to see without reading
    fetch(REPO, out, options(server, verify=True))
    assert right(out, source)


def test_touched_but_right_file_is_not_fetched(server, source, out):
    fetch(REPO, out, options(server))
    os.utime(out / SHARD, ns=(1, 1))
    server.requests.clear()
    assert fetch(REPO, out, options(server)).fetched_bytes == 0
    assert not bodies(server) and right(out, source)
    server.requests.clear()
    fetch(REPO, out, options(server))
    assert len(server.requests) == 1  # the new mtime is in the manifest


def test_files_that_are_there_are_used(server, source, out):
    out.mkdir()
    for name in (SHARD, "config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    fetch(REPO, out, options(server))
    assert right(out, source) and SHARD not in bodies(server) and OTHER in bodies(server)


def test_another_revision_fetches_what_changed(server, source, out, tmp_path):
    fetch(REPO, out, options(server))
    new = make_files(tmp_path / "new")
    for name in (SHARD, "README.md", "LICENSE"):
        (new / name).write_bytes((source / name).read_bytes())
    (new / "config.json").write_text('{"seed": 2}')
    commit = server.add_repo(REPO, new)
    server.requests.clear()
    fetch(REPO, out, options(server))
    assert right(out, new) and set(bodies(server)) == {OTHER, "config.json"}
    assert read_manifest(out).commit == commit


def test_manifest_goes_first(server, source, out, tmp_path):
    """A fetch of another revision that fails leaves no manifest, and what did not change is not read again."""
    fetch(REPO, out, options(server))
    server.add_repo(REPO, make_files(tmp_path / "new", seed=1))
    server.faults.add(OTHER, "status", status=404, times=None, where="resolve")
    with pytest.raises(InputMissing):
        fetch(REPO, out, options(server))
    assert not (out / MANIFEST).exists() and (out / STATE).is_dir()
    server.faults.clear()
    fetch(REPO, out, options(server))
    assert right(out, tmp_path / "new")


def test_finished_files_of_a_broken_run_are_not_hashed_again(server, source, out, monkeypatch):
    server.faults.add(OTHER, "status", status=404, times=None, where="resolve")
    with pytest.raises(InputMissing):
        fetch(REPO, out, options(server, jobs=1))
    done = {json.loads(line)["path"] for line in (out / STATE / "done.jsonl").read_text().splitlines()}
    assert SHARD in done and OTHER not in done
    server.faults.clear()
    monkeypatch.setattr(job_module, "check_file", lambda *args: pytest.fail("hashed again"))
    fetch(REPO, out, options(server))
    assert right(out, source)


def test_wrong_file_does_not_keep_the_others_from_coming(server, source, out):
    server.faults.add(SHARD, "wrong-bytes", after_bytes=10, times=None)
    with pytest.raises(ChecksumError):
        fetch(REPO, out, options(server, jobs=1))
    assert (out / OTHER).read_bytes() == (source / OTHER).read_bytes()
    assert not (out / SHARD).exists() and not (out / MANIFEST).exists()


def test_orphans_are_swept_and_strangers_are_not(server, source, out):
    server.faults.add(OTHER, "status", status=404, times=None, where="resolve")
    server.faults.add(SHARD, "cut", after_bytes=50_000, times=None)
    with pytest.raises((NetworkError, InputMissing)):
        fetch(REPO, out, options(server))
    part = out / (SHARD + ".part")
    assert part.exists()
    (out / "old.safetensors.part").write_bytes(part.read_bytes())
    ledger = json.dumps({"digest": "f" * 64, "bytes": 9, "boot": None}) + "\n"
    (out / "old.safetensors.part.ledger").write_text(ledger)
    (out / "mine.part").write_text("not fetch's")
    (out / "mine").mkdir()  # not a folder of the repository
    (out / "mine/x.part.ledger").write_text(ledger)
    (out / "gone.part.l4tool-xet").mkdir()
    server.faults.clear()
    fetch(REPO, out, options(server))
    assert files_below(out).keys() == WANTED | {MANIFEST, "mine.part", "mine/x.part.ledger"}
    assert not (out / "gone.part.l4tool-xet").exists()


def test_not_enough_room_is_said_before_the_first_byte(server, out, monkeypatch):
    monkeypatch.setattr(job_module, "_free_bytes", lambda folder: 500_000)
    with pytest.raises(WriteError) as error:
        fetch(REPO, out, options(server))
    assert "free" in error.value.hint and not bodies(server) and not out.exists()


def test_room_counts_what_is_there(server, source, out, monkeypatch):
    server.faults.add(SHARD, "cut", after_bytes=400_000, times=None)
    with pytest.raises(NetworkError):
        fetch(REPO, out, options(server, include=(SHARD,), policy=RetryPolicy(attempts=1)))
    server.faults.clear()
    left = 700_001 - (out / (SHARD + ".part")).stat().st_size
    small = sum((source / name).stat().st_size for name in ("LICENSE", "README.md") if not (out / name).exists())
    monkeypatch.setattr(job_module, "_free_bytes", lambda folder: left + small + job_module.SPARE_BYTES)
    fetch(REPO, out, options(server, include=(SHARD,)))
    assert (out / SHARD).read_bytes() == (source / SHARD).read_bytes()


def test_second_fetch_of_the_same_folder(server, source, out):
    out.mkdir()
    with output_lock(out), pytest.raises(LockHeld):
        fetch(REPO, out, options(server))
    lock = output_lock(out)
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__, (None, None, None)).start()
    fetch(REPO, out, options(server, wait=True))
    assert right(out, source)


def test_folder_of_something_else_is_left_alone(server, source, out, tmp_path):
    server.add_repo("demo/Other", make_files(tmp_path / "other"))
    server.faults.add(OTHER, "status", status=404, times=None, where="resolve")
    with pytest.raises(InputMissing):
        fetch(REPO, out, options(server))
    with pytest.raises(WriteError) as error:  # unfinished
        fetch("demo/Other", out, options(server))
    assert REPO in error.value.message
    server.faults.clear()
    fetch(REPO, out, options(server))
    with pytest.raises(WriteError):
        fetch("demo/Other", out, options(server))
    assert right(out, source)
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized/l4tool-report.json").write_text("{}")
    with pytest.raises(WriteError):
        fetch(REPO, tmp_path / "quantized", options(server))


def test_gates(server, source, out):
    server.add_repo(REPO, source, gated=True)
    for token, error in (("stranger-token", AccessDenied), ("bad-token", AuthError)):
        with pytest.raises(error) as caught:
            fetch(REPO, out, options(server, token=token))
        assert token not in caught.value.message + caught.value.hint
    assert not out.exists() and not bodies(server)
    fetch(REPO, out, options(server))


def test_not_there(server, out):
    for text in ("demo/None", REPO + "@nothing"):
        with pytest.raises(InputMissing):
            fetch(text, out, options(server))
    with pytest.raises(InputMissing):
        fetch(REPO, out, options(server, include=("nothing*",)))
    assert not out.exists()


def test_symlink_that_leads_out(server, source, out, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    (out / "original").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError) as error:
        fetch(REPO, out, options(server, layout="meta"))
    assert "leads out" in error.value.message and not list((tmp_path / "elsewhere").iterdir())


def test_symlink_in_place_of_a_file_is_replaced_not_followed(server, source, out, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out.mkdir()
    (out / "config.json").symlink_to(victim)
    fetch(REPO, out, options(server))
    assert victim.read_text() == "precious" and right(out, source)


def test_unsafe_names_from_the_hub(server, source, out, tmp_path):
    """The hub's own folder is harmless; its answer is not."""
    revision = next(iter(server.repos[REPO].commits.values()))
    stored = revision.files["config.json"]
    object.__setattr__(stored, "path", "../escaped.json")
    with pytest.raises(CheckpointError):
        fetch(REPO, out, options(server, include=("*",)))
    assert not (tmp_path / "escaped.json").exists()


def test_preview_writes_nothing(server, source, out, tmp_path):
    text = preview(REPO, out, options(server))
    assert all(path in text for path in WANTED) and "to fetch" in text and not out.exists()
    fetch(REPO, out, options(server))
    before = files_below(out)
    server.requests.clear()
    assert "0 B to fetch" in preview(REPO, out, options(server))
    assert files_below(out) == before and len(server.requests) == 1


def test_licence_is_asked_for_before_the_first_byte(server, source, out, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    server.add_repo(REPO, source, card={"license": "llama4"})
    with pytest.raises(AccessDenied) as error:
        fetch(REPO, out, options(server))
    assert "--accept-license" in error.value.hint and not out.exists() and not bodies(server)
    fetch(REPO, out, options(server, accept_license=True))
    fetch(REPO, tmp_path / "again", options(server))  # remembered
    assert right(out, source) and INDEX
