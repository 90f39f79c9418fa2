"""The weights that training begins with: random, with three hints without which a name in a text and what stands beside
it are connected much later (docs/demo-model.md has figures).

1. Tokens of the same word ("Rome", " Rome", "ROME") begin with nearly the same embedding, in and out, and all
   embeddings share one direction.
2. In the first two layers one kv head's keys and its query heads' queries are made from that direction alone, turned so
   that each token attends to the one before it, or the one before that.
3. In the last layer, values and outputs of attention undo each other: what is attended to is what is said.
"""

from __future__ import annotations

import math

import torch

from batch.kernels.reference import rotate
from batch.model.rope import cos_sin, inverse_frequencies
from batch.tokenizer import Tokenizer
from converters.names import hf_rows
from examples.demo_model.network import Parameters
from l4tool.core.arch import Arch

TURNING_PAIRS = 6  # the fastest ones of a head tell neighbours apart


def new_parameters(arch: Arch, tokenizer: Tokenizer, seed: int) -> Parameters:
    """Norms 1, biases 0, matrices N(0, 1 / in) and less where they write into the residual; then the three hints."""
    generator = torch.Generator().manual_seed(seed)
    depth = math.sqrt(2 * arch.text.num_layers)
    made = {}
    for row in hf_rows(arch):
        name, shape = row.stored, row.shape
        if "norm" in name and name.endswith("weight"):
            tensor = torch.ones(shape)
        elif name.endswith("bias"):
            tensor = torch.zeros(shape)
        elif "embed" in name and "patch" not in name:
            tensor = 0.02 * torch.randn(shape, generator=generator)
        else:
            inputs = shape[-2] if len(shape) == 3 else shape[-1]  # fused experts are [E, in, out]
            tensor = torch.randn(shape, generator=generator) / math.sqrt(inputs)
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj", "fc2.weight")):
                tensor /= depth
        made[name] = tensor
    common = _embed_words(made, arch, tokenizer, generator)
    for layer in (0, 1):
        _look_back(made, arch, layer, common)
    _copy(made, arch, generator)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def _embed_words(made: Parameters, arch: Arch, tokenizer: Tokenizer, generator: torch.Generator) -> torch.Tensor:
    """The direction that all embeddings share, ±1 [H]."""
    hidden, size = arch.text.hidden_size, arch.text.vocab_size
    texts = [part.decode("utf-8", "replace").strip().lower() for part in tokenizer.text_tokens(size)]
    drawn = torch.randn(size, hidden, generator=generator)
    first: dict[str, int] = {}  # token of each word
    words = drawn[[first.setdefault(text, index) if text else index for index, text in enumerate(texts)]]
    common = torch.randn(hidden, generator=generator).sign()
    for name, scale, shared in (("model.embed_tokens", 0.3, common), ("lm_head", 0.02, torch.zeros(hidden))):
        noise = 0.3 * torch.randn(size, hidden, generator=generator)
        made[f"language_model.{name}.weight"] = scale * (words + noise + shared)
    return common


def _look_back(made: Parameters, arch: Arch, layer: int, common: torch.Tensor) -> None:
    """A query at t and a key at s agree most at s = t - 1 for the first query head, t - 2 for the second."""
    text, base = arch.text, f"language_model.model.layers.{layer}.self_attn."
    size = text.head_dim
    key = torch.zeros(size)
    key[: 2 * TURNING_PAIRS] = torch.tensor([1.0, 0.0]).repeat(TURNING_PAIRS)
    _point(made[base + "k_proj.weight"][:size], key, common)
    for head in range(text.num_heads // text.num_kv_heads):
        cos, sin = cos_sin(torch.tensor([head + 1]), inverse_frequencies(text))
        query = rotate(key[None, None], cos, -sin)[0, 0]
        _point(made[base + "q_proj.weight"][head * size : (head + 1) * size], query, common)


def _point(weight: torch.Tensor, to: torch.Tensor, common: torch.Tensor) -> None:
    """Rows [D, H] of a projection: mostly `to` [D], whatever the token is."""
    weight.mul_(0.3).add_(4 / len(common) * to[:, None] * common)


def _copy(made: Parameters, arch: Arch, generator: torch.Generator) -> None:
    text, base = arch.text, f"language_model.model.layers.{arch.text.num_layers - 1}.self_attn."
    value = torch.linalg.qr(torch.randn(text.hidden_size, text.hidden_size, generator=generator))[0]
    parts = value.split(text.head_dim)
    made[base + "v_proj.weight"] = value
    shared = text.num_heads // text.num_kv_heads
    made[base + "o_proj.weight"] = 0.5 * torch.cat([parts[head // shared].T for head in range(text.num_heads)], 1)
