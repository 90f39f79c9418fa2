#!/usr/bin/env python3
"""Does a line cost the same among 100,000 as among 100? The whole command on a tiny model, files of growing length.

  python bench/scaling.py                                   100, 1,000, 10,000 and 100,000 lines
  python bench/scaling.py --lines 100 1000 --plot out.png

Each run is a process of its own with the real engine. The lines are short (a question of some 20 tokens, 2 new ones),
so that what grows with the file would show: reader, journal, scheduler, output. Loading is not in the seconds per line.
The KV cache is held to --kv-memory: it keeps what was computed for as long as it has room, so it would slowly fill its
default, half of the free memory, and show nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "from l4tool.main import run; run()"
sys.path.insert(0, str(ROOT))

from l4tool.core.console import note, table  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--kv-memory", default="64MiB")
    parser.add_argument("--model", type=Path, help="default: a tiny one of two layers, made on the fly")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--json", type=Path, help="also write every figure here; given with --redraw, read them")
    parser.add_argument("--redraw", action="store_true", help="only draw --plot from --json")
    return parser.parse_args()


def make_model(folder: Path) -> Path:
    options = ["--preset", "tiny", "--layers", "2", "--experts", "2", "--text-only"]
    command = [sys.executable, str(ROOT / "examples/make_checkpoint.py"), str(folder), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def write_lines(target: Path, count: int, new_tokens: int) -> None:
    fields = {"max_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
    with open(target, "w") as file:
        for number in range(count):
            text = f"Question {number}: what is the capital of country {number * 7 % 1009}?"
            file.write(json.dumps({"id": number, "prompt": text} | fields) + "\n")


def one_run(source: Path, model: Path, folder: Path, kv_memory: str) -> dict[str, float]:
    """Seconds and peak memory of one command."""
    output, summary = folder / f"{source.stem}.out.jsonl", folder / f"{source.stem}.summary.json"
    command = [sys.executable, "-c", COMMAND, "batch", str(source), str(output), "--model", str(model), "--quiet"]
    command += ["--kv-memory", kv_memory, "--summary", str(summary)]
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - began
    assert status == 0, f"the command ended with {status}"
    figures = json.loads(summary.read_text())
    assert figures["complete"] and figures["errors"] == 0
    engine = figures["engine"]
    return {
        "lines": figures["lines"], "wall_s": wall_s, "run_s": figures["seconds"], "steps": engine["steps"],
        "peak_rss_bytes": usage.ru_maxrss * 1024, "idle_share": engine["idle_share"],
        "tokens": figures["prompt_tokens"] + figures["completion_tokens"],
    }  # fmt: skip


def rows_of(runs: list[dict[str, float]]) -> list[list[str]]:
    return [
        [
            f"{run['lines']:,}", f"{run['run_s']:.1f}", f"{1000 * run['run_s'] / run['lines']:.2f}",
            f"{run['tokens'] / run['run_s']:,.0f}", f"{run['idle_share']:.1%}", f"{run['peak_rss_bytes'] / 2**20:,.0f}",
        ]
        for run in runs
    ]  # fmt: skip


def draw(runs: list[dict[str, float]], target: Path) -> None:
    """Two panels over the number of lines: milliseconds per line, peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [run["lines"] for run in runs]
    panels = {
        "milliseconds per line, model loaded": [1000 * run["run_s"] / run["lines"] for run in runs],
        "peak memory of the process, MiB": [run["peak_rss_bytes"] / 2**20 for run in runs],
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.plot(lines, values, marker="o", color="#1f5fa8", linewidth=2)
        for x, y in zip(lines, values, strict=True):
            label = f"{y:.2f}" if y < 100 else f"{y:,.0f}"
            axis.annotate(label, (x, y), (0, 8), textcoords="offset points", ha="center", fontsize=10)
        axis.set(xscale="log", ylim=(0, 1.25 * max(values)), xlabel="lines in the file", title=title)
        axis.set_xticks(lines, [f"{count:,.0f}" for count in lines])
        axis.minorticks_off()
        axis.margins(x=0.1)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    runs = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        model = arguments.model or make_model(folder / "model")
        warm = folder / "warm.jsonl"
        write_lines(warm, 8, arguments.new_tokens)
        one_run(warm, model, folder, arguments.kv_memory)  # kernels are compiled, files in the page cache
        for count in arguments.lines:
            source = folder / f"lines-{count}.jsonl"
            write_lines(source, count, arguments.new_tokens)
            runs.append(one_run(source, model, folder, arguments.kv_memory))
            note(f"{count:,} lines: {runs[-1]['run_s']:.1f} s")
    return runs


def main() -> None:
    arguments = parse_arguments()
    if arguments.redraw:
        runs = json.loads(arguments.json.read_text())
    else:
        runs = measure(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(runs, indent=1))
    print(table(rows_of(runs), ["lines", "seconds", "ms per line", "tok/s", "engine idle", "peak RSS MiB"]))
    if arguments.plot:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
