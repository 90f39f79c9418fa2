"""The vision tower: tiles of pixels → features in the language model's hidden size.

Legend: N tiles, S pixels per side, P patches per side (S / patch), C = P·P + 1 positions (class token last),
W vision hidden, A heads, D head_dim, r pixel-shuffle ratio, F = P·P·r² features per tile, H text hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batch.kernels.reference import rotate
from batch.kernels.transfer import send
from batch.model.weights import Loader
from l4tool.core.arch import VisionArch

LAYER_NORM_EPS = 1e-5  # torch's LayerNorm default, which the reference models use here


@dataclass(frozen=True, eq=False)
class Affine:
    """weight [out, in] (or [W] for a norm) and bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, LAYER_NORM_EPS)


@dataclass(frozen=True, eq=False)
class EncoderLayer:
    input_norm: Affine
    q: Affine
    k: Affine
    v: Affine
    o: Affine
    post_norm: Affine
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True, eq=False)
class VisionWeights:
    """patch [W, 3·patch²], class_token [W], position [C, W], adapter and projector without bias."""

    patch: torch.Tensor
    class_token: torch.Tensor
    position: torch.Tensor
    norm_pre: Affine
    layers: tuple[EncoderLayer, ...]
    norm_post: Affine
    adapter_fc1: torch.Tensor
    adapter_fc2: torch.Tensor
    projector: torch.Tensor


def load_vision(loader: Loader, arch: VisionArch) -> VisionWeights:
    """Every weight of the tower, adapter and projector; none of them is ever quantized."""

    def affine(prefix: str) -> Affine:
        return Affine(loader.tensor(f"{prefix}.weight"), loader.tensor(f"{prefix}.bias"))

    def layer(index: int) -> EncoderLayer:
        base = f"vision_model.model.layers.{index}."
        return EncoderLayer(
            input_norm=affine(base + "input_layernorm"),
            q=affine(base + "self_attn.q_proj"),
            k=affine(base + "self_attn.k_proj"),
            v=affine(base + "self_attn.v_proj"),
            o=affine(base + "self_attn.o_proj"),
            post_norm=affine(base + "post_attention_layernorm"),
            fc1=affine(base + "mlp.fc1"),
            fc2=affine(base + "mlp.fc2"),
        )

    return VisionWeights(
        patch=loader.tensor("vision_model.patch_embedding.linear.weight"),
        class_token=loader.tensor("vision_model.class_embedding"),
        position=loader.tensor("vision_model.positional_embedding_vlm"),
        norm_pre=affine("vision_model.layernorm_pre"),
        layers=tuple(layer(index) for index in range(arch.num_layers)),
        norm_post=affine("vision_model.layernorm_post"),
        adapter_fc1=loader.tensor("vision_model.vision_adapter.mlp.fc1.weight"),
        adapter_fc2=loader.tensor("vision_model.vision_adapter.mlp.fc2.weight"),
        projector=loader.tensor("multi_modal_projector.linear_1.weight"),
    )


class VisionModel:
    """Encodes all tiles of one picture together, so a picture's features never depend on other pictures."""

    def __init__(self, arch: VisionArch, weights: VisionWeights) -> None:
        self.arch, self.weights = arch, weights
        cos, sin = axial_rotation(arch)  # [C, D/2]
        self.cos, self.sin = cos.to(weights.patch.device), sin.to(weights.patch.device)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, S, S] → features [N·F, H] in the activation dtype, tile after tile."""
        w = self.weights
        (pixels,) = send([pixels], w.patch.device)
        normal = (pixels.float() / 255.0 - 0.5) / 0.5
        x = F.linear(self._patches(normal.to(w.patch.dtype)), w.patch)  # [N, P·P, W]
        x = torch.cat([x, w.class_token.expand(x.shape[0], 1, -1)], dim=1)  # [N, C, W]
        x = w.norm_pre.norm(x + w.position)
        for layer in w.layers:
            x = x + self._attention(layer, layer.input_norm.norm(x))
            x = x + layer.fc2.linear(F.gelu(layer.fc1.linear(layer.post_norm.norm(x))))
        x = w.norm_post.norm(x)[:, :-1]  # [N, P·P, W]
        x = self._pixel_shuffle(x)  # [N, F, W/r²]
        x = F.gelu(F.linear(F.gelu(F.linear(x, w.adapter_fc1)), w.adapter_fc2))
        return F.linear(x, w.projector).flatten(0, 1)  # [N·F, H]

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S] → [N, P·P, 3·patch²], patches row by row."""
        size = self.arch.patch_size
        return F.unfold(pixels, kernel_size=size, stride=size).transpose(1, 2)

    def _attention(self, layer: EncoderLayer, x: torch.Tensor) -> torch.Tensor:
        """Full bidirectional attention inside each tile: [N, C, W] → [N, C, W]."""
        tiles, heads = x.shape[0], (self.arch.num_heads, -1)
        q = layer.q.linear(x).unflatten(-1, heads)  # [N, C, A, D]
        k = layer.k.linear(x).unflatten(-1, heads)
        v = layer.v.linear(x).unflatten(-1, heads)
        q, k = self._rotate(q, tiles), self._rotate(k, tiles)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [N, A, C, D]
        return layer.o.linear(out.transpose(1, 2).flatten(2))  # [N, C, W]

    def _rotate(self, x: torch.Tensor, tiles: int) -> torch.Tensor:
        """2-D rope on [N, C, A, D]: the same C rotations for every tile."""
        cos, sin = self.cos.repeat(tiles, 1), self.sin.repeat(tiles, 1)  # [N·C, D/2]
        return rotate(x.flatten(0, 1), cos, sin).view(x.shape).to(x.dtype)

    def _pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """[N, P·P, W] → [N, F, W/r²]: each 1/r × 1/r square of patches becomes one row, left before right."""
        ratio, side = self.arch.pixel_shuffle_ratio, self.arch.patches_per_side
        tiles, _, width = x.shape
        short, wide = int(side * ratio), int(width / ratio)
        x = x.view(tiles, side, short, wide).transpose(1, 2)  # [N, P·r, P, W/r]
        x = x.reshape(tiles, short, short, int(width / ratio**2)).transpose(1, 2)  # [N, P·r, P·r, W/r²]
        return x.reshape(tiles, short * short, -1)


def axial_rotation(arch: VisionArch) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32 [C, D/2]: a head's first half turns with the patch's column, the second with its row,
    both counted from 1; the class token is not turned."""
    side, half = arch.patches_per_side, arch.hidden_size // arch.num_heads // 2
    inverse = 1.0 / (arch.rope_theta ** (torch.arange(0, half, 2).float() / half))  # [D/4]
    index = torch.arange(side * side)
    columns = (index % side + 1)[:, None] * inverse  # [P·P, D/4]
    rows = (index // side + 1)[:, None] * inverse
    angles = torch.cat([columns, rows], dim=-1)  # [P·P, D/2]
    angles = torch.cat([angles, torch.zeros(1, angles.shape[1])])  # [C, D/2]
    return angles.cos(), angles.sin()
