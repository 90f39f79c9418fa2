#!/usr/bin/env python3
"""What a long system prompt costs when all lines share it: the same lines with it and without it, alternately.

  python bench/prefix_cache.py                                 mini Scout (0.9 B), 200 lines, 2,000 tokens shared
  python bench/prefix_cache.py --lines 1000 --rounds 1
  python bench/prefix_cache.py --scout-width --lines 48 --rounds 1      one layer of Scout's widths, two experts
  python bench/prefix_cache.py --checkpoint DIR --no-prefix-cache      what it costs without the cache

Every line has random tokens of its own (32–96 of them) and gets --new-tokens tokens, greedy, no end token, bf16. Each
run has an engine of its own with an empty cache, so the first line's whole prompt is in the time; loading is not.
"floating-point limit": the ratio of the products to be computed, the shared tokens' own once. It counts the attention
to them: each of a line's tokens attends to 2,000 more, which is 27 % more work in the mini Scout and 6 % in Scout.
On a machine that others use, OMP_NUM_THREADS=1 and the ratio of CPU seconds tell more than the wall clock.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from l4tool.core.arch import TextArch  # noqa: E402
from l4tool.core.console import note, table  # noqa: E402

NUM_SPECIAL = 2048  # ids that no prompt may hold: the last of the vocabulary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: a mini Scout, made in --work")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where the checkpoint is kept")
    parser.add_argument(
        "--scout-width", action="store_true", help="instead of the mini Scout: one layer of Scout's size"
    )
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--shared", type=int, default=2000, help="tokens of the system prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="how often the two alternate")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, help="tokens per KV block; default: the engine's own")
    parser.add_argument("--no-prefix-cache", action="store_true")
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer; the default checkpoint is made first where it is missing."""
    from batch.model.model import load_model
    from batch.tokenizer import Tokenizer
    from converters.detect import open_checkpoint

    name = "scout-width" if arguments.scout_width else "mini"
    folder = arguments.checkpoint or arguments.work / name
    if not (folder / "config.json").exists():
        maker = [
            sys.executable,
            str(ROOT / "examples/make_checkpoint.py"),
            str(folder),
            "--preset",
            name,
            "--text-only",
        ]
        subprocess.run([*maker, *(("--layers", "1", "--experts", "2") if arguments.scout_width else ())], check=True)
    return load_model(open_checkpoint(folder), "cpu", arguments.dtype), Tokenizer.load(folder)


def timed_run(model: Any, tokenizer: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds for all prompts on an engine of its own, and the engine's figures."""
    from batch.backends.base import ListSource
    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
    from batch.requests import PreparedRequest, SamplingParams

    options = EmbeddedOptions(prefix_cache=not arguments.no_prefix_cache, block_size=arguments.block_size)
    backend = EmbeddedBackend(model, tokenizer, options, eos_token_ids=())
    sampling = SamplingParams(arguments.new_tokens)
    began, cpu_began = time.perf_counter(), time.process_time()
    results = list(backend.run(ListSource(PreparedRequest(i, p, sampling) for i, p in enumerate(prompts))))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    assert all(result.error_code is None for result in results) and len(results) == len(prompts)
    stats = backend.stats
    measured = {"seconds": seconds, "cpu_s": cpu_s}
    return vars(stats) | measured | {"hit_rate": stats.prefix_cache_hit_rate}


def flops(text: TextArch, shared: int, lines: list[int], new_tokens: int) -> float:
    """Of all products, attention's included, for lines of so many tokens behind `shared` ones computed once."""
    heads = text.num_heads + 2 * text.num_kv_heads
    weights = text.num_layers * text.hidden_size * (heads + text.num_heads) * text.head_dim
    for layer in range(text.num_layers):
        moe = text.is_moe(layer)
        width = text.intermediate_size * (1 + text.experts_per_token) if moe else text.intermediate_size_mlp
        weights += 3 * text.hidden_size * width + moe * text.hidden_size * text.num_experts
    per_key = 4 * text.num_layers * text.num_heads * text.head_dim
    total = 2.0 * weights * shared + per_key * shared * shared / 2
    for length in lines:
        tokens = length + new_tokens - 1
        total += 2.0 * weights * tokens + per_key * tokens * (shared + tokens / 2)
        total += 2.0 * text.hidden_size * text.vocab_size * new_tokens
    return total


def row(name: str, run: dict[str, Any]) -> list[str]:
    return [
        name, f"{run['seconds']:.1f}", f"{run['cpu_s']:.1f}", str(run["steps"]), f"{run['prompt_tokens']:,}",
        f"{run['computed_tokens']:,}", f"{run['hit_rate']:.1%}", f"{run['schedule_s']:.3f}", f"{run['build_s']:.3f}",
    ]  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load(arguments)
    rng = random.Random(0)
    largest = model.arch.text.vocab_size - NUM_SPECIAL
    shared = [rng.randrange(largest) for _ in range(arguments.shared)]
    lines = [[rng.randrange(largest) for _ in range(rng.randint(32, 96))] for _ in range(arguments.lines)]
    timed_run(model, tokenizer, [shared[:64] + line for line in lines[:4]], arguments)  # compile, warm up
    lengths, new_tokens = [len(line) for line in lines], arguments.new_tokens
    text = model.arch.text
    limit = flops(text, len(shared), lengths, new_tokens) / flops(text, 0, lengths, new_tokens)
    rows, ratios, cpu_ratios = [], [], []
    for _ in range(arguments.rounds):
        without = timed_run(model, tokenizer, lines, arguments)
        with_it = timed_run(model, tokenizer, [shared + line for line in lines], arguments)
        rows += [row("without", without), row("with", with_it)]
        ratios.append(with_it["seconds"] / without["seconds"])
        cpu_ratios.append(with_it["cpu_s"] / without["cpu_s"])
        note(f"  {without['seconds']:.1f} s without, {with_it['seconds']:.1f} s with: {ratios[-1]:.2f}×")
    print(
        table(
            rows, ["system prompt", "seconds", "CPU s", "steps", "prompt", "computed", "hits", "schedule s", "inputs s"]
        )
    )
    print(
        f"{arguments.lines} lines with {arguments.shared:,} shared tokens / the same lines without: "
        f"{statistics.median(ratios):.2f}×, in CPU seconds "
        f"{statistics.median(cpu_ratios):.2f}× (median of {len(ratios)}), hit rate {with_it['hit_rate']:.1%}; "
        f"floating-point limit {limit:.2f}×"
    )


if __name__ == "__main__":
    main()
