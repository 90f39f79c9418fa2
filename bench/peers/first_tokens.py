"""Are we computing the same model? First-token log-probabilities in float32, ours against transformers', few prompts.

In bf16 a comparison says little: where two experts' router logits nearly tie, rounding picks the other one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from measure import read_job, write_result
from transformers import AutoConfig, Llama4ForCausalLM, Llama4ForConditionalGeneration

from batch.backends.base import ListSource
from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
from batch.requests import PreparedRequest, SamplingParams
from batch.tokenizer import Tokenizer


def ours(folder: Path, prompts: list[list[int]], vocab_size: int) -> torch.Tensor:
    """float32 [prompts, V]."""
    options = EmbeddedOptions(dtype="float32", kv_memory_bytes=1 << 30)
    backend = EmbeddedBackend(folder, Tokenizer.load(folder), options)
    asked = SamplingParams(1, logprobs=vocab_size)
    rows = torch.empty(len(prompts), vocab_size)
    for result in backend.run(ListSource(PreparedRequest(i, p, asked) for i, p in enumerate(prompts))):
        assert result.error_code is None and result.choices[0].logprobs is not None, result.error_message
        ids, values = zip(*result.choices[0].logprobs[0].top, strict=True)
        rows[result.key, list(ids)] = torch.tensor(values)
    return rows


@torch.inference_mode()
def theirs(folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """float32 [prompts, V]."""
    config = AutoConfig.from_pretrained(folder)
    kind = Llama4ForConditionalGeneration if hasattr(config, "vision_config") else Llama4ForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    folder, prompts = Path(job["checkpoint"]), job["prompts"][:4]
    expected = theirs(folder, prompts)
    difference = (ours(folder, prompts, expected.shape[1]) - expected).abs().max().item()
    write_result({"difference": difference})


if __name__ == "__main__":
    main()
