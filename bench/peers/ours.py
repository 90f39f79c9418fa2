"""The job on l4tool's embedded backend."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from measure import Timed, peak_rss_bytes, read_job, write_result

from batch.backends.base import ListSource
from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
from batch.engine.engine import Engine
from batch.requests import GenerationResult, PreparedRequest, SamplingParams
from batch.tokenizer import Tokenizer


class StepTimer:
    """Stands in for an engine's `step` and notes what each step was and how long it took."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.step = engine, engine.step
        self.rows: list[dict[str, float]] = []

    def __call__(self) -> list[Any]:
        before, began = dict(vars(self.engine.stats)), time.perf_counter()
        out = self.step()
        row = {key: value - before[key] for key, value in vars(self.engine.stats).items()}
        self.rows.append(row | {"step_s": time.perf_counter() - began})
        return out


def decode_step(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the decode steps with the most sequences, in milliseconds."""
    largest = max((row["computed_tokens"] for row in rows if is_decode(row)), default=0)
    chosen = [row for row in rows if is_decode(row) and row["computed_tokens"] == largest]

    def mean(key: str) -> float:
        return 1000 * sum(row[key] for row in chosen) / max(len(chosen), 1)

    keys = {"step_ms": "step_s", "schedule_ms": "schedule_s", "build_ms": "build_s", "sample_ms": "sample_s"}
    return {"sequences": largest} | {name: mean(key) for name, key in keys.items()}


def is_decode(row: dict[str, float]) -> bool:
    return row["computed_tokens"] == row["output_tokens"]


def requests(prompts: list[list[int]], sampling: SamplingParams) -> ListSource:
    return ListSource(PreparedRequest(key, prompt, sampling) for key, prompt in enumerate(prompts))


def checked(results: list[GenerationResult]) -> list[GenerationResult]:
    for result in results:
        assert result.error_code is None, result.error_message
    return sorted(results, key=lambda result: result.key)


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    folder = Path(job["checkpoint"])
    options = EmbeddedOptions(dtype="bfloat16", max_batch_tokens=job.get("max_batch_tokens"), prefix_cache=False)
    with Timed() as loading:
        backend = EmbeddedBackend(folder, Tokenizer.load(folder), options, eos_token_ids=())
    prompts, new_tokens = job["prompts"], job["new_tokens"]
    checked(list(backend.run(requests(prompts[:2], SamplingParams(2)))))  # compile, warm up
    timer = StepTimer(backend.engine)
    backend.engine.step = timer  # type: ignore[method-assign]
    with Timed() as timed:
        results = checked(list(backend.run(requests(prompts, SamplingParams(new_tokens)))))
    assert all(len(result.choices[0].token_ids) == new_tokens for result in results)
    prefill_s = sum(row["step_s"] for row in timer.rows if not is_decode(row))
    decoded = sum(row["output_tokens"] for row in timer.rows if is_decode(row))
    write_result({
        "seconds": timed.seconds, "cpu_s": timed.cpu_s, "load_s": loading.seconds, "peak_rss_bytes": peak_rss_bytes(),
        "prompt_tokens_s": sum(map(len, prompts)) / prefill_s,
        "decode_tokens_s": decoded / sum(row["step_s"] for row in timer.rows if is_decode(row)),
        "decode_step": decode_step(timer.rows), "stats": vars(backend.stats),
    })  # fmt: skip


if __name__ == "__main__":
    main()
