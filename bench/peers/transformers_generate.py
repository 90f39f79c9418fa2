"""The job on transformers' generate(): sorted by length, left-padded batches of job["batch"]."""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import Timed, peak_rss_bytes, read_job, write_result
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


class ForwardTimer:
    """Splits generate() into prompt and decode seconds by the number of tokens of each forward pass."""

    def __init__(self, model: Any) -> None:
        self.prompt_s = self.decode_s = 0.0
        self.decoded = 0
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self.began = time.perf_counter()

    def after(self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        took = time.perf_counter() - self.began
        rows, tokens = keywords["input_ids"].shape
        if tokens > 1:
            self.prompt_s += took
        else:
            self.decode_s += took
            self.decoded += rows


@torch.inference_mode()
def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    config = AutoConfig.from_pretrained(job["checkpoint"])
    kind = Llama4ForConditionalGeneration if hasattr(config, "vision_config") else Llama4ForCausalLM
    model = kind.from_pretrained(job["checkpoint"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    prompts = sorted(job["prompts"], key=len)
    timer = ForwardTimer(model)
    with Timed() as timed:
        for start in range(0, len(prompts), job["batch"]):
            batch = prompts[start : start + job["batch"]]
            out = model.generate(
                **left_padded(batch), do_sample=False, max_new_tokens=job["new_tokens"], pad_token_id=0
            )  # fmt: skip
            assert out.shape == (len(batch), max(map(len, batch)) + job["new_tokens"])
    write_result({
        "seconds": timed.seconds, "cpu_s": timed.cpu_s, "peak_rss_bytes": peak_rss_bytes(),
        "prompt_tokens_s": sum(map(len, prompts)) / timer.prompt_s,
        "decode_tokens_s": timer.decoded / timer.decode_s,
    })  # fmt: skip


if __name__ == "__main__":
    main()
