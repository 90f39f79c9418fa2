"""What a Llama 4 is: one frozen dataclass tree, built once by `converters/arch_io.py`, never changed.

Dimension legend, used throughout the project:
  V vocab_size   H hidden_size   I intermediate_size (one expert)   M intermediate_size_mlp (dense layers)
  L num_layers   A num_heads     K num_kv_heads   D head_dim         E num_experts
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3 RoPE frequency scaling. `low_freq_factor == high_freq_factor` (Scout) means: no smooth band."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class TextArch:
    """The language model. Lengths are in tokens; `rope_layers[i]`: layer i HAS rope (and chunked attention)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    attention_chunk_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def is_moe(self, layer: int) -> bool:
        """True where layer's feed-forward is routed experts plus a shared expert; False where it is one dense MLP."""
        return layer in self.moe_layers


@dataclass(frozen=True)
class VisionArch:
    """The vision tower and its adapter. `image_size` and `patch_size` are pixels per side."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    output_dim: int
    rope_theta: float

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Language-model tokens that one tile becomes after pixel shuffle (144 for the published models)."""
        return int(self.patches_per_side**2 * self.pixel_shuffle_ratio**2)


@dataclass(frozen=True)
class Arch:
    """One checkpoint's architecture. `vision` is None for a text-only export.

    `image_token_id` is the id (`<|patch|>`) whose embeddings are replaced by image features.
    """

    text: TextArch
    vision: VisionArch | None
    dtype: str  # torch dtype name of the unquantized weights: bfloat16, float16 or float32
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    image_token_id: int | None = None
