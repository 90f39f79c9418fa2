"""Whole runs over a backend without a model: every line answered once, in the right form, or told why not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from batch.generation import SamplingOptions
from batch.job import BatchOptions, load_front, run_batch
from batch.journal import Journal
from batch.requests import GenerationResult
from l4tool.core import licence
from l4tool.core.errors import CheckpointError, DeviceError, InputMissing, LockHeld, UsageError, WriteError
from tests import checkpoints
from tests.batch.job.conftest import FORCE, EchoBackend

USER = [{"role": "user", "content": "hi"}]


def openai(custom_id, url="/v1/chat/completions", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def by_id(lines):
    return {line.get("custom_id", line.get("id")): line for line in lines}


def test_openai_lines_get_openais_response_object(run):
    summary, lines = run(
        [
            openai("chat", model="llama", messages=USER, max_tokens=3, logprobs=True, top_logprobs=2, n=2),
            openai("text", "/v1/completions", prompt="Once upon a time", logprobs=1, max_tokens=2),
        ]
    )
    chat, text = (by_id(lines)[name] for name in ("chat", "text"))
    assert list(chat) == ["id", "custom_id", "response", "error"] and chat["error"] is None
    assert chat["id"].startswith("batch_req_") and chat["id"] != text["id"]
    assert list(chat["response"]) == ["status_code", "request_id", "body"] and chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert body["object"] == "chat.completion" and body["model"] == "llama" and body["id"].startswith("chatcmpl-")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert choice["finish_reason"] == "length" and len(choice["logprobs"]["content"]) == 3
    first = choice["logprobs"]["content"][0]
    assert first["logprob"] == -9999.0 and len(first["top_logprobs"]) == 2  # minus infinity is not JSON
    assert bytes(first["bytes"]).decode("utf-8", "replace") == first["token"]
    usage = body["usage"]
    assert usage["completion_tokens"] == 6 and usage["total_tokens"] == usage["prompt_tokens"] + 6
    body = text["response"]["body"]
    assert body["object"] == "text_completion" and body["model"] == "model" and "text" in body["choices"][0]
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 2
    assert (summary.ok, summary.num_errors, summary.completion_tokens) == (2, 0, 8)


def test_short_lines(run):
    _, lines = run([{"id": 5, "prompt": "hi", "max_tokens": 4}, {"prompt": "there", "n": 2, "logprobs": True}])
    one = next(line for line in lines if line["id"] == 5)
    assert list(one) == ["id", "text", "finish_reason", "usage"] and one["usage"]["completion_tokens"] == 4
    two = next(line for line in lines if line["id"] is None)
    assert two["line"] == 2 and [c["index"] for c in two["choices"]] == [0, 1]
    assert two["text"] == two["choices"][0]["text"] and len(two["logprobs"]) == 5


BAD = [
    (b"not json", "invalid_json"),
    (b"[1]", "invalid_line"),
    (b'"x"', "invalid_line"),
    (b'{"prompt": "\xff\xfe"}', "invalid_json"),
    (b'{"prompt": "a\x00b"}', "invalid_json"),
    (b'{"prompt": NaN}', "invalid_json"),
    (b'{"prompt": "x", "temperature": 1e999}', "invalid_request"),
    (b'{"prompt": "x", "prompt": "y"}', "invalid_json"),
    (b'{"prompt": "\\ud800"}', "invalid_json"),
    (b'{"prompt":' + b"[" * 100_000, "invalid_json"),
    ({"prompt": "x", "nonsense": 1}, "unknown_field"),
    ({"prompt": "x", "stream": True}, "unsupported_field"),
    ({"prompt": "x", "images": ["missing.png"]}, "image_not_found"),
    ({"prompt": "x", "images": ["https://example.com/a.png"]}, "remote_image"),
    ({"prompt": "x", "images": ["broken.png"]}, "invalid_image"),
    ({"prompt": "x", "images": ["good.png"] * 3}, "too_many_images"),
    ({"prompt": "word " * 5000}, "prompt_too_long"),
    ({"prompt": [4095, 4096]}, "invalid_request"),
    ({"prompt": []}, "invalid_request"),
    ({"prompt": "<|patch|>", "raw": True, "parse_special": True}, "invalid_request"),
    ({"prompt": "many " * 2100}, "out_of_memory"),
    (b'{"prompt": "' + b"x" * 100_000 + b'"}', "line_too_long"),
]


def test_every_bad_line_becomes_one_error_line_with_its_number(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    Image.new("RGB", (10, 10)).save(tmp_path / "good.png")
    good = {"prompt": "hi", "images": ["good.png"]}
    lines = [item for place, pair in enumerate(BAD) for item in (pair[0], {"id": place, **good})]
    summary, out = run(lines, max_images=2, max_line_bytes=90_000)
    # the deeply nested line and the long one are above the limit of this run
    expected = [("line_too_long" if len(line) > 90_000 else code) for line, code in BAD]
    errors = {line["line"]: line["error"]["code"] for line in out if "error" in line}
    assert errors == {1 + 2 * place: code for place, code in enumerate(expected)}
    assert len(out) == len(lines) and summary.ok == len(BAD) and summary.num_errors == len(BAD)
    assert all(line["error"]["message"] for line in out if "error" in line)


def test_deep_nesting_within_the_limit(run):
    _, out = run([b'{"prompt":' + b"[" * 100_000])
    assert out[0]["error"] == {"code": "invalid_json", "message": "nested too deeply"}


@pytest.mark.parametrize(
    "line",
    [
        openai("the id", messages=USER, nonsense=1),
        {**openai("the id", messages=USER), "method": "GET"},
        b'{"custom_id": "the id", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [}}',
        b'{"custom_id": "the id", "body": NaN}',
    ],
)
def test_errors_of_openai_lines_have_openais_form(run, line):
    _, (out,) = run([line])
    assert list(out) == ["id", "custom_id", "response", "error"]
    assert out["custom_id"] == "the id" and out["response"]["status_code"] == 400
    assert set(out["error"]) == {"code", "message"} and out["error"]["message"].startswith("line 1: ")
    inner = out["response"]["body"]["error"]
    assert inner == {**out["error"], "type": "invalid_request_error", "param": None}


def test_blank_lines_crlf_bom_and_missing_newline(run):
    data = b'\xef\xbb\xbf\r\n{"id": 1, "prompt": "a"}\r\n   \r\n{"id": 2, "prompt": "b"}'
    summary, out = run(data)
    assert {line["id"] for line in out} == {1, 2} and (summary.lines, summary.blank_lines) == (2, 2)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_input_is_nothing_to_do(run, capsys, data):
    def no_backend(options, front):
        raise AssertionError("the model is not needed")

    summary, out = run(data, no_backend)
    assert out == [] and summary.ok == 0 and "nothing to do" in capsys.readouterr().err


def test_limit(run):
    summary, out = run([{"prompt": str(i)} for i in range(10)], limit=3)
    assert len(out) == 3 and summary.lines == 3


def test_a_line_says_the_same_wherever_it_stands(run):
    line = {"id": "x", "prompt": "draw", "temperature": 1}
    alone = by_id(run([line])[1])["x"]
    among = by_id(run([{"prompt": f"{i}"} for i in range(20)] + [line])[1])["x"]
    other_seed = by_id(run([line], sampling=SamplingOptions(seed=1))[1])["x"]
    assert alone == among and alone["text"] != other_seed["text"]


def test_output_order_is_free_but_complete(run):
    _, out = run([{"id": i, "prompt": f"{i}"} for i in range(50)])
    assert sorted(line["id"] for line in out) == list(range(50))


def test_summary_file(run, tmp_path):
    path = tmp_path / "summary.json"
    run([{"prompt": "hi"}, b"bad", b"", {"prompt": "x", "images": []}], summary=path)
    found = json.loads(path.read_text())
    assert (found["lines"], found["ok"], found["errors"], found["blank_lines"]) == (3, 2, 1, 1)
    assert found["errors_by_code"] == {"invalid_json": 1} and found["finish_reasons"] == {"length": 2}
    assert found["complete"] and found["engine"] == {"steps": 2} and len(found["model_fingerprint"]) == 16
    assert found["prompt_tokens"] > 0 and "torch" in found["versions"]


def test_summary_names_the_licence(scout_tiny, tmp_path):
    """Random weights with a licence of their own, and a folder whose card says Llama 4."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')

    def license_of(model):
        options = BatchOptions(tmp_path / "in.jsonl", tmp_path / "out", model, summary=tmp_path / "s", state=FORCE)
        run_batch(options, EchoBackend)
        return json.loads((tmp_path / "s").read_text())["license"]

    assert license_of(scout_tiny) == {"model": "model", "name": "apache-2.0"}
    llama = checkpoints.copy(scout_tiny, tmp_path / "Llama-4-Scout-INT4")
    (llama / "README.md").write_text("---\nlicense: other\nlicense_name: llama4\n---\n")
    found = license_of(llama)
    assert (found["model"], found["name"]) == ("Llama-4-Scout-INT4", "Llama 4 Community License")
    assert found["notice"] == licence.NOTICE and 'begins with "Llama"' in found["duty"]


class LosingBackend(EchoBackend):
    def run(self, source):
        while (request := source.take(wait=True)) is not None:
            if request.prompt[-1] % 2:
                yield self.answer(request)


def test_a_backend_that_loses_requests_does_not_lose_lines(run):
    _, out = run([{"id": i, "prompt": "x", "raw": True} | {"prompt": f"n {i}"} for i in range(40)], LosingBackend)
    assert sorted(line["id"] for line in out) == list(range(40))
    assert any(line.get("error", {}).get("code") == "internal_error" for line in out)


class EarlyBackend(EchoBackend):
    def run(self, source):
        yield self.answer(source.take(wait=True))


def test_a_backend_that_ends_early_does_not_lose_lines(run):
    summary, out = run([{"id": i, "prompt": f"n {i}"} for i in range(200)], EarlyBackend)
    assert sorted(line["id"] for line in out) == list(range(200)) and summary.ok == 1


class FailingBackend(EchoBackend):
    def run(self, source):
        for count, result in enumerate(super().run(source)):
            if count == 3:
                raise RuntimeError("the device is gone")
            yield result


def test_a_failing_backend_leaves_whole_lines_and_a_summary(run, tmp_path, capsys):
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(DeviceError):
        run([{"prompt": str(i)} for i in range(20)], FailingBackend, summary=tmp_path / "summary.json")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["ok"], found["complete"]) == (3, False) and "3 lines" in capsys.readouterr().err
    assert len([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]) == 3
    assert not {thread.name for thread in threading.enumerate()} - before


class TestPaths:
    def options(self, tmp_path, scout_tiny, **changes):
        source = tmp_path / "in.jsonl"
        source.write_text('{"prompt": "hi"}\n')
        return BatchOptions(**{"input": source, "output": tmp_path / "out.jsonl", "model": scout_tiny} | changes)

    def check(self, options, error, match):
        with pytest.raises(error, match=match):
            run_batch(options, lambda options, front: pytest.fail("the model was loaded"))

    def test_missing_input(self, tmp_path, scout_tiny):
        self.check(self.options(tmp_path, scout_tiny, input=tmp_path / "no.jsonl"), InputMissing, "No such file")
        self.check(self.options(tmp_path, scout_tiny, input=tmp_path), InputMissing, "directory")

    def test_missing_model(self, tmp_path, scout_tiny):
        self.check(self.options(tmp_path, scout_tiny, model=tmp_path / "no"), InputMissing, "no such checkpoint")
        self.check(self.options(tmp_path, scout_tiny, model=tmp_path), InputMissing, r"config\.json")
        assert not (tmp_path / "out.jsonl").exists()

    def test_output_is_the_input(self, tmp_path, scout_tiny):
        os.link(self.options(tmp_path, scout_tiny).input, tmp_path / "link")
        for name in ("in.jsonl", "link"):
            target = tmp_path / name
            self.check(self.options(tmp_path, scout_tiny, output=target, state=FORCE), UsageError, "is the input")
            self.check(self.options(tmp_path, scout_tiny, summary=target), UsageError, "is the input")
        assert (tmp_path / "in.jsonl").read_text() == '{"prompt": "hi"}\n'

    def test_output_not_empty(self, tmp_path, scout_tiny):
        (tmp_path / "out.jsonl").write_text("precious\n")
        self.check(self.options(tmp_path, scout_tiny), WriteError, "not empty")
        assert (tmp_path / "out.jsonl").read_text() == "precious\n"
        summary = run_batch(self.options(tmp_path, scout_tiny, state=FORCE), EchoBackend)
        assert summary.ok == 1 and "precious" not in (tmp_path / "out.jsonl").read_text()

    def test_output_folder_missing_or_a_folder(self, tmp_path, scout_tiny):
        self.check(self.options(tmp_path, scout_tiny, output=tmp_path / "no/out.jsonl"), WriteError, "no such folder")
        self.check(self.options(tmp_path, scout_tiny, output=tmp_path), WriteError, "is a folder")
        self.check(self.options(tmp_path, scout_tiny, summary=tmp_path / "no/s.json"), WriteError, "no such folder")
        both = self.options(tmp_path, scout_tiny, summary=tmp_path / "out.jsonl")
        self.check(both, UsageError, "same file")

    def test_output_locked(self, tmp_path, scout_tiny):
        held = Journal(tmp_path / "out.jsonl.journal")
        self.check(self.options(tmp_path, scout_tiny, state=FORCE), LockHeld, "another run")
        held.close()
        assert run_batch(self.options(tmp_path, scout_tiny), EchoBackend).ok == 1

    def test_a_model_that_does_not_load_leaves_no_output(self, tmp_path, scout_tiny):
        def broken(options, front):
            raise CheckpointError("bad weights")

        with pytest.raises(CheckpointError):
            run_batch(self.options(tmp_path, scout_tiny), broken)
        assert not (tmp_path / "out.jsonl").exists()
        (tmp_path / "out.jsonl").write_text("old answers\n")
        with pytest.raises(CheckpointError):
            run_batch(self.options(tmp_path, scout_tiny, state=FORCE), broken)
        assert (tmp_path / "out.jsonl").read_text() == "old answers\n"

    def test_input_may_be_a_pipe(self, tmp_path, scout_tiny, monkeypatch):
        os.mkfifo(tmp_path / "pipe")
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        monkeypatch.chdir(tmp_path)
        text = '{"prompt": "x", "images": ["a.png"]}\n' * 3
        writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(text))
        writer.start()
        summary = run_batch(self.options(tmp_path, scout_tiny, input=tmp_path / "pipe"), EchoBackend)
        writer.join()
        assert summary.ok == 3

    def test_checkpoint_files_that_do_not_fit(self, tmp_path, scout_tiny):
        folder = checkpoints.copy(scout_tiny, tmp_path / "model")
        (folder / "generation_config.json").write_text('{"temperature": "warm"}')
        self.check(self.options(tmp_path, folder), CheckpointError, "temperature")
        (folder / "generation_config.json").write_text("{}")
        (folder / "chat_template.jinja").write_text("{% if %}")
        self.check(self.options(tmp_path, folder), CheckpointError, "chat template")
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer.json").unlink()
        self.check(self.options(tmp_path, folder), CheckpointError, r"tokenizer\.json")

    def test_preprocessor_values_where_transformers_5_keeps_them(self, tmp_path, scout_tiny):
        folder = checkpoints.copy(scout_tiny, tmp_path / "model")
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text('{"image_processor": {"max_patches": 3}}')
        assert load_front(self.options(tmp_path, folder)).tiles.max_tiles == 3

    def test_output_may_be_a_device(self, tmp_path, scout_tiny):
        assert run_batch(self.options(tmp_path, scout_tiny, output=Path("/dev/null")), EchoBackend).ok == 1


def test_text_only_checkpoints_refuse_images(tmp_path, scout_tiny_text):
    source = tmp_path / "in.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source.write_text('{"prompt": "hi"}\n{"prompt": "see", "images": ["a.png"]}\n')
    summary = run_batch(BatchOptions(source, tmp_path / "out", scout_tiny_text), EchoBackend)
    assert summary.ok == 1 and dict(summary.errors) == {"no_vision": 1}


class SlowBackend(EchoBackend):
    """One result every few milliseconds, for ever: to be interrupted."""

    def run(self, source):
        for result in super().run(source):
            time.sleep(0.002)
            yield result


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_whole_lines(tmp_path, scout_tiny, number, code):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"id": {i}, "prompt": "line {i}"}}\n' for i in range(100_000)))
    root = Path(__file__).resolve().parents[3]
    script = (
        "import sys; from pathlib import Path; import batch.job as job; from l4tool.main import main\n"
        "from tests.batch.job.test_job import SlowBackend\n"
        "job.run_batch.__defaults__ = (SlowBackend,)\n"
        f"sys.exit(main(['batch', {str(source)!r}, {str(target)!r}, '--model', {str(scout_tiny)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and (not target.exists() or target.stat().st_size < 2000):
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    raw = target.read_bytes()
    assert raw.endswith(b"\n") and all("id" in json.loads(line) for line in raw.splitlines())


def test_results_travel_as_they_finish(tmp_path, scout_tiny):
    """The line is in the file when the next result is asked for."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    seen = []

    class Watching(EchoBackend):
        def run(self, source):
            while (request := source.take(wait=True)) is not None:
                yield GenerationResult(request.key, self.answer(request).choices, 1)
                seen.append(target.read_bytes().count(b"\n"))

    run_batch(BatchOptions(source, target, scout_tiny), Watching)
    assert seen == [1, 2]


def test_models_in_the_shared_cache_answer_under_their_name(scout_tiny, tmp_path):
    snapshot = tmp_path / "models--meta-llama--Llama-4-Scout" / "snapshots" / ("0" * 40)
    checkpoints.copy(scout_tiny, snapshot)
    (tmp_path / "in.jsonl").write_text(json.dumps(openai("a", messages=USER)) + "\n")
    run_batch(BatchOptions(tmp_path / "in.jsonl", tmp_path / "out", snapshot), EchoBackend)
    assert json.loads((tmp_path / "out").read_text())["response"]["body"]["model"] == "Llama-4-Scout"


def test_lines_are_prepared_while_the_model_loads(run, monkeypatch):
    import threading

    from batch.prepare import LinePreparer

    prepared, real = threading.Event(), LinePreparer.prepare
    monkeypatch.setattr(LinePreparer, "prepare", lambda *a, **k: (real(*a, **k), prepared.set())[0])

    class SlowToLoad(EchoBackend):
        def __init__(self, *arguments):
            assert prepared.wait(20), "nothing is prepared before the backend is there"
            super().__init__(*arguments)

    _, lines = run([{"id": 1, "prompt": "a"}], SlowToLoad)
    assert lines[0]["id"] == 1


def test_a_backend_that_cannot_be_made_leaves_no_threads(run):
    import threading

    from l4tool.core.errors import DeviceError

    class Broken(EchoBackend):
        def __init__(self, *arguments):
            raise DeviceError("no such device")

    with pytest.raises(DeviceError):
        run([{"id": 1, "prompt": "a"}], Broken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]
