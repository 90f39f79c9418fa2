"""`l4tool eval` as it is typed: exit codes, the table, JSON, a killed process, quantized and streamed checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from l4tool.main import main
from tests import checkpoints
from tests.threads import one_thread  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "l4tool.main"]


@pytest.fixture(scope="module")
def quantized(scout_tiny, tmp_path_factory):
    return checkpoints.compress(scout_tiny, tmp_path_factory.mktemp("int4") / "model", "int4")


@pytest.fixture
def data(tmp_path):
    Image.linear_gradient("L").resize((150, 60)).save(tmp_path / "wide.png")
    lines = [
        {
            "id": 1,
            "prompt": "What is this?",
            "images": ["wide.png"],
            "answer": ["a picture", "an image"],
            "task": "seen",
        },
        {"id": 2, "prompt": "What is water?", "answer": "good", "task": "words"},
        {"text": "The water goes down to the old house."},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("options", "text", "code"),
    [
        ([], "MODEL", 64),
        (["m"], "--data", 64),
        (["{model}", "--data", "{data}", "--memory", "1GiB", "--device", "cpu"], "--weights stream", 64),
        (["{model}", "--data", "{data}", "-o", "-"], "-o takes a file", 64),
        (["{model}", "--data", "no.jsonl"], "no.jsonl", 66),
        (["no-such-folder", "--data", "{data}"], "no-such-folder", 66),
        (["{model}", "--data", "{data}", "--against", "no-such-folder"], "no-such-folder", 66),
    ],
)
def test_wrong_options(options, text, code, scout_tiny, data, capsys):
    arguments = [option.format(model=scout_tiny, data=data) for option in options]
    assert main(["eval", *arguments]) == code
    said = capsys.readouterr()
    assert text in said.err and not said.out


def test_table_and_json(quantized, scout_tiny, data, tmp_path, capsys):
    common = ["eval", str(quantized), "--data", str(data), "--against", str(scout_tiny), "--max-tokens", "3"]
    assert main([*common, "--json", str(tmp_path / "f.json")]) == 0
    said = capsys.readouterr()
    rows = [row.split() for row in said.out.splitlines()]
    assert [row[0] for row in rows] == ["task", "-----", "seen", "words", "all"] and "tokens out" in said.err
    found = json.loads((tmp_path / "f.json").read_text())
    assert 0 < found["all"]["kl_mean"] < found["all"]["kl_max"] and found["against"] == str(scout_tiny)
    assert sorted(os.listdir(tmp_path)) == ["f.json", "in.jsonl", "wide.png"]
    stream = ["--weights", "stream", "--json", "-", "--quiet"]
    assert main([*common, *stream]) == 0
    said = capsys.readouterr()
    streamed = json.loads(said.out)
    assert not said.err and streamed["all"]["kl_mean"] == pytest.approx(found["all"]["kl_mean"], rel=0.3)
    assert streamed["all"]["perplexity"] == pytest.approx(found["all"]["perplexity"], rel=0.05)


def test_error_lines_give_exit_code_3(scout_tiny, data, capsys):
    with open(data, "a") as file:
        file.write("not json\n")
    assert main(["eval", str(scout_tiny), "--data", str(data), "--max-tokens", "2", "--dtype", "float32"]) == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].split()[1:3] == ["4", "1"] and "invalid_json" in said.err


def test_a_killed_run_carries_on_with_the_same_figures(quantized, scout_tiny, tmp_path, capsys):
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": i, "prompt": f"number {i}", "answer": f"is {i}", "task": f"t{i % 2}"} for i in range(80)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(output, figures):
        return [
            "eval", str(quantized), "--data", str(data), "--against", str(scout_tiny), "--max-tokens", "6", "--dtype",
            "float32", "-o", str(output), "--json", str(figures), "--max-seqs", "4",
        ]  # fmt: skip

    first = command(out, tmp_path / "figures.json")
    process = subprocess.Popen([*MODULE, *first], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and (not out.exists() or out.stat().st_size < 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "figures.json").exists()
    done = out.read_bytes().count(b"\n")
    assert 0 < done < 80
    assert main(first) == 0
    assert f"carrying on: {done} lines" in capsys.readouterr().err.replace(",", "")
    assert main(command(tmp_path / "whole.jsonl", tmp_path / "whole.json")) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "figures.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
