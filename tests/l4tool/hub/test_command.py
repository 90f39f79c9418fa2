"""`l4tool fetch` as a user types it: what is printed where, exit codes, and that the token stays unseen."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.l4tool.hub.hub_fixtures import OTHER, REPO, SHARD, WANTED, files_below

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(server, tmp_path):
    """Run `l4tool fetch …`; returns the finished process."""

    def run(*arguments, start=False, **variables):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "L4TOOL_"))}
        env = clean | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "l4tool.main", "fetch", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # a suite that runs in the background has SIGINT ignored, and its children inherit that
        listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, cwd=ROOT, env=env | variables, preexec_fn=listen, **pipes)  # noqa: PLW1509
        if start:
            return process
        process.out, process.err = process.communicate(variables.pop("stdin_text", ""), timeout=60)
        assert "Traceback" not in process.err
        return process

    return run


def test_folder(run, tmp_path, source):
    done = run(REPO, "-o", tmp_path / "out")
    assert (done.returncode, done.out) == (0, f"{tmp_path / 'out'}\n")
    assert "complete" in done.err and set(WANTED) < files_below(tmp_path / "out").keys()
    started = time.monotonic()
    again = run(REPO, "-o", tmp_path / "out")
    assert again.returncode == 0 and "already complete" in again.err and again.out == done.out
    assert time.monotonic() - started < 5  # 0.3 s on a quiet machine


def test_json_and_cache(run, tmp_path):
    result = json.loads(run(REPO, "--json").out)
    assert Path(result["folder"]).is_relative_to(tmp_path / "home") and result["num_files"] == len(WANTED)


def test_dry_run_and_list(run, tmp_path):
    done = run(REPO, "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and SHARD in done.out and not (tmp_path / "out").exists()
    listed = run("--list")
    assert listed.returncode == 0 and "meta-llama/Llama-4-Scout-17B-16E-Instruct" in listed.out and not listed.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 64, "which model"),
        (("scuot",), 64, "did you mean scout"),
        ((REPO, "--layout", "gguf"), 64, "layout"),
        ((REPO, "--jobs", "0"), 64, "jobs"),
        (("demo/None",), 66, "no repository"),
        ((REPO + "@none",), 66, "no such revision"),
        ((REPO, "--include", "none"), 66, "no file fits"),
        ((REPO, "--token", "bad-token"), 78, "does not accept the token"),
        ((REPO, "--token", "@/no/such/file"), 66, "cannot be read"),
        ((REPO, "-o", "/dev/null/x"), 73, "cannot write"),
    ],
)
def test_refusals(run, arguments, code, words):
    done = run(*arguments)
    assert done.returncode == code and words in done.err and not done.out, done.err
    assert len([line for line in done.err.splitlines() if line.startswith("l4tool:")]) <= 1


def test_gated(run, server, source, tmp_path):
    server.add_repo(REPO, source, gated=True)
    (tmp_path / "token").write_text("good-token\n")
    assert run(REPO).returncode == 78
    assert run(REPO, HF_TOKEN="stranger-token").returncode == 77
    assert run(REPO, "-o", tmp_path / "a", "--token", f"@{tmp_path / 'token'}").returncode == 0
    assert run(REPO, "-o", tmp_path / "b", "--token", "-", stdin_text="good-token\n").returncode == 0
    assert run(REPO, "-o", tmp_path / "c", HF_TOKEN="good-token").returncode == 0


def test_token_is_never_shown(run, server, source):
    server.add_repo(REPO, source, gated=True)
    for token in ("stranger-token", "bad-token", "secret with spaces"):
        done = run(REPO, "--token", token, L4TOOL_DEBUG="")
        assert done.returncode in (77, 78) and token not in done.err + done.out


def test_network_and_checksum(run, server, tmp_path):
    done = run(REPO, "--retries", "0", HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 68 and "refuses the connection" in done.err
    assert run(REPO, HF_HUB_OFFLINE="1").returncode == 68
    server.faults.add(SHARD, "wrong-bytes", after_bytes=5, times=None)
    done = run(REPO, "-o", tmp_path / "out")
    assert done.returncode == 76 and SHARD in done.err and "must be" in done.err
    server.faults.clear()
    server.faults.add(SHARD, "status", status=429, retry_after="0", times=None)
    assert run(REPO, "-o", tmp_path / "out", "--retries", "1").returncode == 69


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(run, server, source, tmp_path, number, code):
    server.faults.add(SHARD, "stall", after_bytes=200_000)
    process = run(REPO, "-o", tmp_path / "out", start=True)
    part = tmp_path / "out" / (SHARD + ".part")
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size and (tmp_path / "out" / OTHER).exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    started = time.monotonic()
    error = process.communicate(timeout=30)[1]
    assert process.returncode == code and "Traceback" not in error and time.monotonic() - started < 5
    assert part.exists() and not (tmp_path / "out/.l4tool.lock").exists()
    assert run(REPO, "-o", tmp_path / "out").returncode == 0
    assert "bytes=200000-" in [r.range for r in server.requests if r.port == "cdn"]
    assert (tmp_path / "out" / SHARD).read_bytes() == (source / SHARD).read_bytes()
