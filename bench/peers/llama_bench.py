"""Scenarios of equal prompts on llama.cpp's own llama-batched-bench: one process for all of them.

Prompt tokens are its own random ones, of the scenario's number and length. It computes `-ntg` steps after the prompt
and samples nothing, so it is given new tokens - 1: as many steps as everyone else. A first run of one sequence, not
counted, brings the whole file into memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from measure import machine_cpu_seconds, read_job, take_peak_rss, write_result


def command_of(job: dict[str, Any]) -> list[str]:
    """One run: all scenarios must agree in prompt length and new tokens."""
    prompts = [scenario["prompts"] for scenario in job["scenarios"]]
    lengths = {len(prompt) for group in prompts for prompt in group}
    new_tokens = {scenario["new_tokens"] for scenario in job["scenarios"]}
    assert len(lengths) == len(new_tokens) == 1, "llama-batched-bench knows prompts of equal length only"
    length, steps = lengths.pop(), new_tokens.pop() - 1
    counts = [1, *map(len, prompts)]
    threads = str(job["threads"])
    program, context = Path(job["build"]) / "bin" / "llama-batched-bench", max(counts) * (length + steps)
    return [
        str(program), "-m", job["gguf"], "-c", str(context), "-b", "2048", "-ub", "512",
        "-t", threads, "-tb", threads, "-npp", str(length), "-ntg", str(steps), "-npl", ",".join(map(str, counts)),
        "--output-format", "jsonl",
    ]  # fmt: skip


def cpu_seconds_of(pid: int) -> float:
    """User and system, all threads of a running process. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    job = read_job()
    began = time.perf_counter()
    process = subprocess.Popen(command_of(job), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found, cpu_s, load_s, machine_s = [], 0.0, 0.0, 0.0
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        load_s = load_s or time.perf_counter() - began - row["t"]
        now, machine_now = cpu_seconds_of(process.pid), machine_cpu_seconds()
        others_s = max(machine_now - machine_s - (now - cpu_s), 0.0)
        found.append({
            "seconds": row["t"], "cpu_s": now - cpu_s, "others_cpu_s": others_s,
            "peak_rss_bytes": take_peak_rss(process.pid), "prompt_s": row["t_pp"],
            "prompt_tokens_s": row["speed_pp"], "decode_tokens_s": row["speed_tg"],
        })  # fmt: skip
        cpu_s, machine_s = now, machine_now
    if process.wait() or len(found) != len(job["scenarios"]) + 1:
        raise SystemExit(f"llama-batched-bench: exit code {process.returncode}, {len(found)} results")
    names = [scenario["name"] for scenario in job["scenarios"]]
    write_result({"load_s": load_s, "scenarios": dict(zip(names, found[1:], strict=True))})


if __name__ == "__main__":
    main()
