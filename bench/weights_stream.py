#!/usr/bin/env python3
"""A checkpoint larger than the memory that its batch may use: tokens/s, and bytes/s against what the disk reads.

  python bench/weights_stream.py                                  6 GB of random weights in a process of 3 GB
  python bench/weights_stream.py --memory 8GB --lines 2000
  python bench/weights_stream.py --checkpoint DIR --memory 20GB

Every line has --prompt-tokens random tokens and gets --new-tokens, greedy, no end token. Weights are read past the page
cache, so every pass is cold. The disk's own speed is measured before and after, in the same way: 8 MiB reads past the
page cache, four at a time, nothing else running.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from l4tool.core.console import note, table  # noqa: E402
from l4tool.core.sizes import format_bytes, parse_bytes  # noqa: E402

NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary
DISK_BYTES = 2 << 30  # read to measure the disk, in extents of:
EXTENT_BYTES = 64 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: 28 layers of the mini Scout, made in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the checkpoint is kept")
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("3GB"), help="what the process may take")
    parser.add_argument("--lines", type=int, default=320)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def checkpoint(arguments: argparse.Namespace) -> Path:
    """The folder; the default checkpoint is made first where it is missing."""
    folder: Path = arguments.checkpoint or arguments.work / "mini-28"
    if not (folder / "config.json").exists():
        maker = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(folder), "--preset", "mini"]
        subprocess.run([*maker, "--layers", "28"], check=True)
    return folder


def disk_speed(folder: Path) -> float:
    """Bytes per second, cold and in order."""
    from converters.detect import open_checkpoint
    from converters.disk import WeightFiles
    from converters.reader import Extent

    paths = open_checkpoint(folder).weight_files()
    files = WeightFiles(paths, keep_cached=False)
    extents = [
        Extent(path, at, min(at + EXTENT_BYTES, path.stat().st_size))
        for path in paths
        for at in range(0, path.stat().st_size, EXTENT_BYTES)
    ][: DISK_BYTES // EXTENT_BYTES]
    began = time.perf_counter()
    ahead = files.begin(extents[0])
    for extent in extents[1:]:
        following = files.begin(extent)
        ahead.result()
        ahead = following
    ahead.result()
    seconds = time.perf_counter() - began
    files.close()
    return sum(extent.nbytes for extent in extents) / seconds


def run_lines(folder: Path, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], Any]:
    """Every step's figures, and the engine's configuration."""
    from batch.backends.base import ListSource
    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
    from batch.requests import PreparedRequest, SamplingParams
    from batch.tokenizer import Tokenizer

    options = EmbeddedOptions(stream_weights=True, memory_bytes=arguments.memory, dtype=arguments.dtype)
    backend = EmbeddedBackend(folder, Tokenizer.load(folder), options, eos_token_ids=())
    engine, steps = backend.engine, []
    take_step = engine.step

    def step() -> Any:
        before, began = dict(vars(engine.stats)), time.perf_counter()
        found = take_step()
        after = vars(engine.stats)
        names = ("computed_tokens", "output_tokens", "weights_read_bytes", "weights_wait_s")
        steps.append({name: after[name] - before[name] for name in names} | {"s": time.perf_counter() - began})
        return found

    engine.step = step  # type: ignore[method-assign]
    rng, largest = random.Random(0), engine.model.arch.text.vocab_size - NUM_SPECIAL
    prompts = [[rng.randrange(largest) for _ in range(arguments.prompt_tokens)] for _ in range(arguments.lines)]
    requests = [PreparedRequest(i, p, SamplingParams(arguments.new_tokens)) for i, p in enumerate(prompts)]
    results = list(backend.run(ListSource(requests)))
    assert all(result.error_code is None for result in results) and len(results) == len(prompts)
    backend.close()
    return steps, engine.config


def row(name: str, steps: list[dict[str, Any]], disk: float) -> list[str]:
    total = {key: sum(step[key] for step in steps) for key in steps[0]}
    speed = total["weights_read_bytes"] / total["s"]
    return [
        name, str(len(steps)), f"{total['computed_tokens']:,}", f"{total['s']:.1f}",
        f"{total['computed_tokens'] / total['s']:.1f}", f"{speed / 1e9:.2f}", f"{speed / disk:.0%}",
        f"{total['weights_wait_s'] / total['s']:.0%}",
    ]  # fmt: skip


def peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    arguments = parse_arguments()
    folder = checkpoint(arguments)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    speeds = [disk_speed(folder)]
    note(f"disk: {speeds[0] / 1e9:.2f} GB/s")
    steps, config = run_lines(folder, arguments)
    speeds.append(disk_speed(folder))
    disk = sum(speeds) / 2
    prefill = [step for step in steps if step["computed_tokens"] > step["output_tokens"]]
    decode = [step for step in steps if step["computed_tokens"] == step["output_tokens"]]
    rows = [row(name, some, disk) for name, some in (("with prompts", prefill), ("decode only", decode)) if some]
    print(table(rows, ["steps", "", "tokens", "seconds", "tokens/s", "GB/s read", "of the disk", "waited for it"]))
    seconds = sum(step["s"] for step in steps)
    new = sum(step["output_tokens"] for step in steps)
    print(
        f"{size / 1e9:.2f} GB of weights, --memory {arguments.memory / 1e9:.2f} GB: peak {peak_bytes() / 1e9:.2f} GB; "
        f"disk {speeds[0] / 1e9:.2f} and {speeds[1] / 1e9:.2f} GB/s (before, after)\n"
        f"{arguments.lines} lines: {new:,} new tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s; steps of "
        f"at most {config.max_batch_tokens:,} tokens and {config.max_seqs:,} lines, KV {format_bytes(config.kv_bytes)}"
    )


if __name__ == "__main__":
    main()
