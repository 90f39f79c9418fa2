#!/usr/bin/env python3
"""Converting between layouts, against copying the same bytes on the same disk, alternately.

  python bench/convert.py                                      every pair below on one layer of Scout's widths
  python bench/convert.py --pairs meta-hf --transformers-script convert_llama4_weights_to_hf.py
  python bench/convert.py --layers 2 --rounds 3 --json figures.json

The checkpoint: MoE layers of 16 experts in Scout's real widths with the real vision widths (4.5 GB a layer), made once
in --work, and its copies in the other layouts. Every run is a new process, timed from start to exit with imports and
the last byte synced, page cache warm; the output is deleted in between. `cp` copies as many bytes as the output has,
and syncs them. Peak memory is sampled from /proc: RSS counts mapped files, anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(ROOT))

from commands import run, warm  # noqa: E402

from l4tool.core.console import note, table  # noqa: E402

PAIRS: dict[str, tuple[str, list[str]]] = {  # name → (layout of the source, options)
    "hf-experts": ("hf", ["--to", "hf-experts"]),
    "experts-hf": ("experts", ["--to", "hf"]),
    "hf-meta": ("hf", ["--to", "meta"]),
    "meta-hf": ("meta", ["--to", "hf"]),
    "hf-gguf": ("hf", ["--to", "gguf"]),
    "hf-q4_0": ("hf", ["--to", "gguf", "--dtype", "q4_0"]),
    "gguf-hf": ("gguf", ["--to", "hf"]),
    "int4-hf": ("int4", ["--to", "hf"]),
    "reshard": ("hf", ["--to", "hf", "--shard-size", "1GB"]),
}
MADE_BY = {
    "experts": ["convert", "--to", "hf-experts"], "meta": ["convert", "--to", "meta"],
    "gguf": ["convert", "--to", "gguf"], "int4": ["quantize", "--int4"],
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--rounds", type=int, default=2, help="how often everyone runs, in turn")
    parser.add_argument("--transformers-script", type=Path, help="its convert_llama4_weights_to_hf.py, beside meta-hf")
    parser.add_argument("--transformers-python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="also write every figure here")
    return parser.parse_args()


def ours(*args: str) -> list[str]:
    return [sys.executable, "-m", "l4tool.main", *args]


def source(arguments: argparse.Namespace, layout: str) -> Path:
    """The checkpoint in a layout, made where it is not there yet."""
    folder: Path = arguments.work / f"convert-{arguments.layers}-{layout}"
    if (folder / "l4tool-report.json").exists() or (layout == "hf" and (folder / "config.json").exists()):
        return folder
    note(f"making {folder}")
    if layout == "hf":
        from examples.make_checkpoint import make_checkpoint

        make_checkpoint(folder, preset="scout-width", layers=arguments.layers, experts=16)
        return folder
    run(
        ours(MADE_BY[layout][0], str(source(arguments, "hf")), "-o", str(folder), *MADE_BY[layout][1:]),
        Path("/nowhere"),
    )
    return folder


def commands(arguments: argparse.Namespace, pair: str, folder: Path, out: Path, copied: Path) -> dict[str, list[str]]:
    """Who → command, each writing `out`. `copied`: a folder of as many bytes as the output has."""
    found = {
        "l4tool": ours("convert", str(folder), "-o", str(out), *PAIRS[pair][1]),
        "cp": ["sh", "-c", f'mkdir "{out}" && cp "{copied}"/* "{out}" && sync -f "{out}"'],
    }
    if pair == "meta-hf" and arguments.transformers_script:
        job = arguments.work / "job-convert.json"
        job.write_text(
            json.dumps({"script": str(arguments.transformers_script), "source": str(folder), "out": str(out)})
        )
        found["transformers"] = [arguments.transformers_python, str(PEERS / "transformers_convert.py"), str(job)]
    return found


def compare(arguments: argparse.Namespace, pair: str) -> list[dict[str, Any]]:
    """One conversion, everyone in turn; the best of the rounds counts."""
    folder, out = source(arguments, PAIRS[pair][0]), arguments.work / "out"
    copied = arguments.work / "copied"
    run(["rm", "-rf", str(copied)], Path("/nowhere"))
    run(ours("convert", str(folder), "-o", str(copied), *PAIRS[pair][1]), out)  # warms the kernels up, too
    nbytes = sum(path.stat().st_size for path in copied.iterdir())
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(arguments.rounds):
        for who, command in commands(arguments, pair, folder, out, copied).items():
            note(f"{pair}: {who}, round {number + 1} of {arguments.rounds}")
            for path in (copied if who == "cp" else folder).iterdir():
                warm(path)
            runs.setdefault(who, []).append(run(command, out))
    run(["rm", "-rf", str(copied)], Path("/nowhere"))
    copy_s = min(result["seconds"] for result in runs["cp"])
    return [
        {"pair": pair, "who": who, "bytes": nbytes, **best, "ratio": best["seconds"] / copy_s}
        for who, all_runs in runs.items()
        for best in [min(all_runs, key=lambda result: result["seconds"])]
    ]


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = [result for pair in arguments.pairs for result in compare(arguments, pair)]
    rows = [
        (r["pair"], r["who"], f"{r['bytes'] / 1e9:.2f}", f"{r['seconds']:.1f}", f"{r['ratio']:.2f}",
         f"{r['cpu_s']:.1f}", f"{r['peak_rss_bytes'] / 2**30:.1f}", f"{r['peak_anonymous_bytes'] / 2**30:.2f}")
        for r in results
    ]  # fmt: skip
    header = ("from-to", "who", "GB written", "seconds", "× cp", "CPU s", "peak RSS GiB", "anonymous GiB")
    print(table(rows, header=header))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
