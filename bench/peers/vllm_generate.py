"""The job on vLLM's offline LLM (its CPU build, in an environment of its own: only vLLM and the standard library)."""

from __future__ import annotations

import os
import time
from typing import Any

from measure import Timed, peak_rss_bytes, read_job, write_result


def main() -> None:
    job = read_job()
    cores = sorted(os.sched_getaffinity(0))[: job["threads"]]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, ample for this job
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    prompts, new_tokens = job["prompts"], job["new_tokens"]
    longest = max(map(len, prompts)) + new_tokens
    llm = LLM(
        model=job["checkpoint"], dtype="bfloat16", max_model_len=longest, enforce_eager=True, max_num_seqs=len(prompts),
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def generate(chosen: list[list[int]], tokens: int) -> list[Any]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": prompt} for prompt in chosen], sampling, use_tqdm=False)

    generate(prompts[:2], 2)
    began = time.perf_counter()
    generate(prompts, 1)
    prompt_s = time.perf_counter() - began
    with Timed() as timed:
        results = generate(prompts, new_tokens)
    assert all(len(result.outputs[0].token_ids) == new_tokens for result in results)
    write_result({
        "seconds": timed.seconds, "cpu_s": timed.cpu_s, "peak_rss_bytes": peak_rss_bytes(),
        "prompt_tokens_s": sum(map(len, prompts)) / prompt_s,
        "decode_tokens_s": len(prompts) * (new_tokens - 1) / (timed.seconds - prompt_s),
    })  # fmt: skip


if __name__ == "__main__":
    main()
