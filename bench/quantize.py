#!/usr/bin/env python3
"""Quantizing on the CPU: kernels in memory, then the whole command against llm-compressor, alternately.

  python bench/quantize.py                                   kernels, and our command on one layer of Scout's widths
  python bench/quantize.py --llmcompressor-python ENV/bin/python        … and llm-compressor (its own environment)
  python bench/quantize.py --schemes int4 fp8 --rounds 3 --their-ways oneshot model_free

The checkpoint: one MoE layer of 16 experts in Scout's real widths (4.66 GB), made once in --work. Every run is a new
process, timed from start to exit with imports, page cache warm; outputs are deleted in between. Peak memory is sampled
from /proc: RSS counts mapped files, anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
THEIR_SCHEME = {"int4": "W4A16", "absmax": "W4A16", "fp8": "FP8_DYNAMIC"}
OUR_OPTIONS = {"int4": ["--int4"], "absmax": ["--int4", "--scale", "absmax"], "fp8": ["--fp8"]}
SHAPE = (8192, 5120)  # one expert's gate_proj
GROUP_SIZE = 128
sys.path.insert(0, str(ROOT))

from commands import run, warm  # noqa: E402

from l4tool.core.console import note, table  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: Scout's widths, made in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--llmcompressor-python", help="the python of an environment with llm-compressor")
    parser.add_argument("--their-ways", nargs="+", choices=["oneshot", "model_free"], default=["oneshot"])
    parser.add_argument("--schemes", nargs="+", choices=list(OUR_OPTIONS), default=["int4", "absmax", "fp8"])
    parser.add_argument("--rounds", type=int, default=2, help="how often everyone runs, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kernels-only", action="store_true")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def kernel_rates(threads: int) -> list[dict[str, Any]]:
    """GB/s of bf16 in, `threads` threads on row ranges of one weight in memory; the best of five."""
    import torch

    from quant import ops

    calls: dict[str, Callable[[torch.Tensor, ops.Scratch], object]] = {
        "int4 absmax": lambda rows, scratch: ops.int4(rows, GROUP_SIZE, "absmax", scratch=scratch),
        "int4 mse": lambda rows, scratch: ops.int4(rows, GROUP_SIZE, "mse", scratch=scratch),
        "fp8": lambda rows, scratch: ops.fp8(rows, scratch=scratch),
    }
    by_rows = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for stored, weight in (("[in, out] (fused expert)", by_rows.T.contiguous().T), ("[out, in]", by_rows)):
        for name, call in calls.items():
            parts = weight.tensor_split(threads)
            scratch = [ops.Scratch() for _ in parts]
            with ThreadPoolExecutor(threads) as pool:
                seconds = min(_timed(lambda: list(pool.map(call, parts, scratch))) for _ in range(5))  # noqa: B023
            results.append({"kernel": name, "stored": stored, "gb_s": weight.nbytes / seconds / 1e9})
    return results


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def contestants(arguments: argparse.Namespace, checkpoint: Path, scheme: str) -> dict[str, list[str]]:
    """Name → command, each writing WORK/out."""
    out = str(arguments.work / "out")
    ours = [sys.executable, "-m", "l4tool.main", "quantize", str(checkpoint), "-o", out, *OUR_OPTIONS[scheme]]
    commands = {"l4tool": [*ours, "--jobs", str(arguments.threads)]}
    for way in arguments.their_ways if arguments.llmcompressor_python else []:
        job = arguments.work / f"job-{way}.json"
        fields = {"checkpoint": str(checkpoint), "out": out, "scheme": THEIR_SCHEME[scheme], "way": way}
        job.write_text(json.dumps(fields))
        script = [arguments.llmcompressor_python, str(PEERS / "llm_compressor.py")]
        commands[f"llm-compressor {way}"] = [*script, str(job), str(arguments.work / "result.json")]
    return commands


def compare(arguments: argparse.Namespace, checkpoint: Path) -> list[dict[str, Any]]:
    """Every scheme, everyone in turn; the best of the rounds counts."""
    source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    results = []
    for scheme in arguments.schemes:
        commands = contestants(arguments, checkpoint, scheme)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for number in range(arguments.rounds):
            for name, command in commands.items():
                note(f"{scheme}: {name}, round {number + 1} of {arguments.rounds}")
                for path in checkpoint.glob("*.safetensors"):
                    warm(path)
                runs[name].append(run(command, arguments.work / "out"))
        ours = min(result["seconds"] for result in runs["l4tool"])
        for name, all_runs in runs.items():
            best = min(all_runs, key=lambda result: result["seconds"])
            rate = source_bytes / best["seconds"] / 1e9
            results.append({"scheme": scheme, "who": name, **best, "gb_s": rate, "ratio": best["seconds"] / ours})
    return results


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kernels = kernel_rates(arguments.threads)
    rows = [(k["kernel"], k["stored"], f"{k['gb_s']:.2f}") for k in kernels]
    print(table(rows, header=(f"kernel, {arguments.threads} threads", "stored as", "GB/s")))
    results: list[dict[str, Any]] = []
    if not arguments.kernels_only:
        checkpoint = arguments.checkpoint or arguments.work / "scout-width"
        if not (checkpoint / "config.json").exists():
            from examples.make_checkpoint import make_checkpoint

            note(f"making {checkpoint}")
            make_checkpoint(checkpoint, preset="scout-width", layers=1, experts=16)
        results = compare(arguments, checkpoint)
        gib = 2**30
        rows = [
            (r["scheme"], r["who"], f"{r['seconds']:.1f}", f"{r['gb_s']:.2f}", f"{r['ratio']:.1f}", f"{r['cpu_s']:.1f}",
             f"{r['peak_rss_bytes'] / gib:.1f}", f"{r['peak_anonymous_bytes'] / gib:.2f}")
            for r in results
        ]  # fmt: skip
        header = ("scheme", "who", "seconds", "GB/s", "× ours", "CPU s", "peak RSS GiB", "anonymous GiB")
        print(f"\n{table(rows, header=header)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"kernels": kernels, "command": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
