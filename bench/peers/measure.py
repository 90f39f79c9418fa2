"""What every peer script measures the same way: wall and CPU seconds, peak memory, prompt and decode speed.

Standard library only: it also runs in the peers' own environments.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def write_result(result: dict[str, Any]) -> None:
    Path(sys.argv[2]).write_text(json.dumps(result))


class Timed:
    """`with Timed() as timed: …` → timed.seconds, timed.cpu_s (user and system, all threads), and others_cpu_s: what
    all other processes of the machine used meanwhile, which says how far to trust the seconds."""

    def __enter__(self) -> Timed:
        self._wall, self._cpu, self._machine = time.perf_counter(), cpu_seconds(), machine_cpu_seconds()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_s = cpu_seconds() - self._cpu
        self.others_cpu_s = max(machine_cpu_seconds() - self._machine - self.cpu_s, 0.0)


def cpu_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def machine_cpu_seconds() -> float:
    """Of all processes since the machine started, 0 where /proc does not tell; what a hypervisor took counts too."""
    try:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, *interrupts = map(int, ticks)
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
    """Of this process, or of its largest child, since they began."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in both) * 1024


def take_peak_rss(pid: int | str = "self") -> int:
    """Peak resident bytes of one process since it began or was asked last (since it began where the system cannot say
    more); mapped files count. Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return peak_rss_bytes()


def warm_up_prompts(job: dict[str, Any]) -> list[list[int]]:
    """A few of the largest scenario's prompts: enough for a step of every kind."""
    largest = max(job["scenarios"], key=lambda scenario: len(scenario["prompts"]))
    prompts: list[list[int]] = largest["prompts"][:8]
    return prompts


def figures(timed: Timed, scenario: dict[str, Any], steps: list[tuple[float, int, int]]) -> dict[str, Any]:
    """One scenario's result. `steps`: (seconds, tokens computed, sequences) of every step of the engine.

    A step with one token per sequence is a decode step; every other one counts as prompt, whatever else is in it.
    """
    decode = [step for step in steps if step[1] == step[2]]
    decode_s = sum(step[0] for step in decode)
    prompt_s = sum(step[0] for step in steps) - decode_s
    return {
        "seconds": timed.seconds, "cpu_s": timed.cpu_s, "others_cpu_s": timed.others_cpu_s,
        "peak_rss_bytes": take_peak_rss(), "prompt_s": prompt_s,
        "prompt_tokens_s": sum(map(len, scenario["prompts"])) / prompt_s,
        "decode_tokens_s": sum(step[2] for step in decode) / max(decode_s, 1e-9),
    }  # fmt: skip
