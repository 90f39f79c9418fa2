"""The least time a batch can take on a machine, from its measured figures (bench/machine.py) and the model's headers.

A step of the engine computes some tokens at once. Its limit is the larger of two times:

  arithmetic  FLOPs / dot products per second, FLOPs = 2 · tokens · (weights used by one token)
              + 2 · sampled positions · lm_head + 4 · A · D · layers · Σ context over the tokens
  memory      bytes / memory reads per second, bytes = weights used by every token + touched experts · one expert
              + lm_head + keys and values of every sequence's context, each once

Weights used by one token: attention, router, norms, shared expert (or dense MLP) and, with top-1 routing, one expert of
each MoE layer. Experts touched by n tokens that are routed evenly: E · (1 - (1 - 1/E)ⁿ). Bytes are those of the file,
so INT4 counts 4 bits and its scales. A job's limit is that of one step with all prompts, plus that of one step for each
further token of all sequences together. int8 arithmetic takes every product, attention's too, at the int8 rate.
Contexts are taken to be shorter than the attention chunk. What is left out makes the limit lower, never higher:
activations, embeddings, softmax, norms' arithmetic, KV writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from machine import Machine

from converters.reader import Reader

MATH = ("bf16", "int8")


@dataclass(frozen=True)
class Costs:
    """A model's weights by when they are used, as numbers (`_params`) and as stored bytes; an expert is one of each
    MoE layer together. `context_flops`: of attention, per token and token of its context; `kv_bytes` per token."""

    shared_params: int
    shared_bytes: int
    expert_params: int
    expert_bytes: int
    head_params: int
    head_bytes: int
    num_experts: int
    context_flops: int
    kv_bytes: int

    def touched_experts(self, tokens: int) -> float:
        """How many of the experts n evenly routed tokens need, on average."""
        return self.num_experts * (1 - (1 - 1 / self.num_experts) ** tokens) if self.num_experts else 0.0

    @property
    def weight_bytes(self) -> int:
        """All that a large step reads."""
        return self.shared_bytes + self.num_experts * self.expert_bytes + self.head_bytes


@dataclass(frozen=True)
class Step:
    """One step: `context` is Σ over tokens of what they attend to, `kv_tokens` Σ over sequences of what is cached."""

    tokens: int
    sampled: int
    context: int
    kv_tokens: int

    def flops(self, costs: Costs) -> int:
        weights = self.tokens * (costs.shared_params + costs.expert_params) + self.sampled * costs.head_params
        return 2 * weights + self.context * costs.context_flops

    def bytes(self, costs: Costs, touched_experts: float | None = None) -> float:
        """Bytes read; touched_experts None: the number that evenly routed tokens touch."""
        touched = costs.touched_experts(self.tokens) if touched_experts is None else touched_experts
        weights = costs.shared_bytes + touched * costs.expert_bytes + costs.head_bytes
        return weights + self.kv_tokens * costs.kv_bytes

    def seconds(self, costs: Costs, machine: Machine, math: str = "bf16") -> float:
        rate = machine.int8_flops if math == "int8" else machine.bf16_flops
        return max(self.flops(costs) / rate, self.bytes(costs) / machine.read_bytes_s)


@dataclass(frozen=True)
class Limit:
    """Seconds at least: for the prompts (and each one's first token), and for all further tokens."""

    prompt_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        return self.prompt_s + self.decode_s


def prefill_step(lengths: list[int]) -> Step:
    """All prompts at once, whole."""
    return Step(sum(lengths), len(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(lengths))


def decode_step(lengths: list[int]) -> Step:
    """One more token for sequences of so many tokens, that token included."""
    return Step(len(lengths), len(lengths), sum(lengths), sum(lengths))


def job_limit(costs: Costs, machine: Machine, lengths: list[int], new_tokens: int, math: str = "bf16") -> Limit:
    """Prompts of these lengths, `new_tokens` each."""
    decode = (decode_step([n + i for n in lengths]) for i in range(1, new_tokens))
    return Limit(
        prefill_step(lengths).seconds(costs, machine, math), sum(step.seconds(costs, machine, math) for step in decode)
    )


def model_costs(reader: Reader) -> Costs:
    """From the headers of an open checkpoint; the vision tower and the embedding do not count."""
    text = reader.arch.text
    sizes = {"shared": 0, "expert": 0, "head": 0, "embed": 0}
    for name, info in reader.tensors().items():
        if "vision_model" not in name and "multi_modal_projector" not in name:
            sizes[_class_of(name)] += info.nbytes
    hidden, moe_layers = text.hidden_size, len(text.moe_layers)
    attention = hidden * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    expert = 3 * hidden * text.intermediate_size
    dense = 3 * hidden * text.intermediate_size_mlp * (text.num_layers - moe_layers)
    return Costs(
        shared_params=text.num_layers * attention + dense + moe_layers * (expert + hidden * text.num_experts),
        shared_bytes=sizes["shared"],
        expert_params=moe_layers * expert,
        expert_bytes=sizes["expert"] // max(text.num_experts, 1),
        head_params=hidden * text.vocab_size,
        head_bytes=sizes["head"] or sizes["embed"],
        num_experts=text.num_experts if moe_layers else 0,
        context_flops=4 * text.num_heads * text.head_dim * text.num_layers,
        kv_bytes=2 * 2 * text.num_kv_heads * text.head_dim * text.num_layers,
    )


def _class_of(name: str) -> str:
    if re.search(r"\.experts\.\d+\.", name):
        return "expert"
    if "lm_head" in name:
        return "head"
    return "embed" if "embed_tokens" in name else "shared"
