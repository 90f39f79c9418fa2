"""Skeletons: a repository opened from a few small reads, and nothing that a hub says is taken on trust."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from converters.detect import open_checkpoint
from l4tool.core.errors import AccessDenied, AuthError, CheckpointError, ChecksumError, InputMissing, L4Error
from l4tool.core.placeholder import filled, is_placeholder
from l4tool.hub.client import Hub
from l4tool.hub.names import parse_repo
from l4tool.hub.skeleton import FIRST_READ_BYTES, cached_skeleton, make_skeleton
from l4tool.hub.transport import RetryPolicy
from tests import checkpoints
from tests.hub.server import HubServer

NAME = "demo/Llama-4-Tiny"
HASTE = RetryPolicy(attempts=3, base_delay_s=0.01, max_delay_s=0.02)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server(scout_tiny):
    with HubServer() as server:
        server.add_repo(NAME, scout_tiny)
        yield server


def hub_of(server, token=None):
    return Hub(server.url, token, timeout_s=10, policy=HASTE, say=lambda line: None)


def skeleton_of(server, folder, name=NAME, token=None, **options):
    hub = hub_of(server, token)
    return make_skeleton(hub, hub.snapshot(parse_repo(name)), folder, **options)


def infos(folder):
    return [(i.name, i.shape, i.dtype, i.nbytes, i.file.name) for i in open_checkpoint(folder).tensors().values()]


def test_it_opens_like_the_checkpoint(server, scout_tiny, tmp_path):
    folder = skeleton_of(server, tmp_path / "skeleton")
    assert infos(folder) == infos(scout_tiny)
    for shard in checkpoints.shards(folder):
        assert is_placeholder(shard)
        assert shard.stat().st_size == (scout_tiny / shard.name).stat().st_size
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert (folder / name).read_bytes() == (scout_tiny / name).read_bytes()


def test_little_is_read(server, scout_tiny, tmp_path):
    skeleton_of(server, tmp_path / "skeleton")
    for shard in checkpoints.shards(scout_tiny):
        assert server.bytes_sent(shard.name) <= FIRST_READ_BYTES
    before = server.bytes_sent()
    skeleton_of(server, tmp_path / "skeleton")
    assert server.bytes_sent() == before


def test_large_side_files_only_when_asked_for(server, scout_tiny, tmp_path):
    size = (scout_tiny / "tokenizer.json").stat().st_size
    small = skeleton_of(server, tmp_path / "small", max_side_bytes=size - 1)
    whole = skeleton_of(server, tmp_path / "whole", max_side_bytes=size)
    assert not (small / "tokenizer.json").exists()
    assert (whole / "tokenizer.json").read_bytes() == (scout_tiny / "tokenizer.json").read_bytes()


def test_a_long_header_takes_further_reads(scout_tiny, tmp_path):
    """The published shards' headers are short, per-expert ones are not."""
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    for shard in checkpoints.shards(source):
        data = shard.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = data[8:end] + b" " * 5_000_000
        shard.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    with HubServer() as server:
        server.add_repo(NAME, source)
        folder = skeleton_of(server, tmp_path / "skeleton")
    assert infos(folder) == infos(source)


def test_real_shards_are_kept(server, scout_tiny, tmp_path):
    folder = skeleton_of(server, tmp_path / "skeleton")
    shard = checkpoints.shards(folder)[0]
    os.replace(checkpoints.copy(scout_tiny, tmp_path / "copy") / shard.name, shard)
    filled(shard)
    checkpoints.shards(folder)[1].unlink()
    skeleton_of(server, folder)
    assert shard.read_bytes() == (scout_tiny / shard.name).read_bytes() and not is_placeholder(shard)
    assert infos(folder) == infos(scout_tiny)


def test_the_cache_is_by_commit_and_shared(server, scout_tiny, tmp_path):
    hub = hub_of(server)
    snapshot = hub.snapshot(parse_repo(NAME))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: cached_skeleton(hub, snapshot), range(4)))
    folder = folders.pop()
    assert not folders and folder.is_relative_to(tmp_path / "cache") and snapshot.commit in str(folder)
    assert [path.name for path in folder.parent.iterdir()] == [snapshot.commit]  # nothing half-made is left
    before = server.bytes_sent()
    assert cached_skeleton(hub, snapshot) == folder and server.bytes_sent() == before
    checkpoints.shards(folder)[0].unlink()
    (folder / "generation_config.json").write_text("edited")
    assert infos(cached_skeleton(hub, snapshot)) == infos(scout_tiny)
    assert (folder / "generation_config.json").read_bytes() == (scout_tiny / "generation_config.json").read_bytes()
    other = checkpoints.copy(scout_tiny, tmp_path / "other")
    (other / "README.md").write_text("another commit")
    server.add_repo(NAME, other)
    assert cached_skeleton(hub, hub.snapshot(parse_repo(NAME))) != folder


def spoil_length(folder, shard, length):
    data = bytearray(shard.read_bytes())
    data[:8] = struct.pack("<Q", length)
    shard.write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 10**8 + 1, None])
def test_a_header_length_that_cannot_be(scout_tiny, tmp_path, length):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    shard = checkpoints.shards(source)[1]
    spoil_length(source, shard, shard.stat().st_size - 7 if length is None else length)
    with HubServer() as server:
        server.add_repo(NAME, source)
        with pytest.raises(CheckpointError, match=f"{shard.name} is not a safetensors file"):
            skeleton_of(server, tmp_path / "skeleton")
        assert server.bytes_sent(shard.name) <= FIRST_READ_BYTES
    assert not (tmp_path / "skeleton" / "config.json").exists()


def test_a_shard_too_short_for_a_header(scout_tiny, tmp_path):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    shard = checkpoints.shards(source)[0]
    shard.write_bytes(b"1234")
    with HubServer() as server:
        server.add_repo(NAME, source)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            skeleton_of(server, tmp_path / "skeleton")


def test_a_small_file_of_other_bytes(server, tmp_path):
    server.faults.add("config.json", "wrong-bytes", after_bytes=20, times=None)
    with pytest.raises(ChecksumError, match=r"config\.json"):
        skeleton_of(server, tmp_path / "skeleton")
    assert not (tmp_path / "skeleton" / "config.json").exists()


@pytest.mark.parametrize("kind", ["cut", "no-range", "short"])
def test_faults_of_one_request_are_mended(server, scout_tiny, tmp_path, kind):
    server.faults.add("model-*", kind, after_bytes=100, times=2)
    assert infos(skeleton_of(server, tmp_path / "skeleton")) == infos(scout_tiny)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", 7, "config.json"])
def test_an_index_that_names_what_is_no_shard(scout_tiny, tmp_path, name):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    with HubServer() as server:
        server.add_repo(NAME, source)
        with pytest.raises(CheckpointError):
            skeleton_of(server, tmp_path / "skeleton")
    assert not (tmp_path / "skeleton" / "config.json").exists()
    assert not (tmp_path / "outside.safetensors").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_an_index_that_is_none(scout_tiny, tmp_path, content):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(content)
    with HubServer() as server:
        server.add_repo(NAME, source)
        with pytest.raises(CheckpointError, match="weight_map"):
            skeleton_of(server, tmp_path / "skeleton")


def test_metas_layout_is_named(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("params.json", "consolidated.00.pth"):
        (source / name).write_bytes(b"{}")
    with HubServer() as server:
        server.add_repo("meta-llama/Llama-4-Scout-17B-16E-Original", source)
        with pytest.raises(CheckpointError, match="Meta's own layout") as caught:
            skeleton_of(server, tmp_path / "skeleton", "meta-llama/Llama-4-Scout-17B-16E-Original")
        assert "meta-llama/Llama-4-Scout-17B-16E," in caught.value.hint


def test_a_repository_without_a_checkpoint(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("only words")
    with HubServer() as server:
        server.add_repo("demo/words", source)
        with pytest.raises(CheckpointError, match=r"lacks config\.json"):
            skeleton_of(server, tmp_path / "skeleton", "demo/words")


def test_gated_and_missing(server, scout_tiny, tmp_path):
    server.add_repo("demo/gated", scout_tiny, gated=True)
    server.tokens = {"good"}
    cases = [("demo/gated", None, AuthError), ("demo/gated", "without-access", (AccessDenied, AuthError)),
             ("demo/none", None, InputMissing)]  # fmt: skip
    for number, (name, token, error) in enumerate(cases):
        with pytest.raises(error):
            skeleton_of(server, tmp_path / str(number), name, token)
    assert infos(skeleton_of(server, tmp_path / "good", "demo/gated", "good")) == infos(scout_tiny)


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    hub = hub_of(server)
    with pytest.raises(L4Error, match="cannot write"):
        cached_skeleton(hub, hub.snapshot(parse_repo(NAME)))
