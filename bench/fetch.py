#!/usr/bin/env python3
"""`l4tool fetch` (every byte hashed) against `hf download` (none), from a hub server on this machine, alternately.

  python bench/fetch.py                      3 files of 1 GB, 3 rounds
  python bench/fetch.py --files 2 --file-gb 0.5 --rounds 5 --json figures.json

Both are new processes, timed from start to exit with imports, over HTTP, to fresh folders on the same disk; outputs
are deleted and the disk synced in between. The server's files are in the page cache. `l4tool` syncs what it has
written before it exits, `hf` leaves that to the system. Then `l4tool fetch` once more on a complete folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
REPO = "bench/Random-Weights"
BLOCK_BYTES = 2**24
OURS, THEIRS, AGAIN = "l4tool fetch", "hf download", "l4tool fetch, complete"
sys.path.insert(0, str(ROOT))

from l4tool.core.console import note, table  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--file-gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="how often both run, in turn")
    parser.add_argument("--jobs", type=int, default=8, help="files at once, for both")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def make_files(folder: Path, files: int, file_bytes: int) -> None:
    """Random files, kept from one run of the benchmark to the next; reading them warms the page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1)]
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    for path in (folder / name for name in names):
        if not path.exists() or path.stat().st_size != file_bytes:
            note(f"making {path}")
            with open(path, "wb") as file:
                for start in range(0, file_bytes, BLOCK_BYTES):
                    file.write(os.urandom(min(BLOCK_BYTES, file_bytes - start)))


@contextmanager
def hub_server(folder: Path, port_file: Path) -> Iterator[str]:
    """The URL of a server in a process of its own; it hashes the files first."""
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.hub.server", "--repo", f"{REPO}={folder}", "--port-file", str(port_file)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not port_file.exists():
            if process.poll() is not None:
                raise SystemExit("the hub server did not start")
            time.sleep(0.1)
        yield port_file.read_text().strip()
    finally:
        process.terminate()
        process.wait()


def run(command: list[str], url: str, work: Path) -> dict[str, float]:
    """One process from start to exit: wall and CPU seconds."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"), "1")
    variables |= switches | {"HF_ENDPOINT": url, "HF_HOME": str(work / "hf-home")}
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables, cwd=ROOT)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}


def compare(arguments: argparse.Namespace, url: str) -> dict[str, list[dict[str, float]]]:
    """Every round: both, each to a fresh folder, taking turns at being first; ours again on its complete folder."""
    work, jobs = arguments.work, str(arguments.jobs)
    out = {name: work / f"fetched-by-{name.split()[0]}" for name in (OURS, THEIRS)}
    commands = {
        OURS: [str(BIN / "l4tool"), "fetch", REPO, "-o", str(out[OURS]), "--jobs", jobs],
        THEIRS: [str(BIN / "hf"), "download", REPO, "--local-dir", str(out[THEIRS]), "--max-workers", jobs],
    }
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: [], AGAIN: []}
    for number in range(arguments.rounds):
        note(f"round {number + 1} of {arguments.rounds}")
        for name in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            shutil.rmtree(out[name], ignore_errors=True)
            os.sync()
            runs[name].append(run(commands[name], url, work))
            if name == OURS:
                runs[AGAIN].append(run(commands[name], url, work))
            shutil.rmtree(out[name])
    return runs


def main() -> None:
    arguments = parse_arguments()
    source, file_bytes = arguments.work / "fetch-source", int(arguments.file_gb * 1e9)
    make_files(source, arguments.files, file_bytes)
    with hub_server(source, arguments.work / "hub-url") as url:
        runs = compare(arguments, url)
    total_gb = arguments.files * file_bytes / 1e9
    medians: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(result[key] for result in results) for key in ("seconds", "cpu_s")}
        for name, results in runs.items()
    }
    theirs_s = medians[THEIRS]["seconds"]
    rows = []
    for name, median in medians.items():
        transferred = name != AGAIN
        each = " ".join(f"{result['seconds']:.1f}" for result in runs[name])
        rate = f"{total_gb / median['seconds']:.2f}" if transferred else ""
        ratio = f"{theirs_s / median['seconds']:.2f}" if transferred else ""
        rows.append((name, f"{median['seconds']:.2f}", rate, ratio, f"{median['cpu_s']:.1f}", each))
    print(table(rows, header=("medians", "seconds", "GB/s", "speed, hf = 1", "CPU s", "rounds, s")))
    if arguments.json:
        arguments.json.write_text(json.dumps({"gb": total_gb, "medians": medians, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
