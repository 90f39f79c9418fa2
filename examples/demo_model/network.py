"""The architecture of Llama 4 as a network that can be trained: float32, whole sequences, no cache.

Parameters lie in a dict under the names and in the shapes of the Hugging Face checkpoint, so that writing one is
writing this dict. The vision tower is the engine's own (`batch.model.vision`), whose operations torch differentiates;
of the text model the engine has only kernels that torch cannot, and tests compare the two.

Legend: B sequences, T tokens of the longest, N tokens of all without padding, H hidden, A heads, K kv heads, E experts,
D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batch.kernels.reference import rotate
from batch.model.rope import cos_sin, inverse_frequencies, temperature
from batch.model.vision import Affine, EncoderLayer, VisionModel, VisionWeights
from examples.demo_model.questions import Cells
from l4tool.core.arch import Arch, VisionArch

Parameters = dict[str, torch.Tensor]


class Seen:
    """Heads that name what the vision tower sees in each cell and which cell it is, and their loss: only while it is
    trained."""

    def __init__(self, arch: Arch, words: Sequence[str], seed: int) -> None:
        self.number = {word: number for number, word in enumerate(words)}
        shape = (3, max(len(words), 9), arch.text.hidden_size)
        self.heads = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[2])
        self.heads.requires_grad_()

    def loss(self, features: torch.Tensor, seen: Sequence[Cells]) -> torch.Tensor:
        """features [9 · tiles, H] → mean cross entropy of both words and the place of each cell."""
        labels = torch.tensor(
            [[*(self.number[word] for word in words), place] for cells in seen for place, words in enumerate(cells)]
        )  # [9 · tiles, 3]
        logits = torch.einsum("nh,kwh->nkw", features, self.heads)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass
class Byproducts:
    """What else comes of one step: the expert of each token int64 [L, N] and tokens per expert [L, E], the loss that
    evens them out, and what the vision tower made of the tiles [image tokens, H]. L: the MoE layers."""

    chosen: torch.Tensor
    counts: torch.Tensor
    loss: torch.Tensor
    features: torch.Tensor | None


class Network:
    """A Llama 4 over `parameters`; holds no state of its own."""

    def __init__(self, arch: Arch, parameters: Parameters) -> None:
        self.arch, self.parameters = arch, parameters
        self.inverse = inverse_frequencies(arch.text)

    def forward(
        self, tokens: torch.Tensor, real: torch.Tensor, tiles: torch.Tensor | None, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, Byproducts]:
        """tokens int64 [B, T], real bool [B, T] (not padding), tiles uint8 [N, 3, S, S] in the order of the image
        tokens, wanted bool [B, T] → logits float32 [wanted, V] of the tokens after the wanted ones."""
        p, text = self.parameters, self.arch.text
        place = real.flatten().nonzero()[:, 0]  # [N] of B·T: only attention sees padding
        ids = tokens.flatten()[place]
        x = F.embedding(ids, p["language_model.model.embed_tokens.weight"])  # [N, H]
        features = None
        if tiles is not None:
            features = vision_model(self.arch.vision, p).encode(tiles)  # [image tokens, H]
            x = x.masked_scatter((ids == self.arch.image_token_id)[:, None], features)
        positions = torch.arange(tokens.shape[1])
        angles = cos_sin(positions[place % tokens.shape[1]], self.inverse)
        scale = temperature(positions[place % tokens.shape[1]], text)
        chunk = text.attention_chunk_size
        mask = None  # of chunked attention; None: no sequence is longer than a chunk
        if tokens.shape[1] > chunk:
            mask = (positions[:, None] >= positions) & (positions[:, None] // chunk == positions // chunk)
        routed = []
        for layer in range(text.num_layers):
            base = f"language_model.model.layers.{layer}."
            normed = self._norm(x, base + "input_layernorm.weight")
            if text.rope_layers[layer]:
                x = x + self._attention(base + "self_attn.", normed, tokens.shape, place, mask, angles, None)
            else:
                x = x + self._attention(base + "self_attn.", normed, tokens.shape, place, None, None, scale)
            normed = self._norm(x, base + "post_attention_layernorm.weight")
            if text.is_moe(layer):
                output, routing = self._experts(base + "feed_forward.", normed)
                routed.append(routing)
            else:
                output = self._mlp(base + "feed_forward.", normed)
            x = x + output
        x = self._norm(x[wanted.flatten()[place]], "language_model.model.norm.weight")
        logits = F.linear(x, p["language_model.lm_head.weight"])
        chosen, counts, losses = (torch.stack(parts) for parts in zip(*routed, strict=True))
        return logits, Byproducts(chosen, counts, losses.mean(), features)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.parameters[name], self.arch.text.rms_norm_eps)

    def _attention(
        self, base: str, x: torch.Tensor, shape: torch.Size, place: torch.Tensor, mask: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None, scale: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """x [N, H] → [N, H]; `place` [N] is where the tokens lie in `shape` [B, T], mask bool [T, T] (None: causal)."""
        p, text = self.parameters, self.arch.text
        heads, kv_heads = text.num_heads, text.num_kv_heads
        weight = torch.cat([p[f"{base}{name}_proj.weight"] for name in "qkv"])
        qkv = F.linear(x, weight).unflatten(-1, (-1, text.head_dim))  # [N, A + 2K, D]
        turning, v = qkv.split([heads + kv_heads, kv_heads], 1)
        if angles is not None:
            turning = rotate(turning, *angles)
            if text.use_qk_norm:
                turning = F.rms_norm(turning, (text.head_dim,), None, text.rms_norm_eps)
        q, k = turning.split([heads, kv_heads], 1)
        if scale is not None:
            q = q * scale[:, None, None]
        padded = x.new_zeros(shape.numel(), heads + 2 * kv_heads, text.head_dim)
        padded = padded.index_copy(0, place, torch.cat([q, k, v], 1)).view(*shape, -1, text.head_dim).transpose(1, 2)
        q, k, v = padded.split([heads, kv_heads, kv_heads], 1)  # [B, A, T, D], [B, K, T, D] twice
        k, v = (y.repeat_interleave(heads // kv_heads, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # [B, A, T, D]
        return F.linear(out.transpose(1, 2).flatten(2).flatten(0, 1)[place], p[base + "o_proj.weight"])

    def _mlp(self, base: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.parameters[f"{base}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def _experts(self, base: str, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x [N, H] → shared plus routed expert [N, H]; each token's expert [N], tokens per expert [E] and the balancing
        loss.

        The loss is the Switch Transformer's (Fedus et al. 2021, equation 4): E · Σ share of tokens · mean probability.
        """
        p = self.parameters
        scores = F.linear(x, p[base + "router.weight"])  # [N, E]
        best, chosen = scores.max(-1)
        counts = chosen.bincount(minlength=scores.shape[1])
        loss = scores.shape[1] * (counts / len(x) * scores.softmax(-1).mean(0)).sum()
        order = chosen.argsort(stable=True)
        inputs = (x * best.sigmoid()[:, None])[order].split(counts.tolist())
        gate_up, down = p[base + "experts.gate_up_proj"], p[base + "experts.down_proj"]
        outputs = []
        for expert, rows in enumerate(inputs):
            gate, up = (rows @ gate_up[expert]).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ down[expert])
        routed = torch.cat(outputs)[order.argsort()]
        return self._mlp(base + "shared_expert.", x) + routed, (chosen, counts, loss)


def vision_model(arch: VisionArch | None, p: Parameters) -> VisionModel:
    """The engine's vision tower over trainable weights."""
    assert arch is not None

    def affine(name: str) -> Affine:
        return Affine(p[f"vision_model.{name}.weight"], p[f"vision_model.{name}.bias"])

    def layer(index: int) -> EncoderLayer:
        base = f"model.layers.{index}."
        attention = [affine(f"{base}self_attn.{name}_proj") for name in "qkvo"]
        norms = [affine(base + name) for name in ("input_layernorm", "post_attention_layernorm")]
        return EncoderLayer(norms[0], *attention, norms[1], affine(base + "mlp.fc1"), affine(base + "mlp.fc2"))

    weights = VisionWeights(
        patch=p["vision_model.patch_embedding.linear.weight"],
        class_token=p["vision_model.class_embedding"],
        position=p["vision_model.positional_embedding_vlm"],
        norm_pre=affine("layernorm_pre"),
        layers=tuple(layer(index) for index in range(arch.num_layers)),
        norm_post=affine("layernorm_post"),
        adapter_fc1=p["vision_model.vision_adapter.mlp.fc1.weight"],
        adapter_fc2=p["vision_model.vision_adapter.mlp.fc2.weight"],
        projector=p["multi_modal_projector.linear_1.weight"],
    )
    return VisionModel(arch, weights)
