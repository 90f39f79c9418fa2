"""`batch --check`: what a run would find, without weights and without running."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from batch.job import BatchOptions, engine_options, run_batch
from l4tool.commands.batch import command
from l4tool.core.errors import UsageError
from tests import checkpoints
from tests.batch.job.conftest import EchoBackend

LINES = [
    {"id": 1, "prompt": "one", "max_tokens": 10},
    {"id": 2, "prompt": "two", "n": 3, "max_tokens": 5},
    {"id": 3, "prompt": "look", "images": ["a.png"], "max_tokens": 1},
    {"id": 1, "prompt": "again", "max_tokens": 7},
    {"id": 4, "prompt": "x", "images": ["missing.png"]},
]


@pytest.fixture
def source(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\nnot json\n")
    return path


@pytest.fixture
def bare(scout_tiny, tmp_path):
    """The checkpoint without a single weight."""
    folder = checkpoints.copy(scout_tiny, tmp_path / "bare")
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    return folder


def check(*arguments):
    done = CliRunner().invoke(command, [*map(str, arguments), "--check"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value, done.stdout


def test_it_counts_what_a_run_counts(source, bare, scout_tiny, tmp_path):
    code, text = check(source, "--model", bare, "--json")
    found = json.loads(text)
    summary = run_batch(BatchOptions(source, tmp_path / "out", scout_tiny), EchoBackend)
    assert code == 3 and (found["lines"], found["blank_lines"]) == (summary.lines, summary.blank_lines) == (6, 1)
    assert found["errors_by_code"] == dict(summary.errors) and found["requests"] == summary.ok == 3
    assert (found["prompt_tokens"], found["images"]) == (summary.prompt_tokens, summary.images)
    assert found["max_new_tokens"] == 10 + 3 * 5 + 1 and found["estimated_max_seconds"] is None
    assert [(bad["line"], bad["code"]) for bad in found["error_lines"]] == [
        (4, "duplicate_id"), (5, "image_not_found"), (7, "invalid_json"),
    ]  # fmt: skip
    assert not (tmp_path / "out.journal.part").exists() and sorted(p.name for p in bare.glob("*")) != []


def test_time_is_estimated_from_a_rate_or_an_earlier_run(source, bare, scout_tiny, tmp_path):
    code, text = check(source, "--model", bare, "--rate", 13, "--duplicates", "run-each")
    assert code == 3 and "estimated at most, at 13 tokens/s out" in text and "2.5 s" in text  # 33 tokens
    assert "in.jsonl:7: invalid_json" in text and "duplicate_id" not in text
    recorded = tmp_path / "summary.json"
    run_batch(BatchOptions(source, tmp_path / "out", scout_tiny, summary=recorded), EchoBackend)
    _, text = check(source, "--model", bare, "--summary", recorded, "--json")
    rate = json.loads(recorded.read_text())["completion_tokens_per_second"]
    assert json.loads(text)["rate"] == rate and json.loads(text)["rate_source"] == str(recorded)


def test_a_sound_file_and_a_folder_of_them(bare, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in ("a", "b"):
        (inbox / f"{name}.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    code, text = check(inbox, "--model", bare, "--json")
    assert code == 0 and json.loads(text)["requests"] == 2  # ids count within one input


def test_a_damaged_archive_is_65(bare, tmp_path):
    import gzip

    from l4tool.core.errors import L4Error

    raw = gzip.compress(b'{"prompt": "x"}\n' * 5000)
    (tmp_path / "in.gz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(L4Error) as caught:
        check(tmp_path / "in.gz", "--model", bare)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("extra, message", [
    (["--kv-dtype", "fp8", "--device", "cpu"], "--kv-dtype fp8 needs a CUDA device"),
    (["--kv-dtype", "fp8", "--weights", "stream"], "--weights stream runs on the CPU only"),
    (["--weights", "stream", "--device", "cuda"], "--weights stream runs on the CPU only"),
    (["--memory", "4GiB"], "--memory goes with --weights stream"),
    (["--weights", "stream", "--workers", "2"], "--weights stream and --workers exclude each other"),
    (["--activations", "int8", "--device", "cuda"], "--activations int8 runs on the CPU only"),
    (["--activations", "int8", "--kv-dtype", "fp8"], "--activations int8 runs on the CPU only, --kv-dtype fp8"),
])  # fmt: skip
def test_options_that_exclude_each_other_are_refused_as_a_run_does(source, bare, scout_tiny, tmp_path, extra, message):
    with pytest.raises(UsageError, match=message):
        check(source, "--model", bare, *extra)
    run = CliRunner().invoke(command, [str(source), str(tmp_path / "out"), "--model", str(scout_tiny), *extra])
    assert isinstance(run.exception, UsageError) and message in str(run.exception)


def test_a_device_that_only_the_run_will_have(source, bare):
    assert check(source, "--model", bare, "--kv-dtype", "fp8", "--device", "cuda")[0] == 3


@pytest.mark.parametrize("extra", [["--rate", "5"], ["--json"], []])
def test_what_belongs_to_a_check_needs_one(source, bare, extra):
    done = CliRunner().invoke(command, [str(source), "--model", str(bare), *extra])
    assert done.exit_code != 0 and ("--check" in done.output or "OUT.jsonl" in done.output)


def test_what_auto_means_where_there_is_a_gpu(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {"weights": "stream"}, {"activations": "int8"}, {}, {"device": "cpu"}, {"kv_dtype": "fp8"}
    found = [engine_options(BatchOptions(tmp_path, tmp_path, tmp_path, **options))["device"] for options in asked]
    assert found == ["cpu", "cpu", "cuda", "cpu", "cuda"]
