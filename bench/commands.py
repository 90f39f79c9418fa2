"""Whole commands as benchmarks time them: from start to exit, with their memory; and a warm page cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], out: Path) -> dict[str, Any]:
    """One process from start to exit: wall and CPU seconds, peak RSS and peak anonymous bytes, sampled."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(lambda: process.stdout.read() if process.stdout else "")
        peaks = {"VmRSS": 0, "RssAnon": 0}
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            for key, value in _memory(process.pid).items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{output.result()[-2000:]}")
    shutil.rmtree(out, ignore_errors=True)
    cpu_s = usage.ru_utime + usage.ru_stime
    memory = {"peak_rss_bytes": peaks["VmRSS"], "peak_anonymous_bytes": peaks["RssAnon"]}
    return {"seconds": seconds, "cpu_s": cpu_s, **memory}


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "RssAnon")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(2**24):
            pass
