#!/usr/bin/env python3
"""How long a checkpoint takes to load from a warm page cache, against reading its files, and the memory it takes.

  python bench/load.py                                 the mini Scout of bench/batch_cpu.py and its INT4 twin
  python bench/load.py DIR … --rounds 5
  python bench/load.py DIR … --device cuda             straight to the device

Each figure is of a process of its own, in turn, and of what follows the imports: `load_model` until it returns; read()
of every weight file into one buffer used again and again; read() of every file into fresh memory, as a program does
that wants to keep it. Peak RSS counts mapped pages of the files too. The smallest time of the rounds counts. With a
device the CUDA context is there before the time begins, and the time ends when the last byte has arrived.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "peers")]

from measure import take_peak_rss  # noqa: E402

from batch.model.model import resolve_device  # noqa: E402
from l4tool.core.console import note, table  # noqa: E402
from l4tool.core.errors import L4Error  # noqa: E402
from l4tool.core.sizes import format_bytes  # noqa: E402

WAYS = ("read, one buffer", "read, fresh memory", "load_model")
CHUNK_BYTES = 8 << 20
TARGET_RATIO, TARGET_BYTES = 1.5, 1 << 30
DEVICE_RATIO, DEVICE_BYTES = 1 / 0.8, 4 << 30  # host memory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the default checkpoints are")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), metavar="N", default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one way, in this process
    return parser.parse_args()


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_into(files: list[Path], fresh: bool) -> int:
    """Read every byte; returns how many."""
    total, buffer = 0, memoryview(bytearray(CHUNK_BYTES))
    kept: list[Any] = []
    for path in files:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if fresh:
                import numpy as np

                kept.append(np.empty(size, np.uint8))  # malloc: pages come as they are written
                buffer, done = memoryview(kept[-1]), 0
                while done < size:
                    done += file.readinto(buffer[done : done + CHUNK_BYTES])
                total += done
            else:
                while count := file.readinto(buffer):
                    total += count
    return total


def one(way: str, folder: Path, device: str) -> dict[str, float]:
    """In a process of its own: what it took."""
    if way == "load_model":
        import torch

        from batch.kernels import ops
        from batch.model.model import load_model
        from converters.detect import open_checkpoint

        if device == "cpu":
            ops._cpu()  # imports numba and the kernels, which a command does while it loads
        else:
            torch.zeros(1, device=device)
        take_peak_rss()
        began = time.perf_counter()
        model = load_model(open_checkpoint(folder), device)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        weights = model.weights_nbytes if device == "cpu" else 0  # in host memory
        return {"seconds": seconds, "peak": take_peak_rss(), "weights": weights}
    import numpy as np  # noqa: F401

    began = time.perf_counter()
    size = read_into(weight_files(folder), way == "read, fresh memory")
    return {"seconds": time.perf_counter() - began, "peak": take_peak_rss(), "weights": size}


def measure(folder: Path, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """way → its fastest round."""
    best: dict[str, dict[str, float]] = {}
    read_into(weight_files(folder), fresh=False)  # into the page cache
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, str(folder), "--one", way, "--device", device]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found = json.loads(done.stdout)
            if way not in best or found["seconds"] < best[way]["seconds"]:
                best[way] = found
    return best


def report(folder: Path, best: dict[str, dict[str, float]], device: str) -> None:
    size = sum(path.stat().st_size for path in weight_files(folder))
    rows = []
    for way, found in best.items():
        ratio = found["seconds"] / best[WAYS[0]]["seconds"]
        speed = f"{size / found['seconds'] / 1e9:.2f}"
        rows.append([way, f"{found['seconds']:.2f}", speed, f"{ratio:.2f}", format_bytes(int(found["peak"]))])
    print(f"\n{folder.name}: {format_bytes(size)} of weight files")
    print(table(rows, ["", "seconds", "GB/s", "× read, one buffer", "peak RSS"]))
    loaded = best["load_model"]
    ratios = [loaded["seconds"] / best[way]["seconds"] for way in WAYS[:2]]
    extra = int(loaded["peak"] - loaded["weights"])
    most, most_bytes = (TARGET_RATIO, TARGET_BYTES) if device == "cpu" else (DEVICE_RATIO, DEVICE_BYTES)
    print(
        f"load_model / reading: {ratios[0]:.2f} (one buffer), {ratios[1]:.2f} (fresh memory); target ≤ {most}. "
        f"Peak RSS − weights there: {format_bytes(extra)}; target ≤ {format_bytes(most_bytes)}"
    )


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.checkpoints[0], arguments.device)))
        return
    try:
        resolve_device(arguments.device)
    except L4Error as error:
        raise SystemExit(f"bench/load.py: {error}") from error
    folders = arguments.checkpoints or [arguments.work / "mini", arguments.work / "mini-int4"]
    lacking = [folder for folder in folders if not weight_files(folder)]
    if lacking and arguments.checkpoints:
        raise SystemExit(f"no .safetensors in {', '.join(map(str, lacking))}")
    folders = [folder for folder in folders if folder not in lacking]
    if not folders:
        raise SystemExit("no checkpoint there: python examples/make_checkpoint.py build/bench/mini --preset mini")
    for folder in folders:
        note(f"measuring {folder} …")
        report(folder, measure(folder, arguments.rounds, arguments.device), arguments.device)


if __name__ == "__main__":
    main()
