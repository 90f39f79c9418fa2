"""The scenarios on transformers' generate(): sorted by length, left-padded batches of job["batch"]."""

from __future__ import annotations

import time
from typing import Any

import torch
from measure import Timed, figures, read_job, take_peak_rss, warm_up_prompts, write_result
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


class ForwardTimer:
    """Notes every forward pass as a step: (seconds, tokens, sequences)."""

    def __init__(self, model: Any) -> None:
        self.steps: list[tuple[float, int, int]] = []
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self.began = time.perf_counter()

    def after(self, module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        rows, tokens = keywords["input_ids"].shape
        self.steps.append((time.perf_counter() - self.began, rows * tokens, rows))


def load(folder: str) -> Any:
    config = AutoConfig.from_pretrained(folder)
    kind = Llama4ForConditionalGeneration if hasattr(config, "vision_config") else Llama4ForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompts: list[list[int]], new_tokens: int, batch_size: int) -> None:
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        out = model.generate(**left_padded(batch), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        assert out.shape == (len(batch), max(map(len, batch)) + new_tokens)


@torch.inference_mode()
def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    with Timed() as loading:
        model = load(job["checkpoint"])
    generate(model, warm_up_prompts(job)[:2], 2, job["batch"])
    timer = ForwardTimer(model)
    results = {}
    for scenario in job["scenarios"]:
        timer.steps = []
        take_peak_rss()
        with Timed() as timed:
            generate(model, scenario["prompts"], scenario["new_tokens"], job["batch"])
        results[scenario["name"]] = figures(timed, scenario, timer.steps)
    write_result({"load_s": loading.seconds, "scenarios": results})


if __name__ == "__main__":
    main()
