#!/usr/bin/env python3
"""`l4tool quantize --device cuda` against --device cpu: the same bytes, and how fast from a warm page cache.

  python bench/gpu_quantize.py                     four layers of Scout's widths, 16 experts, made in --work (18 GB)
  python bench/gpu_quantize.py --layers 1 --schemes int4

Whole commands, in turn, from start to exit with imports, source files in the page cache. GB/s are of source files.
What the first device wrote stays (WORK/int4-cuda), for bench/load.py. Exit code 1 where a shard differs.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from commands import warm  # noqa: E402
from gpu_device import require_cuda  # noqa: E402

from examples.make_checkpoint import PRESETS, make_checkpoint  # noqa: E402
from l4tool.core.console import note, table  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-gpu")
    parser.add_argument("--preset", choices=list(PRESETS), default="scout-width", help="of examples/make_checkpoint.py")
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--schemes", nargs="+", choices=["int4", "fp8", "mixed"], default=["int4", "fp8"])
    parser.add_argument("--devices", nargs="+", choices=["cuda", "cpu"], default=["cuda", "cpu"])
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    if "cuda" in arguments.devices:
        require_cuda()
    return arguments


def positive(text: str) -> int:
    """A number from 1 on."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def quantize(source: Path, out: Path, scheme: str, device: str) -> float:
    """Seconds of the whole command. Raises SystemExit where it fails."""
    shutil.rmtree(out, ignore_errors=True)
    shards = sorted(source.glob("*.safetensors"))
    for path in shards:
        warm(path)
    command = [sys.executable, "-m", "l4tool.main", "quantize", source, "-o", out, f"--{scheme}", "--device", device]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"quantize --{scheme} --device {device} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return seconds


def differing(one: Path, other: Path) -> int:
    """How many shards are not in both folders with the same bytes."""
    names = sorted({path.name for folder in (one, other) for path in folder.glob("*.safetensors")})
    same, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return len(names) - len(same)


def main() -> None:
    arguments = parse_arguments()
    source = arguments.work / f"{arguments.preset}-{arguments.layers}"
    if not (source / "config.json").exists():
        note(f"making {source}")
        make_checkpoint(source, preset=arguments.preset, layers=arguments.layers)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rows, wrong = [], 0
    for scheme in arguments.schemes:
        first = arguments.work / f"{scheme}-{arguments.devices[0]}"
        for device in arguments.devices:
            out = arguments.work / f"{scheme}-{device}"
            note(f"{scheme} on {device}")
            seconds = quantize(source, out, scheme, device)
            others = differing(first, out)
            wrong += others
            said = "" if out == first else f"{others} differ" if others else "the same bytes"
            rows.append((scheme, device, f"{seconds:.1f}", f"{size / seconds / 1e9:.2f}", said))
            if out != first:
                shutil.rmtree(out)
    print(table(rows, header=("scheme", "device", "seconds", "GB/s", "shards")))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
