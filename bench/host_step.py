#!/usr/bin/env python3
"""What the host does in a decoding step, when the device does everything else: scheduling, tables, what draws are asked
for, booking, stop strings, texts.

  python bench/host_step.py
  python bench/host_step.py --sequences 512 --stop

The engine and the backend are those of `l4tool batch`; in place of the model's logits there are fixed ones, and tokens
are drawn greedily once everything that a device would be sent for a draw is made. What launching itself takes is not in
it. A decoding step on a device should take longer than this, or it waits: the next one is launched meanwhile. Median of
the steps in which all sequences decode.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from batch.backends.base import ListSource  # noqa: E402
from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions  # noqa: E402
from batch.engine import sampler  # noqa: E402
from batch.model.model import load_model  # noqa: E402
from batch.requests import PreparedRequest, SamplingParams  # noqa: E402
from batch.tokenizer import Tokenizer  # noqa: E402
from converters.detect import open_checkpoint  # noqa: E402
from examples.make_checkpoint import make_checkpoint  # noqa: E402

DRAWN = SamplingParams(1, temperature=0.6, top_p=0.9)


def parameters_only(
    logits: torch.Tensor, tokens: torch.Tensor, rows: list[int], keys: list[int], params: list[SamplingParams]
) -> None:
    """In place of the sampler's `_draw_rows`."""
    sampler.draw_parameters(rows, keys, params)


def step_seconds(folder: Path, sequences: int, prompt: int, tokens: int, with_stop: bool) -> list[float]:
    """Of each step in which all sequences decode."""
    model = load_model(open_checkpoint(folder))
    logits = torch.randn(sequences, model.arch.text.vocab_size, generator=torch.Generator().manual_seed(0))
    model.forward = lambda step, kv: logits[: len(step.logits_rows)]  # type: ignore[method-assign]
    options = EmbeddedOptions(max_seqs=sequences, max_batch_tokens=8192, kv_memory_bytes=1 << 30)
    backend = EmbeddedBackend(model, Tokenizer.load(folder), options, eos_token_ids=())
    object.__setattr__(backend.engine.config, "overlap", True)
    sampling = SamplingParams(tokens, temperature=DRAWN.temperature, top_p=DRAWN.top_p)
    stop = ("no such text",) if with_stop else ()
    requests = [PreparedRequest(n, [n % 2000] * prompt, sampling, stop=stop) for n in range(sequences)]
    times: list[float] = []
    look_ahead = backend.engine.scheduler.look_ahead

    def noted(plan: list[Any]) -> list[Any]:
        found = look_ahead(plan)
        if len(found) == sequences:
            times.append(time.perf_counter())
        return found

    backend.engine.scheduler.look_ahead = noted  # type: ignore[method-assign]
    before, sampler._draw_rows = sampler._draw_rows, parameters_only
    try:
        for _ in backend.run(ListSource(requests)):
            pass
    finally:
        sampler._draw_rows = before
        backend.close()
    return [after - first for first, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--stop", action="store_true", help="requests with a stop string")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        make_checkpoint(folder)
        for count in arguments.sequences:
            seconds = step_seconds(folder, count, arguments.prompt, arguments.tokens, arguments.stop)
            print(f"{count} sequences: {statistics.median(seconds) * 1e3:.2f} ms a step, {len(seconds)} steps")


if __name__ == "__main__":
    main()
