#!/usr/bin/env python3
"""Everything that docs/benchmarks.md says of one GPU, in one command: `make bench-gpu`.

  python bench/gpu_page.py                       all parts, 79.1 GiB for INT4, 139 GiB for FP8
  python bench/gpu_page.py --parts tests int4    some of them
  python bench/gpu_page.py --page other.md       a page with the same marks

  tests      the tests marked gpu: kernels, models and whole runs against the CPU
  int4, fp8, bf16   bench/gpu.py: memory, prefill, decoding, pictures, products; bf16 with 8 layers
  peers      bench/gpu_peers.py: torch's grouped products and attention
  tiles      bench/gpu_tune.py: which tiles would be faster
  quantize   bench/gpu_quantize.py: the CPU's bytes, GB/s; it leaves a checkpoint for
  load       bench/load.py: from the page cache to the device

Each part is a process of its own; what it prints goes between its marks on the page. One that fails is written down
with its last lines, the others run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from gpu import BEGIN, END, write_into  # noqa: E402

from l4tool.core.console import note  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
WORK = ROOT / "build" / "bench-gpu"
GPU = ["bench/gpu.py", "--model", "scout", "--random"]
PARTS = {
    "tests": [
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ],
    "int4": GPU,
    "fp8": [*GPU, "--scheme", "fp8", "--memory-cap", "139", "--no-peer"],
    "bf16": [*GPU, "--scheme", "bf16", "--layers", "8", "--memory-cap", "139", "--no-peer"],
    "peers": ["bench/gpu_peers.py"],
    "tiles": ["bench/gpu_tune.py"],
    "quantize": ["bench/gpu_quantize.py", "--work", str(WORK)],
    "load": ["bench/load.py", str(WORK / "int4-cuda"), "--device", "cuda"],
}
WRITES_ITSELF = ("int4", "fp8", "bf16")
LAST_LINES = 60  # of what a part prints that go on the page


def run_part(part: str, page: Path) -> bool:
    """One part's process, and its text on the page; whether it succeeded."""
    command = [*PARTS[part]]
    itself = part in WRITES_ITSELF
    if itself:
        command += ["--write", str(page)]
    began = time.perf_counter()
    everything = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    in_order = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, *command], text=True, cwd=ROOT, env=in_order, **everything)
    note(f"{part}: exit code {done.returncode} after {time.perf_counter() - began:.0f} s")
    if itself and done.returncode == 0:
        return True
    shown = " ".join(["python", *PARTS[part]]).replace(f"{ROOT}/", "")
    lines = [line.rstrip() for line in done.stdout.splitlines()][-LAST_LINES:]
    ending = "" if done.returncode == 0 else f" Exit code {done.returncode}."
    head = f"{device_name()}, {datetime.date.today()}: `{shown}`.{ending}"
    write_into(page, part, "\n".join([head, "```", *lines, "```"]).replace(f"{ROOT}/", ""))
    return done.returncode == 0


def device_name() -> str:
    """The card and torch's version."""
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if torch.cuda.is_available() else "no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()

    from gpu_device import require_cuda

    page = arguments.page.resolve()
    text = page.read_text() if page.is_file() else ""
    lacking = [part for part in arguments.parts if not all(mark.format(part) in text for mark in (BEGIN, END))]
    if lacking:
        raise SystemExit(
            f"{page} has no marks of {', '.join(lacking)}: {BEGIN.format(lacking[0])} {END.format(lacking[0])}"
        )
    require_cuda()
    failed = [part for part in arguments.parts if not run_part(part, page)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; {page} says how")


if __name__ == "__main__":
    main()
