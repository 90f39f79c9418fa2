"""`l4tool quantize org/name`: as if the folder had been fetched before, with three shards of it on disk at most."""

import json
import os
import shutil
import signal
import threading
import time
from functools import partial

import pytest
from huggingface_hub import constants

from converters.detect import open_checkpoint
from converters.writing import checks, journal, stream
from l4tool.core import errors
from l4tool.core.errors import InputMissing, L4Error, UsageError, WriteError
from l4tool.hub import fetch
from l4tool.hub.client import Hub
from l4tool.hub.local import locate
from l4tool.hub.manifest import read_manifest
from l4tool.hub.names import RepoSpec
from l4tool.hub.skeleton import make_skeleton
from l4tool.hub.transport import RetryPolicy
from l4tool.main import main
from quant import pipeline
from quant.from_hub import Download, quantize_repo
from quant.hub_supply import HubSupply
from quant.schemes import make_recipe
from tests import checkpoints
from tests.hub.server import HubServer
from tests.quant.test_resume import SHARD_BYTES, contents, run, run_all

REPO = "demo/Random-Scout"
FAST = RetryPolicy(attempts=3, base_delay_s=0.01, max_delay_s=0.02)
DEFAULTS = Download()
HEADER_BYTES = 64 * 1024  # one header is read with at most so much


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of a dozen shards; the index of one more revision differs."""
    return checkpoints.make(tmp_path_factory.mktemp("hub") / "source", shard_bytes=1_500_000)


@pytest.fixture(scope="module")
def server(source):
    with HubServer() as hub:
        hub.add_repo(REPO, source)
        yield hub


@pytest.fixture(autouse=True)
def surroundings(server, tmp_path, monkeypatch):
    """No fault, no cache, no acceptance from before; children of a test find the same hub."""
    server.faults.clear()
    server.rate = None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def from_folder(server, tmp_path_factory):
    """The output made from the fetched folder."""
    work = tmp_path_factory.mktemp("fetched")
    fetch.fetch(REPO, work / "source", fetch.Options(endpoint=server.url))
    out = work / "Llama-out"
    options = pipeline.Options(jobs=2, max_shard_bytes=SHARD_BYTES, command="")
    pipeline.quantize(open_checkpoint(work / "source"), out, make_recipe("int4"), options)
    return comparable(out)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """(files, steps that change the disk) of a child that is left alone."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_HOME", str(out.parent / "home"))
        results, ended, errors_ = run(REPO, out, "run")
    assert results[0]["code"] == 0, errors_
    return without_names(out), ended[0]["steps"]


def comparable(out):
    """Every byte but what says how and when it was made, and from which place."""
    files = contents(out)
    assert files[journal.REPORT]["job"].pop("source")
    return files


def quantize(server, out, how=DEFAULTS, repo=REPO, revision=None, **options):
    settings = {"jobs": 2, "max_shard_bytes": SHARD_BYTES} | options
    hub = Hub(server.url, policy=FAST, timeout_s=5, say=lambda text: None)
    return quantize_repo(hub, RepoSpec(repo, revision), out, make_recipe("int4"), pipeline.Options(**settings), how)


def weights(server, since=0):
    """Requests for parts of shards from the `since`-th request on, those for headers left out."""
    asked = [r for r in server.requests[since:] if r.port == "cdn" and r.file and r.file.endswith(".safetensors")]
    return [r for r in asked if r.range != f"bytes=0-{HEADER_BYTES - 1}"]


def held(out):
    """(shards there in part or whole, bytes they take) in the staging place, placeholders not counted."""
    names, total = set(), 0
    try:
        found = list((out / journal.STAGING).rglob("*.safetensors*"))
    except OSError:  # it goes away while we look
        return held(out)
    for path in found:
        try:
            count = path.stat().st_blocks * 512
        except OSError:
            continue
        if count > HEADER_BYTES and not path.name.endswith((".ledger", ".header-only")):
            names.add(path.name.removesuffix(".part"))
            total += count
    return names, total


def test_same_bytes_as_from_the_fetched_folder(server, source, from_folder, tmp_path):
    out, since = tmp_path / "Llama-out", len(server.requests)
    report = quantize(server, out)
    assert comparable(out) == from_folder
    assert not (out / journal.STAGING).exists()
    described = report["job"]["source"]
    assert described["repo"] == REPO and described["commit"] == server.repos[REPO].branches["main"]
    shards = {path.name for path in checkpoints.shards(source)}
    assert len(shards) > 8 and shards < described["files"].keys()
    sent = {name: sum(r.sent for r in weights(server, since) if r.file == name) for name in shards}
    assert sent == {name: (source / name).stat().st_size for name in shards}
    again = len(server.requests)
    assert quantize(server, out)["job"] == report["job"]
    assert {r.file for r in server.requests[again:]} == {None}  # complete: not one file is asked for


@pytest.mark.parametrize("ahead", [1, 2])
def test_never_more_shards_than_asked_for(ahead, server, from_folder, tmp_path, monkeypatch):
    """The disk is looked at all the time, and whenever a download begins; quantizing is slowed down."""
    out, seen, done = tmp_path / "Llama-out", [], threading.Event()
    real_work, real_bring = stream.Stream._work, HubSupply._bring

    def work(self, shard, unit):
        time.sleep(0.004)
        return real_work(self, shard, unit)

    def bring(self, file):
        seen.append(held(out))
        real_bring(self, file)
        seen.append(held(out))

    def watch():
        while not done.wait(0.002):
            seen.append(held(out))

    monkeypatch.setattr(stream.Stream, "_work", work)
    monkeypatch.setattr(HubSupply, "_bring", bring)
    watcher = threading.Thread(target=watch)
    watcher.start()
    quantize(server, out, Download(ahead=ahead))
    done.set()
    watcher.join()
    most = max(len(names) for names, _ in seen)
    assert most == ahead + 1
    assert comparable(out) == from_folder


def test_killed_at_many_points(from_folder, whole, tmp_path):
    """kill -9 before the N-th step that changes the disk, anywhere from the skeleton to config.json."""
    expected, total = whole
    assert expected == {name: data for name, data in from_folder.items() if name != "README.md"}
    points = [1 + n * total // 10 for n in range(10)]
    stops = [f"{n}/{stop}" for n, point in enumerate(points) for stop in (f"kill:{point}", "run")]
    results, _, errors_ = run_all(REPO, tmp_path, stops)
    assert [r["code"] for r in results[0::2]] == [-signal.SIGKILL] * len(points), errors_
    assert [r["code"] for r in results[1::2]] == [0] * len(points), errors_
    for n in range(len(points)):
        assert without_names(tmp_path / str(n)) == expected, points[n]
        assert not (tmp_path / str(n) / journal.STAGING).exists()


def without_names(out):
    """The card names the output."""
    return {name: data for name, data in comparable(out).items() if name != "README.md"}


@pytest.mark.slow
def test_killed_at_random_moments(server, whole, tmp_path):
    """One output, a slow hub, killed from outside again and again until it is whole."""
    import random
    import subprocess
    import sys

    server.rate, rng, out, kills = 2_000_000, random.Random(4), tmp_path / "out", 0
    command = [sys.executable, "-m", "tests.quant.interrupted", REPO, str(tmp_path), str(SHARD_BYTES), "out/run"]
    while not (out / "config.json").exists():
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(2.5 + rng.random() * 2.5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        assert len(held(out)[0]) <= 3
        assert kills < 60
    assert kills >= 3
    assert without_names(out) == whole[0]


@pytest.mark.parametrize("part", [0.5, 0.8])
def test_only_what_is_needed_is_downloaded_again(part, server, source, whole, tmp_path):
    """By the server's log: no shard whose tensors are durable, and of a half-downloaded one only the rest."""
    server.rate, out = 3_000_000, tmp_path / "out"
    results, _, _ = run(REPO, out, f"kill:{int(whole[1] * part)}")
    assert results[0]["code"] == -signal.SIGKILL
    finished = {name for entries in journal.read_journal(out).tensors.values() for name in entries}
    infos = open_checkpoint(source).tensors()
    needed = {info.file.name for name, info in infos.items() if name not in finished}
    parts = {p.name.removesuffix(".part"): p.stat().st_size for p in out.rglob("*.safetensors.part") if p.parent != out}
    there = {p.name for p in out.rglob("*.safetensors") if p.parent != out and p.stat().st_blocks * 512 > HEADER_BYTES}
    server.rate, since = None, len(server.requests)
    results, ended, _ = run(REPO, out, "run")
    assert results[0]["code"] == 0
    asked = weights(server, since)
    assert {r.file for r in asked} <= needed < {path.name for path in checkpoints.shards(source)}
    for name in needed & parts.keys() - there:
        if 0 < parts[name] < (source / name).stat().st_size:
            assert [r.range for r in asked if r.file == name] == [f"bytes={parts[name]}-"]
    assert sum(r.sent for r in asked) == sum((source / n).stat().st_size for n in needed - there) - sum(
        size for name, size in parts.items() if name in needed - there
    )
    assert sorted(ended[0]["tensors"]) == sorted(infos.keys() - finished)
    assert without_names(out) == whole[0]


def test_journaled_but_not_deleted(server, from_folder, tmp_path, monkeypatch):
    """Stopped between the journal and the deletion of a shard: the next run deletes it and does not ask for it."""
    out, real, given_up = tmp_path / "Llama-out", HubSupply.used_up, []

    def used_up(self, file):
        given_up.append(file)
        if len(given_up) == 3:
            raise InputMissing("stopped here")
        real(self, file)

    monkeypatch.setattr(HubSupply, "used_up", used_up)
    with pytest.raises(InputMissing, match="stopped here"):
        quantize(server, out)
    assert given_up[2].exists()
    monkeypatch.setattr(HubSupply, "used_up", real)
    since = len(server.requests)
    quantize(server, out)
    assert not {r.file for r in weights(server, since)} & {file.name for file in given_up}
    assert comparable(out) == from_folder


@pytest.mark.parametrize(("stop", "code"), [("term", 143), ("int", 130), ("full", 73)])
def test_stopped_in_good_order(stop, code, whole, tmp_path):
    results, _, errors_ = run(REPO, tmp_path / "out", f"{stop}:{whole[1] // 2}", "run")
    assert [r["code"] for r in results] == [code, 0], errors_
    assert without_names(tmp_path / "out") == whole[0]


FAULTS = [
    (("model-00004*", "wrong-bytes", {"after_bytes": 700_000}), errors.EXIT_CHECKSUM),
    (("model-00004*", "cut", {"after_bytes": 5}), errors.EXIT_NETWORK),
    (("model-00004*", "status", {"status": 429, "where": "cdn"}), errors.EXIT_UNAVAILABLE),
    (("model-00004*", "status", {"status": 503, "where": "cdn"}), errors.EXIT_NETWORK),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "code"), FAULTS)
def test_errors_of_the_hub(fault, code, server, from_folder, tmp_path, monkeypatch):
    """In the middle: exit code of their own, everything before counts, and the same command carries on."""
    out, (path, kind, details) = tmp_path / "Llama-out", fault
    real = HubSupply.begin

    def begin(self, files):  # headers are through by now
        server.faults.add(path, kind, times=None, **details)
        real(self, files)

    monkeypatch.setattr(HubSupply, "begin", begin)
    with pytest.raises(L4Error) as error:
        quantize(server, out)
    assert error.value.exit_code == code and "model-00004" in error.value.message
    assert journal.read_journal(out).tensors and not (out / "config.json").exists()
    monkeypatch.setattr(HubSupply, "begin", real)
    server.faults.clear()
    assert quantize(server, out)["run"]["resumed"]
    assert comparable(out) == from_folder


@pytest.mark.parametrize(
    ("details", "code", "asked"),
    [
        ({"gated": True}, errors.EXIT_AUTH, "org/Gated"),
        ({}, errors.EXIT_NO_INPUT, "org/Nowhere"),
        ({"card": {"license": "other", "license_name": "llama4"}}, errors.EXIT_NO_ACCESS, "org/Gated"),
    ],
)
def test_refused_before_anything_is_written(details, code, asked, server, source, tmp_path):
    server.add_repo("org/Gated", source, **details)
    with pytest.raises(L4Error) as error:
        quantize(server, tmp_path / "out", repo=asked)
    assert error.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_licence_once(server, source, tmp_path, capsys):
    server.add_repo("org/Llama", source, card={"license": "other", "license_name": "llama4"})
    quantize(server, tmp_path / "out", Download(accept_license=True), repo="org/Llama")
    assert "European Union" in capsys.readouterr().err
    quantize(server, tmp_path / "again", repo="org/Llama")
    assert "European Union" not in capsys.readouterr().err


def test_main_moves_on(server, source, from_folder, tmp_path, capsys):
    """A run stays with the commit that it began with, and says so; another revision is another job."""
    server.add_repo("org/Moving", source)
    first = server.repos["org/Moving"].branches["main"]
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubSupply, "used_up", fail)
        with pytest.raises(InputMissing):
            quantize(server, out, repo="org/Moving")
    newer = checkpoints.copy(source, tmp_path / "newer")
    checkpoints.edit_config(newer, lambda config: config.update(note="newer"))
    second = server.add_repo("org/Moving", newer)
    report = quantize(server, out, repo="org/Moving")
    assert report["job"]["source"]["commit"] == first != second
    assert f"moved on to {second[:12]}" in capsys.readouterr().err
    assert "note" not in json.loads((out / "config.json").read_text())
    assert quantize(server, out, repo="org/Moving") == report
    with pytest.raises(WriteError, match=r"its source was org/Moving at .*, now it is org/Moving at"):
        quantize(server, out, repo="org/Moving", revision=second)
    quantize(server, out, repo="org/Moving", force=True)
    assert json.loads((out / "config.json").read_text())["note"] == "newer"
    with pytest.raises(WriteError, match="now it is a folder"):
        options = pipeline.Options(max_shard_bytes=SHARD_BYTES)
        pipeline.quantize(open_checkpoint(newer), out, make_recipe("int4"), options)


def fail(self, file):
    raise InputMissing("stopped here")


def test_room_is_looked_for_before_the_first_weight(server, source, tmp_path, monkeypatch):
    sizes = sorted(path.stat().st_size for path in checkpoints.shards(source))
    out_bytes = 9 * 2**20 + checks.SLACK_BYTES
    usage, since = shutil.disk_usage(tmp_path), len(server.requests)
    for free, fits in ((out_bytes, False), (out_bytes + 3 * sizes[-1] + 2**20, True)):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=free))  # noqa: B023
        if fits:
            quantize(server, tmp_path / "out")
        else:
            with pytest.raises(WriteError, match="are still to be written"):
                quantize(server, tmp_path / "out")
            assert not weights(server, since) and not (tmp_path / "out").exists()


def test_dry_run_reads_headers_only(server, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("l4tool.hub.client.Hub", partial(Hub, server.url))
    monkeypatch.chdir(tmp_path)
    since = len(server.requests)
    assert main(["quantize", REPO, "--int4", "--dry-run", "-o", "out"]) == 0
    printed = capsys.readouterr().out
    assert not weights(server, since) and not (tmp_path / "out").exists()
    assert main(["quantize", str(source), "--int4", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_folder_wins_then_the_cache(server, source, tmp_path, monkeypatch, capsys):
    """No request at all where the checkpoint is on this machine."""
    monkeypatch.chdir(tmp_path)
    fetch.fetch(REPO, None, fetch.Options(endpoint=server.url))
    since = len(server.requests)
    assert locate(REPO) is not None
    assert main(["quantize", REPO, "--int4", "-o", "cached"]) == 0
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "demo").mkdir()
    (tmp_path / REPO).symlink_to(source)
    assert main(["quantize", REPO, "--int4", "-o", "local"]) == 0
    assert len(server.requests) == since
    assert main(["quantize", "scoutt", "--int4", "-o", "none"]) == errors.EXIT_NO_INPUT
    assert "'scoutt' is neither a folder nor a repository" in capsys.readouterr().err


def test_keep_source(server, source, from_folder, tmp_path):
    """Interrupted without it, finished with it: the folder is what `fetch` makes, and nothing is fetched twice."""
    out, keep = tmp_path / "Llama-out", tmp_path / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubSupply, "used_up", fail)
        with pytest.raises(InputMissing):
            quantize(server, out)
    quantize(server, out, Download(keep=keep))
    assert comparable(out) == from_folder
    assert read_manifest(keep).commit == server.repos[REPO].branches["main"]
    for path in source.iterdir():
        assert (keep / path.name).read_bytes() == path.read_bytes()
    assert not list(keep.glob("*.header-only")) and not (out / journal.STAGING).exists()
    since = len(server.requests)
    commit = read_manifest(keep).commit
    assert fetch.fetch(f"{REPO}@{commit}", keep, fetch.Options(endpoint=server.url)).fetched_bytes == 0
    assert not weights(server, since)
    open_checkpoint(keep).read("language_model.model.norm.weight")
    for inside in (out / "source", out, tmp_path):
        with pytest.raises(UsageError, match="lie in each other"):
            quantize(server, out, Download(keep=inside))


def test_a_placeholder_is_never_read(server, tmp_path):
    hub = Hub(server.url)
    reader = open_checkpoint(make_skeleton(hub, hub.snapshot(RepoSpec(REPO)), tmp_path / "skeleton"))
    with pytest.raises(InputMissing, match="header only"):
        reader.read("language_model.model.norm.weight")
    with pytest.raises(InputMissing, match="header only"):
        pipeline.quantize(reader, tmp_path / "out", make_recipe("int4"), pipeline.Options())
