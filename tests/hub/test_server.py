"""The hub server, judged by the real huggingface_hub client and by hf_xet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.server import HubServer
from tests.l4tool.hub.fetching import wait_until

NAME = "demo/Random-Scout"
WEIGHTS = "model-00001-of-00001.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository: LFS and plain files, one of them long enough to be compressed, and folders."""
    folder = tmp_path_factory.mktemp("repo")
    (folder / WEIGHTS).write_bytes(hashlib.shake_256(b"weights").digest(3_000_001))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x" * 5000}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: demo/Base\n---\nA card.\n")
    (folder / "original" / "deep").mkdir(parents=True)
    (folder / "original" / "params.json").write_text("{}")
    (folder / "original" / "deep" / "with space.txt").write_text("text")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo(NAME, folder)
        yield server


def real_client(hub: HubServer, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code with huggingface_hub pointed at `hub` from its import on, as a user's shell does it."""
    common = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | common | environment
    command = [sys.executable, "-c", "from huggingface_hub import *\n" + code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    """Files without the client's own bookkeeping."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_model_info(hub: HubServer, folder: Path) -> None:
    info = HfApi(hub.url).model_info(NAME, files_metadata=True)
    assert info.sha == hub.repos[NAME].branches["main"] and info.gated is False
    assert info.card_data.license == "apache-2.0" and info.card_data.base_model == "demo/Base"
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert set(siblings) == set(contents(folder))
    weights = siblings[WEIGHTS]
    assert weights.lfs.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert weights.size == weights.lfs.size == 3_000_001
    expanded = HfApi(hub.url).model_info(NAME, expand=["sha", "gated"])
    assert expanded.sha == info.sha and expanded.siblings is None


def test_git_hashes_are_gits(hub: HubServer, folder: Path) -> None:
    """blob_id of a small file is what git says; of an LFS file it is git's id of the pointer."""
    entries = {entry.path: entry for entry in HfApi(hub.url).list_repo_tree(NAME, recursive=True)}
    config = subprocess.run(["git", "hash-object", folder / "config.json"], capture_output=True, text=True)
    assert entries["config.json"].blob_id == config.stdout.strip()
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 3000001\n"
    made = subprocess.run(["git", "hash-object", "--stdin"], input=pointer, capture_output=True, text=True)
    assert entries[WEIGHTS].blob_id == made.stdout.strip()
    assert entries[WEIGHTS].lfs.pointer_size == len(pointer)


def test_tree(hub: HubServer, folder: Path) -> None:
    api = HfApi(hub.url)
    root = {entry.path for entry in api.list_repo_tree(NAME)}
    assert root == {WEIGHTS, "config.json", "tokenizer_config.json", "README.md", "original"}
    below = {entry.path for entry in api.list_repo_tree(NAME, "original")}
    assert below == {"original/params.json", "original/deep"}
    assert set(api.list_repo_files(NAME)) == set(contents(folder))
    expanded = {entry.path: entry for entry in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert expanded["config.json"].last_commit.title == "Upload" and expanded["config.json"].security.safe
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(NAME, "nowhere"))
    paths = api.get_paths_info(NAME, ["config.json", "original", "missing"])
    assert [entry.path for entry in paths] == ["config.json", "original"]


def test_tree_in_pages(hub: HubServer) -> None:
    whole = list(HfApi(hub.url).list_repo_tree(NAME, recursive=True))
    hub.page_size = 3
    hub.requests.clear()
    assert list(HfApi(hub.url).list_repo_tree(NAME, recursive=True)) == whole
    assert len(hub.requests) == -(-len(whole) // 3)


def test_revisions(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = hub.repos[NAME].branches["main"]
    second = hub.add_repo(NAME, tmp_path, branch="next")
    api = HfApi(hub.url)
    assert api.model_info(NAME).sha == first != second
    assert api.model_info(NAME, revision="next").sha == api.model_info(NAME, revision=second).sha == second
    assert {branch.name: branch.target_commit for branch in api.list_repo_refs(NAME).branches} == {
        "main": first,
        "next": second,
    }


def test_what_is_not_there(hub: HubServer, tmp_path: Path) -> None:
    api = HfApi(hub.url)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("demo/Nothing")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("demo/Nothing", token="good-token")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        list(api.list_repo_tree(NAME, revision="nowhere"))
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(NAME, "missing.json", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(NAME, "config.json", revision="nowhere", cache_dir=tmp_path)


def test_gated(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Everybody sees what is in a gated repository; its files are for users with access."""
    hub.add_repo("demo/Gated", folder, gated=True)
    api = HfApi(hub.url)
    assert api.model_info("demo/Gated", token=False).gated == "manual"
    for token, status in ((False, 401), ("stranger-token", 403)):
        for file in ("config.json", WEIGHTS):
            with pytest.raises(GatedRepoError) as error:
                api.hf_hub_download("demo/Gated", file, cache_dir=tmp_path, token=token)
            assert error.value.response.status_code == status
    path = api.hf_hub_download("demo/Gated", WEIGHTS, cache_dir=tmp_path, token="good-token")
    assert Path(path).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert [r.authorization for r in hub.requests if r.port == "cdn"] == [None]


def test_private_and_wrong_tokens(hub: HubServer, folder: Path) -> None:
    hub.add_repo("demo/Private", folder, private=True)
    api = HfApi(hub.url)
    for token in (False, "stranger-token"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("demo/Private", token=token)
    assert api.model_info("demo/Private", token="good-token").private
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info(NAME, token="made-up")
    assert api.whoami("good-token")["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("made-up")


@pytest.mark.parametrize("resolve_cache", [False, True])
@pytest.mark.parametrize("target", ["cache", "folder"])
def test_snapshot_download(hub: HubServer, folder: Path, tmp_path: Path, target: str, resolve_cache: bool) -> None:
    """Over HTTP, with a token: everything arrives, and the token stays on the hub."""
    hub.resolve_cache = resolve_cache
    where = f"local_dir={str(tmp_path)!r}" if target == "folder" else f"cache_dir={str(tmp_path)!r}"
    run = real_client(hub, f"print(snapshot_download({NAME!r}, {where}, token='good-token'))", HF_HUB_DISABLE_XET="1")
    assert run.returncode == 0, run.stderr
    assert contents(Path(run.stdout.strip())) == contents(folder)
    ports = {request.port: request.authorization for request in hub.requests if request.status in (200, 206)}
    assert ports == {"hub": "Bearer good-token", "cdn": None}


def test_xet_download(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """The real hf_xet fetches the weights from Xet's storage: not one byte from the CDN."""
    hub.add_repo("demo/Xet", folder, xet=True)
    environment = {"HF_XET_CACHE": str(tmp_path / "xet"), "HF_HOME": str(tmp_path / "home")}
    code = f"print(snapshot_download('demo/Xet', local_dir={str(tmp_path / 'out')!r}))"
    run = real_client(hub, code, **environment)
    assert run.returncode == 0, run.stderr
    assert contents(tmp_path / "out") == contents(folder)
    assert sum(r.sent for r in hub.requests if r.port == "xet" and r.file) >= 3_000_001
    assert not [request for request in hub.requests if request.port == "cdn"]


def test_xet_can_hang(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("demo/Xet", folder, xet=True)
    hub.faults.add("xorb", "hang", times=None)
    code = f"hf_hub_download('demo/Xet', {WEIGHTS!r}, local_dir={str(tmp_path / 'out')!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-c", f"from huggingface_hub import *\n{code}"],
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_XET_CACHE": str(tmp_path / "xet"), "HF_HUB_DISABLE_XET": ""},
            capture_output=True,
            timeout=4,
        )
    assert [request.port for request in hub.requests if "/xorbs/" in request.path]
    assert not [request for request in hub.requests if request.port == "cdn"]


def file_url(hub: HubServer, name: str = WEIGHTS) -> str:
    return f"{hub.url}/{NAME}/resolve/main/{name}"


def get(url: str, **headers: str) -> httpx2.Response:
    return httpx2.get(url, headers={"Accept-Encoding": "identity", **headers}, follow_redirects=True, timeout=5)


def test_ranges(hub: HubServer, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    part = get(file_url(hub), Range="bytes=1000000-1999999")
    assert (part.status_code, part.content) == (206, data[1_000_000:2_000_000])
    assert part.headers["Content-Range"] == "bytes 1000000-1999999/3000001"
    assert get(file_url(hub), Range="bytes=2999999-").content == data[-2:]
    assert get(file_url(hub), Range="bytes=-5").content == data[-5:]
    beyond = get(file_url(hub), Range="bytes=3000001-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, "bytes */3000001")
    etag = part.headers["ETag"]
    assert get(file_url(hub), Range="bytes=5-", **{"If-Range": etag}).status_code == 206
    assert get(file_url(hub), Range="bytes=5-", **{"If-Range": '"other"'}).content == data


def test_small_files_are_compressed_for_who_takes_it(hub: HubServer, folder: Path) -> None:
    answer = httpx2.get(
        file_url(hub, "tokenizer_config.json"), headers={"Accept-Encoding": "gzip", "Range": "bytes=9-"}
    )
    assert (answer.status_code, answer.headers["Content-Encoding"]) == (200, "gzip")
    assert answer.content == (folder / "tokenizer_config.json").read_bytes()
    assert "Content-Length" not in answer.headers
    assert "Content-Encoding" not in get(file_url(hub, "tokenizer_config.json")).headers


def test_the_real_client_resumes_after_a_cut(hub: HubServer, tmp_path: Path) -> None:
    """It writes pieces of 10 MiB, so the cut comes after the first one."""
    piece, size = 10 * 2**20, 11_000_000
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / WEIGHTS).write_bytes(data := hashlib.shake_256(b"big").digest(size))
    hub.add_repo("demo/Big", tmp_path / "repo")
    hub.faults.add("*.safetensors", "cut", after_bytes=piece + 9)
    code = f"print(hf_hub_download('demo/Big', {WEIGHTS!r}, local_dir={str(tmp_path / 'out')!r}))"
    run = real_client(hub, code, HF_HUB_DISABLE_XET="1")
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).read_bytes() == data
    ranges = [(request.range, request.sent) for request in hub.requests if request.port == "cdn"]
    assert ranges == [(None, piece + 9), (f"bytes={piece}-", size - piece)]
    assert hub.bytes_sent(WEIGHTS) == size + 9


FAULTS = {  # kind → options, and what a plain GET of the weights meets
    "drop": ({}, httpx2.RemoteProtocolError),
    "hang": ({}, httpx2.ReadTimeout),
    "cut": ({"after_bytes": 7}, httpx2.RemoteProtocolError),
    "reset": ({"after_bytes": 7}, httpx2.ReadError),
    "stall": ({"after_bytes": 7}, httpx2.ReadTimeout),
    "redirect-loop": ({"times": None}, httpx2.TooManyRedirects),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_broken_connections(hub: HubServer, kind: str) -> None:
    options, error = FAULTS[kind]
    hub.faults.add(WEIGHTS, kind, **options)  # type: ignore[arg-type]
    with pytest.raises(error):
        httpx2.get(file_url(hub), follow_redirects=True, timeout=1)


def test_wrong_answers(hub: HubServer, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    cases = {
        "short": (200, data[:-7]),
        "wrong-bytes": (200, data[:7] + bytes([data[7] ^ 0x40]) + data[8:]),
        "no-length": (200, data),
    }
    for kind, expected in cases.items():
        fault = hub.faults.add(WEIGHTS, kind, after_bytes=7)  # type: ignore[arg-type]
        answer = get(file_url(hub))
        assert (answer.status_code, answer.content) == expected, kind
        assert fault.struck == 1 and get(file_url(hub)).content == data
    hub.faults.add(WEIGHTS, "no-range")
    assert get(file_url(hub), Range="bytes=9-").status_code == 200
    wait_until(lambda: hub.requests[-1].sent == len(data))  # counted once it is sent, when the other side may have it
    hub.faults.add(WEIGHTS, "wrong-range")
    wrong = get(file_url(hub), Range="bytes=9-")
    assert wrong.headers["Content-Range"].startswith("bytes 9-") and wrong.content == data[:-9]
    hub.faults.add(WEIGHTS, "other-range")
    other = get(file_url(hub), Range="bytes=9-")
    assert (other.status_code, other.headers["Content-Range"], other.content) == (206, "bytes 0-3000000/3000001", data)
    hub.faults.add(WEIGHTS, "wrong-etag", where="resolve")
    etags = [httpx2.head(file_url(hub)).headers["X-Linked-Etag"] for _ in range(2)]
    assert etags[0] != etags[1] == f'"{hashlib.sha256(data).hexdigest()}"'
    hub.faults.add(WEIGHTS, "html")
    assert "log in" in get(file_url(hub)).text


def test_statuses(hub: HubServer) -> None:
    hub.faults.add(WEIGHTS, "status", status=429, retry_after="7", where="cdn")
    answer = get(file_url(hub))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    hub.faults.add("info", "status", status=503, times=None)
    with pytest.raises(HfHubHTTPError, match="503"):
        HfApi(hub.url).model_info(NAME)


def test_slow(hub: HubServer, folder: Path) -> None:
    hub.faults.add(WEIGHTS, "slow", bytes_per_s=2_000_000)
    started = time.monotonic()
    assert get(file_url(hub), Range="bytes=0-999999").content == (folder / WEIGHTS).read_bytes()[:1_000_000]
    assert time.monotonic() - started > 0.45


def test_faults_must_have_a_known_kind(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="no fault of kind"):
        hub.faults.add("*", "explode")  # type: ignore[arg-type]


def start_server(folder: Path, port_file: Path, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-m", "tests.hub.server", "--repo", f"{NAME}={folder}", "--port-file", str(port_file)]
    process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not port_file.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process, port_file.read_text().strip()


def test_command(folder: Path, tmp_path: Path) -> None:
    process, url = start_server(folder, tmp_path / "port", "--gated", "--token", "mine")
    try:
        api = HfApi(url)
        with pytest.raises(GatedRepoError):
            api.hf_hub_download(NAME, "config.json", cache_dir=tmp_path, token=False)
        assert Path(api.hf_hub_download(NAME, "config.json", cache_dir=tmp_path, token="mine")).exists()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_command_ends_with_its_parent(folder: Path, tmp_path: Path) -> None:
    """The server's parent is a shell that dies at once."""
    port_file = tmp_path / "port"
    server = f"{sys.executable} -m tests.hub.server --repo {NAME}={folder} --port-file {port_file}"
    subprocess.run(["bash", "-c", f"{server} >/dev/null & until [ -e {port_file} ]; do sleep 0.05; done"], cwd=ROOT)
    url = port_file.read_text().strip()
    deadline = time.monotonic() + 10
    with pytest.raises(httpx2.ConnectError):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.ReadError, httpx2.RemoteProtocolError):  # it ends while it answers
                httpx2.get(f"{url}/api/models/{NAME}")
            time.sleep(0.1)
