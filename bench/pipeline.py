"""What the pipeline around the model costs: reader, schema, template, tokenizer, journal and output.

The backend answers at once.

    python bench/pipeline.py [--lines 1000000] [--model DIR]

Prints lines per second and peak memory of a whole run, with prompts given as token ids and as chats, and how long a run
over a finished job of that size, with one line added, takes until that line is answered.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Instant:
    """A backend that answers every request at once."""

    first_s: float | None = None  # time.monotonic() at the first request

    def __init__(self, options: Any, front: Any) -> None:
        pass

    def run(self, source: Any) -> Iterator[Any]:
        from batch.requests import Choice, GenerationResult

        while (request := source.take(wait=True)) is not None:
            if Instant.first_s is None:
                Instant.first_s = time.monotonic()
            yield GenerationResult(request.key, [Choice(0, request.prompt[:4], "some text", "length")], 24)

    def close(self) -> None:
        pass


def line(number: int, kind: str) -> str:
    if kind == "chat":
        text = f"Question {number}: what is the capital of country number {number}? Say why."
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
        url = "/v1/chat/completions"
    else:
        body = {"prompt": [(number * 7 + place) % 1000 for place in range(24)], "max_tokens": 16}
        url = "/v1/completions"
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}) + "\n"


def one_run(source: Path, output: Path, model: Path) -> None:
    """In a process of its own: run, and print what it took."""
    from batch.job import BatchOptions, run_batch

    started_s = time.monotonic()
    summary = run_batch(BatchOptions(source, output, model), Instant)
    seconds = time.monotonic() - started_s
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    assert summary.is_complete and not summary.num_errors
    found = {
        "lines": summary.new("lines_done"), "seconds": seconds, "first_s": (Instant.first_s or 0) - started_s,
        "peak_mib": peak_kib / 1024,
    }  # fmt: skip
    print(json.dumps(found))


def measure(source: Path, output: Path, model: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", source, output, model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def compare(lines: int, kinds: list[str], model: Path, folder: Path) -> None:
    for kind in kinds:
        source, output = folder / "in.jsonl", folder / f"{kind[:4].strip()}.jsonl"
        with open(source, "w") as file:
            file.writelines(line(number, kind) for number in range(lines))
        run = measure(source, output, model)
        rate = run["lines"] / run["seconds"]
        print(f"{kind:10} {lines:,} lines: {rate:,.0f} lines/s, peak memory {run['peak_mib']:.0f} MiB", flush=True)
        with open(source, "a") as file:
            file.write(line(lines, kind))
        again = measure(source, output, model)
        print(f"{'':10} one line more: {again['first_s']:.1f} s until it runs, {again['peak_mib']:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["token ids", "chat"], choices=["token ids", "chat"])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; made when not given")
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_run(*options.one)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = options.model
        if model is None:
            from tests import checkpoints

            model = checkpoints.make(Path(folder) / "model")
        compare(options.lines, options.kinds, model, Path(folder))


if __name__ == "__main__":
    main()
