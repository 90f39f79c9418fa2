#!/usr/bin/env python3
"""One layer of Scout's real widths on the CPU, as a share of what the machine can do.

  python bench/layer_cpu.py                      makes the checkpoint first: 4.5 GB of bf16, 1.3 GB of INT4, in --work
  python bench/layer_cpu.py --weights int4 --activations int8

The model has one layer (hidden 5120, intermediate 8192, 40/8 heads of 128, 16 experts and the shared one) and a small
vocabulary, whose lm_head counts on both sides. Only the model's own time counts, the engine's stays out; a step's limit
comes from bench/limits.py and the experts that its tokens were really routed to, which a second, untimed run of the
same job notes. Decode: sequences of 32 tokens, one more each; prefill: one prompt. Medians over the steps. "Others'
CPU", in per cent of one core, is what all other processes used meanwhile: above a few, measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(Path(__file__).parent / "peers")]

import torch  # noqa: E402
from limits import Costs, Step, decode_step, model_costs, prefill_step  # noqa: E402
from machine import Machine, measure  # noqa: E402
from measure import Timed  # noqa: E402
from ours import StepTimer, embedded_options, generate, is_decode  # noqa: E402

from batch.backends.embedded import EmbeddedBackend  # noqa: E402
from batch.kernels import ops  # noqa: E402
from batch.tokenizer import Tokenizer  # noqa: E402
from converters.detect import open_checkpoint  # noqa: E402
from l4tool.core.console import note, table  # noqa: E402

NUM_SPECIAL = 2048
CONTEXT = 32  # tokens of a prompt before decoding
TARGETS = {"decode": 0.8, "prefill": 0.85}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=["bf16", "int4"], default=["bf16", "int4"])
    parser.add_argument("--activations", choices=["bf16", "int8"], default="bf16", help="int8: of INT4 weights only")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 4, 16, 64], help="sequences")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="tokens")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of each kind")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the checkpoints are kept")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def checkpoint(work: Path, weights: str) -> Path:
    """Made where it is missing."""
    dense, packed = work / "scout-width", work / "scout-width-int4"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folder = dense if weights == "bf16" else packed
    if (folder / "config.json").exists():
        return folder
    if not (dense / "config.json").exists():
        maker = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(dense), "--preset", "scout-width"]
        subprocess.run([*maker, "--layers", "1", "--text-only"], check=True, env=environment)
    if weights == "int4":
        tool = [sys.executable, "-c", "from l4tool.main import run; run()", "quantize", str(dense), "-o", str(packed)]
        subprocess.run([*tool, "--int4", "--scale", "absmax"], check=True, env=environment)
    return folder


class RoutingNotes:
    """While it is open, counts the experts that each step touches: they need the router once more."""

    def __init__(self) -> None:
        self.touched: list[int] = []

    def __enter__(self) -> RoutingNotes:
        self.moe: Callable[..., Any] = ops.moe
        ops.moe = self
        return self

    def __exit__(self, *exc: object) -> None:
        ops.moe = self.moe

    def __call__(self, x: torch.Tensor, router: Any, *weights: Any, **keywords: Any) -> Any:
        self.touched.append(len(ops.linear(x, router).argmax(-1).unique()))
        return self.moe(x, router, *weights, **keywords)


def timed_steps(backend: EmbeddedBackend, prompts: list[list[int]], new_tokens: int) -> list[dict[str, float]]:
    """The job twice: every step's figures, `touched`, its number of experts, and `others`: what all other processes
    used during the job, in cores."""
    timer = StepTimer(backend.engine)
    backend.engine.step = timer  # type: ignore[method-assign]
    with Timed() as timed:
        generate(backend, prompts, new_tokens)
    backend.engine.step = timer.step  # type: ignore[method-assign]
    with RoutingNotes() as notes:
        generate(backend, prompts, new_tokens)
    rows = [row for row in timer.rows if row["computed_tokens"]]
    assert len(notes.touched) == len(rows), "one MoE layer, so one call a step"
    others = timed.others_cpu_s / timed.seconds
    return [row | {"touched": touched, "others": others} for row, touched in zip(rows, notes.touched, strict=True)]


def measured(step: Step, row: dict[str, float], costs: Costs, machine: Machine, math: str) -> dict[str, float]:
    """One step beside its limits: seconds for the memory's and the arithmetic's sake, shares of 1."""
    rate = machine.int8_flops if math == "int8" else machine.bf16_flops
    memory_s = step.bytes(costs, row["touched"]) / machine.read_bytes_s
    arithmetic_s = step.flops(costs) / rate
    return {
        "model_s": row["model_s"], "memory_s": memory_s, "arithmetic_s": arithmetic_s, "touched": row["touched"],
        "share": max(memory_s, arithmetic_s) / row["model_s"], "others": row["others"],
    }  # fmt: skip


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def run_kind(weights: str, arguments: argparse.Namespace, machine: Machine) -> dict[str, dict[str, float]]:
    """ "decode 16", "prefill 512", …: the medians of one kind of weights."""
    folder, math = checkpoint(arguments.work, weights), "bf16" if weights == "bf16" else arguments.activations
    job = {"activations": "int8"} if math == "int8" else {}
    note(f"loading {folder} …")
    backend = EmbeddedBackend(folder, Tokenizer.load(folder), embedded_options(job), eos_token_ids=())
    reader = open_checkpoint(folder)
    costs, vocab_size, rng = model_costs(reader), reader.arch.text.vocab_size, random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(vocab_size - NUM_SPECIAL) for _ in range(length)] for _ in range(count)]

    found = {}
    generate(backend, prompts(4, CONTEXT), 4)  # compiles
    for count in arguments.decode:
        rows = timed_steps(backend, prompts(count, CONTEXT), arguments.steps + 1)
        decode = [row for row in rows if is_decode(row)]
        steps = [decode_step([CONTEXT + 1 + number] * count) for number in range(len(decode))]
        found[f"decode {count}"] = median(
            [measured(step, row, costs, machine, math) for step, row in zip(steps, decode, strict=True)]
        )
    for length in arguments.prefill:
        rows = [timed_steps(backend, prompts(1, length), 1) for _ in range(5)]
        assert all(len(steps) == 1 for steps in rows), "a prompt is one step"
        found[f"prefill {length}"] = median(
            [measured(prefill_step([length]), steps[0], costs, machine, math) for steps in rows]
        )
    backend.close()
    return found


def report(weights: str, activations: str, found: dict[str, dict[str, float]], machine: Machine) -> None:
    rows = []
    for name, row in found.items():
        bound = "memory" if row["memory_s"] > row["arithmetic_s"] else "arithmetic"
        target = TARGETS[name.split()[0]]
        verdict = f"≥ {target:.0%} {'✓' if row['share'] >= target else '✗'}"
        rows.append([
            name, f"{1000 * row['model_s']:.1f}", f"{1000 * row['memory_s']:.1f}", f"{1000 * row['arithmetic_s']:.1f}",
            f"{row['touched']:.0f}", f"{row['others']:.0%}", f"{row['share']:.0%} of {bound}", verdict,
        ])  # fmt: skip
    print(f"\n{weights} weights, {'bf16' if weights == 'bf16' else activations} activations; {machine}")
    print(
        table(
            rows,
            ["", "ms", "memory limit ms", "arithmetic limit ms", "experts", "others' CPU", "share of limit", "target"],
        )
    )


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    for weights in arguments.weights:
        checkpoint(arguments.work, weights)
    results: dict[str, Any] = {}
    for weights in arguments.weights:
        before = measure(arguments.threads)
        found = run_kind(weights, arguments, before)
        results[weights] = {"machine": asdict(before), "steps": found}
        report(weights, arguments.activations, found, before)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
