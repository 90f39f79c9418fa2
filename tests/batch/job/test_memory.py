"""Nothing grows with the file: a long run's memory is that of a short one, and the front is fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
from pathlib import Path
from batch.job import BatchOptions, run_batch
from batch.requests import Choice, GenerationResult

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

class Instant:
    count, early = 0, 0.0
    def __init__(self, options, front): pass
    def run(self, source):
        while (request := source.take(wait=True)) is not None:
            Instant.count += 1
            if Instant.count == 2000:
                Instant.early = resident_mib()
            yield GenerationResult(request.key, [Choice(0, request.prompt[:4], "some text", "length")], 9)
        Instant.late = resident_mib()
    def close(self): pass

source, target, model = map(Path, sys.argv[1:])
summary = run_batch(BatchOptions(source, target, model), Instant)
print(json.dumps({"ok": summary.ok, "errors": summary.num_errors, "seconds": summary.seconds,
                  "early": Instant.early, "late": Instant.late}))
"""


@pytest.mark.parametrize("count", [12_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_is_flat(tmp_path, scout_tiny, count):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with open(source, "w") as file:
        for i in range(count):
            content = f"Question {i}: what is the capital of country number {i}? Say why."
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write("broken\n" if i % 100 == 99 else json.dumps(line) + "\n")
    command = [sys.executable, "-c", SCRIPT, source, target, scout_tiny]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["errors"]) == (count - count // 100, count // 100)
    assert found["late"] - found["early"] < 12 + count * 100 / 2**20  # MiB; a key is under 100 bytes, a line far more
    with open(target, "rb") as file:
        ids = {json.loads(line).get("custom_id") for line in file}
    assert len(ids) == count - count // 100 + 1  # every custom_id once, and None
    assert count / found["seconds"] > 1000  # lines per second; 5000 and more on two quiet cores
