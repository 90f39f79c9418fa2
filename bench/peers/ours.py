"""The scenarios on l4tool's embedded backend. job["activations"]: as EmbeddedOptions has it; absent: its default."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from measure import Timed, figures, read_job, take_peak_rss, warm_up_prompts, write_result

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


def embedded_options(job: dict[str, Any]) -> EmbeddedOptions:
    """Prefix caching is off: a warm-up shares prompts with the job."""
    chosen = {key: job[key] for key in ("max_batch_tokens", "activations") if job.get(key) is not None}
    if unknown := chosen.keys() - {field.name for field in fields(EmbeddedOptions)}:
        raise SystemExit(f"this l4tool's EmbeddedOptions has no {', '.join(unknown)}")
    return EmbeddedOptions(dtype="bfloat16", prefix_cache=False, **chosen)


def generate(backend: EmbeddedBackend, prompts: list[list[int]], new_tokens: int) -> list[GenerationResult]:
    """Greedy, all of them at once; checked."""
    asked = SamplingParams(new_tokens)
    results = list(backend.run(ListSource(PreparedRequest(key, prompt, asked) for key, prompt in enumerate(prompts))))
    for result in results:
        assert result.error_code is None, result.error_message
    assert [len(result.choices[0].token_ids) for result in results] == [new_tokens] * len(prompts)
    return results


def run_scenario(backend: EmbeddedBackend, scenario: dict[str, Any]) -> dict[str, Any]:
    timer = StepTimer(backend.engine)
    backend.engine.step = timer  # type: ignore[method-assign]
    take_peak_rss()
    with Timed() as timed:
        generate(backend, scenario["prompts"], scenario["new_tokens"])
    backend.engine.step = timer.step  # type: ignore[method-assign]
    steps = [(row["step_s"], int(row["computed_tokens"]), int(row["output_tokens"])) for row in timer.rows]
    return figures(timed, scenario, steps) | {"decode_step": decode_step(timer.rows)}


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    folder = Path(job["checkpoint"])
    with Timed() as loading:
        backend = EmbeddedBackend(folder, Tokenizer.load(folder), embedded_options(job), eos_token_ids=())
    generate(backend, warm_up_prompts(job), 4)  # compiles
    generate(backend, warm_up_prompts(job)[:1], 4)
    results = {scenario["name"]: run_scenario(backend, scenario) for scenario in job["scenarios"]}
    write_result({"load_s": loading.seconds, "scenarios": results})


if __name__ == "__main__":
    main()
