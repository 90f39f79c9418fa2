"""A batch on vLLM's offline LLM as its user would script it: JOB.jsonl OUT.jsonl CHECKPOINT THREADS.

`generate` hands out its results when all are done, so the first line comes with the last. Only vLLM and the standard
library are needed.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    job, output, checkpoint, threads = sys.argv[1:]
    cores = sorted(os.sched_getaffinity(0))[: int(threads)]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, ample for this job
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    with open(job) as file:
        lines = [json.loads(line) for line in file]
    longest = max(len(line["prompt"]) + line["max_tokens"] for line in lines)
    llm = LLM(
        model=checkpoint, dtype="bfloat16", max_model_len=longest, enforce_eager=True, max_num_seqs=len(lines),
        disable_log_stats=True,
    )  # fmt: skip
    sampling = [SamplingParams(temperature=0.0, max_tokens=line["max_tokens"], ignore_eos=True) for line in lines]
    prompts = [{"prompt_token_ids": line["prompt"]} for line in lines]
    results = llm.generate(prompts, sampling, use_tqdm=False)
    with open(output, "w") as file:
        for line, result in zip(lines, results, strict=True):
            file.write(json.dumps({"id": line["id"], "text": result.outputs[0].text}) + "\n")


if __name__ == "__main__":
    main()
