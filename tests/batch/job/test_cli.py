"""`l4tool batch` as it is typed: exit codes, one-line errors, the table, the summary."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("l4tool")
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def l4tool(*arguments):
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "Missing argument"),
        (["in.jsonl", "out.jsonl"], "--model"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--temperature", "-1"], "--temperature"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--top-p", "0"], "--top-p"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--max-tokens", "0"], "--max-tokens"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--kv-memory", "lots"], "--kv-memory"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--device", "tpu"], "--device"),
        (["in.jsonl", "out.jsonl", "--model", "m", "--stop", ""], "--stop"),
    ],
)
def test_usage_errors(options, text):
    done = l4tool("batch", *options)
    assert done.returncode == 64 and text in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.count("Error:") == 1


def test_a_missing_input_is_one_line_and_66(tmp_path):
    done = l4tool("batch", tmp_path / "no.jsonl", tmp_path / "out.jsonl", "--model", tmp_path)
    assert done.returncode == 66 and "no.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()


def test_the_examples_run(tmp_path, scout_tiny):
    """The newcomer's command, real engine included: every example is answered."""
    out, summary = tmp_path / "out.jsonl", tmp_path / "summary.json"
    arguments = [EXAMPLES / "requests.jsonl", out, "--model", scout_tiny, "--max-tokens", 4, "--summary", summary]
    done = l4tool("batch", *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^answered +10$", done.stderr, re.MULTILINE) and not done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = [json.loads(line) for line in (EXAMPLES / "requests.jsonl").read_text().splitlines()]

    def name(line):
        return line.get("id") if "custom_id" not in line else line["custom_id"]

    assert sorted(map(name, lines)) == sorted(map(name, wanted)) and not any(line.get("error") for line in lines)
    found = json.loads(summary.read_text())
    assert found["ok"] == 10 and found["images"] == 5 and found["engine"]["steps"] > 0
    again = l4tool("batch", *arguments)
    assert again.returncode == 0 and "nothing to do: all 10 lines" in again.stderr
    other = l4tool("batch", *arguments, "--temperature", 0.5)
    assert other.returncode == 73 and "temperature was" in other.stderr and "--force" in other.stderr
    assert out.read_text().splitlines() == [json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in lines]


def test_error_lines_give_exit_code_3(tmp_path, scout_tiny):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hi", "max_tokens": 2}\nnot json\n')
    done = l4tool("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", scout_tiny)
    assert done.returncode == 3 and re.search(r"^error: invalid_json +1$", done.stderr, re.MULTILINE)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
