"""A million lines: bounded memory, and the next run begins soon. Slow: see bench/pipeline.py for the figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))
import pipeline  # noqa: E402


def measure(count, folder, model):
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    with open(source, "a") as file:
        file.writelines(pipeline.line(number, "token ids") for number in count)
    command = [sys.executable, ROOT / "bench" / "pipeline.py", "--one", source, output, model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_job_and_one_line_more(tmp_path, scout_tiny, count):
    first = measure(range(count), tmp_path, scout_tiny)
    assert first["lines"] == count and first["peak_mib"] < 300
    assert first["lines"] / first["seconds"] > 2000  # 15,600 were measured on two busy cores
    again = measure(range(count, count + 1), tmp_path, scout_tiny)
    assert again["lines"] == 1 and again["peak_mib"] < 400  # 344 were measured
    assert again["first_s"] < 45  # 6 to 10 s were measured
