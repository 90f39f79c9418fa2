"""Scenarios of any prompts on libllama, through llama-cpp-python's ctypes declarations of the same source.

llama-batched-bench knows prompts of equal length only. This does what it does, with its settings (batches of 2048,
micro batches of 512, a KV stream per sequence, no full-size window cache), for a list of prompts: as many whole prompts
as fit into a micro batch are given to each llama_decode() (measured: a little faster than one prompt or 2048 tokens),
then all sequences get one token per call; greedy, the first largest logit.
job["build"]: llama.cpp's build folder, with shared libraries; job["binding"]: the folder that holds `llama_cpp/`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from measure import Timed, figures, read_job, take_peak_rss, warm_up_prompts, write_result

N_BATCH, N_UBATCH = 2048, 512  # llama-batched-bench's


def bind(job: dict[str, Any]) -> Any:
    """The module of declarations alone: the package's __init__ would import its server's dependencies too.

    Without `job["build"]`: that of the llama-cpp-python which is installed here, with its own library.
    """
    if "build" not in job:
        return importlib.import_module("llama_cpp.llama_cpp")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(Path(job["build"]) / "bin")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(Path(job["binding"]) / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


class Runner:
    """One model and one context with room for every scenario."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.llama = llama = bind(job)
        self.quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: the library holds its address
        llama.llama_log_set(self.quiet, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(job["gguf"].encode(), llama.llama_model_default_params())
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        groups = [(scenario["prompts"], scenario["new_tokens"]) for scenario in job["scenarios"]]
        sequences = max(len(prompts) for prompts, _ in groups)
        longest = max(len(prompt) + new_tokens for prompts, new_tokens in groups for prompt in prompts)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * longest, sequences
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = job["threads"]
        params.swa_full = params.kv_unified = False
        params.no_perf = True
        self.context = llama.llama_init_from_model(self.model, params)
        self.batch = llama.llama_batch_init(N_BATCH, 0, 1)
        self.steps: list[tuple[float, int, int]] = []

    def decode(self, pieces: list[tuple[int, int, list[int]]]) -> list[int]:
        """One llama_decode() of (sequence, first position, tokens) each; the next token of each."""
        began, batch, place = time.perf_counter(), self.batch, 0
        for sequence, position, tokens in pieces:
            for offset, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = offset == len(tokens) - 1
                place += 1
        batch.n_tokens = place
        code = self.llama.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode: {code}"
        address = self.llama.llama_get_logits(self.context)  # waits
        logits = np.ctypeslib.as_array(address, shape=(len(pieces), self.vocab_size))
        chosen: list[int] = logits.argmax(-1).tolist()
        self.steps.append((time.perf_counter() - began, place, len(pieces)))
        return chosen

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """The new tokens of every prompt."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        self.steps = []
        out: list[list[int]] = [[] for _ in prompts]
        waiting = list(enumerate(prompts))
        while waiting:
            taken = [waiting.pop(0)]
            while waiting and sum(len(prompt) for _, prompt in taken) + len(waiting[0][1]) <= N_UBATCH:
                taken.append(waiting.pop(0))
            for (index, _), token in zip(taken, self.decode([(i, 0, prompt) for i, prompt in taken]), strict=True):
                out[index].append(token)
        for step in range(new_tokens - 1):
            pieces = [(i, len(prompt) + step, [out[i][-1]]) for i, prompt in enumerate(prompts)]
            for tokens, token in zip(out, self.decode(pieces), strict=True):
                tokens.append(token)
        return out


def main() -> None:
    job = read_job()
    with Timed() as loading:
        runner = Runner(job)
    runner.generate(warm_up_prompts(job), 4)
    runner.generate(warm_up_prompts(job)[:1], 4)
    results = {}
    for scenario in job["scenarios"]:
        take_peak_rss()
        with Timed() as timed:
            runner.generate(scenario["prompts"], scenario["new_tokens"])
        results[scenario["name"]] = figures(timed, scenario, runner.steps)
    write_result({"load_s": loading.seconds, "scenarios": results})


if __name__ == "__main__":
    main()
