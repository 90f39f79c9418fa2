"""The scenarios on vLLM's offline LLM (its CPU build, in an environment of its own).

Every scheduled step is noted by wrapping the scheduler, which runs in this process.
"""

from __future__ import annotations

import os
import time
from typing import Any

from measure import Timed, figures, read_job, take_peak_rss, warm_up_prompts, write_result


class StepTimer:
    """Stands in for the scheduler's `schedule`: a step lasts from one call that schedules tokens to the next call."""

    def __init__(self, scheduler: Any) -> None:
        self.schedule = scheduler.schedule
        self.begun: list[tuple[float, int, int]] = []
        scheduler.schedule = self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        now = time.perf_counter()
        out = self.schedule(*arguments, **keywords)
        self.begun.append((now, out.total_num_scheduled_tokens, len(out.num_scheduled_tokens)))
        return out

    def steps(self, ended: float) -> list[tuple[float, int, int]]:
        """(seconds, tokens, sequences) of the steps noted."""
        times = [begun[0] for begun in self.begun[1:]] + [ended]
        steps = [(after - row[0], row[1], row[2]) for row, after in zip(self.begun, times, strict=True) if row[1]]
        return steps


def load(job: dict[str, Any]) -> Any:
    cores = sorted(os.sched_getaffinity(0))[: job["threads"]]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, ample for these jobs
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    lengths = [len(prompt) + scenario["new_tokens"] for scenario in job["scenarios"] for prompt in scenario["prompts"]]
    return LLM(
        model=job["checkpoint"], dtype="bfloat16", max_model_len=max(lengths), enforce_eager=True,
        max_num_seqs=max(len(scenario["prompts"]) for scenario in job["scenarios"]), enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip


def generate(llm: Any, prompts: list[list[int]], new_tokens: int) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [new_tokens] * len(prompts)


def main() -> None:
    job = read_job()
    with Timed() as loading:
        llm = load(job)
    timer = StepTimer(llm.llm_engine.engine_core.engine_core.scheduler)
    generate(llm, warm_up_prompts(job), 4)
    generate(llm, warm_up_prompts(job)[:1], 4)
    results = {}
    for scenario in job["scenarios"]:
        timer.begun = []
        take_peak_rss()
        with Timed() as timed:
            generate(llm, scenario["prompts"], scenario["new_tokens"])
        results[scenario["name"]] = figures(timed, scenario, timer.steps(time.perf_counter()))
    write_result({"load_s": loading.seconds, "scenarios": results})


if __name__ == "__main__":
    main()
