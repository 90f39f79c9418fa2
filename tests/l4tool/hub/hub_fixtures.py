"""A repository on a test hub, and options that do not make tests wait."""

import os

import pytest

from l4tool.hub.client import Hub
from l4tool.hub.job import Options
from l4tool.hub.names import RepoSpec
from l4tool.hub.transport import RetryPolicy
from tests.hub.server import HubServer

FAST = RetryPolicy(base_delay_s=0.01, max_delay_s=0.02)
REPO = "demo/Tiny"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = f'{{"weight_map": {{"a": "{SHARD}", "b": "{OTHER}"}}}}'


def make_files(folder, seed=0):
    """A folder like a repository's: two shards, small files, the licence, and Meta's layout in original/."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in ((SHARD, 700_001), (OTHER, 300_000), ("original/consolidated.00.pth", 5000)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    texts = {"config.json": f'{{"seed": {seed}}}', "model.safetensors.index.json": INDEX, "LICENSE": "licence\n",
             "original/params.json": "{}", "README.md": "card\n", "empty.txt": "", ".gitattributes": "x"}  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


WANTED = {SHARD, OTHER, "config.json", "model.safetensors.index.json", "LICENSE", "README.md", "empty.txt"}


def options(server, **changes):
    return Options(**{"endpoint": server.url, "policy": FAST, "timeout_s": 2.0, "token": "good-token", **changes})


def open_hub(server, **changes):
    hub = Hub(**{"endpoint": server.url, "token": "good-token", "timeout_s": 2.0, "policy": FAST, **changes})
    return hub, hub.snapshot(RepoSpec(REPO))


def files_below(folder):
    """Path → bytes of every file, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    return make_files(tmp_path / "source")


@pytest.fixture
def server(source):
    with HubServer() as hub:
        hub.add_repo(REPO, source)
        yield hub
        assert not hub.errors
        assert not [r for r in hub.requests if r.port == "cdn" and r.authorization], "the token left the hub"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty shared cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"
