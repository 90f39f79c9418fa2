"""GGUF metadata ↔ architecture and side files, with the keys that llama.cpp's loaders read.

llama.cpp fixes what no key says (`src/models/llama4.cpp`): attention chunks of 8192, temperature tuning by 0.1 each
8192 positions, no rope on each fourth layer, QK norm unless there are 128 experts. RoPE scaling is a tensor of factors
by which frequencies are divided. Our own key `l4tool.config` holds config.json, for whoever reads the file back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from converters.arch_io import MAX_EXPERTS, MAX_LAYERS, arch_from_config
from converters.hf_config import hf_config
from l4tool.core.arch import Arch, RopeScaling, TextArch, VisionArch
from l4tool.core.errors import CheckpointError, UsageError
from l4tool.core.prompt import NUM_SPECIAL

ARCH, VISION_ARCH, PROJECTOR = "llama4", "clip", "llama4"
CONFIG_KEY = "l4tool.config"
CHUNK, FLOOR, SCALE, FULL_EVERY, NO_QK_NORM_EXPERTS = 8192, 8192.0, 0.1, 4, 128
SCALINGS = ((16.0, 1.0, 1.0, 8192), (8.0, 1.0, 4.0, 8192))  # published: Scout Instruct, Scout base


def require_expressible(arch: Arch) -> None:
    """Raises UsageError for what llama.cpp fixes otherwise: it would load the weights and compute something else."""
    t, v = arch.text, arch.vision
    rope = tuple((layer + 1) % FULL_EVERY != 0 for layer in range(t.num_layers))
    step = t.moe_layers[0] + 1 if t.moe_layers else 0
    fixed = {
        f"attention chunks of {CHUNK}": t.attention_chunk_size == CHUNK,
        "a layer without rope on each fourth place": t.rope_layers == rope,
        f"temperature tuning by {SCALE} each {CHUNK} positions": t.attn_temperature_tuning
        and (t.floor_scale, t.attn_scale) == (FLOOR, SCALE),
        f"QK norm {'off' if t.num_experts == NO_QK_NORM_EXPERTS else 'on'} with {t.num_experts} experts": t.use_qk_norm
        == (t.num_experts != NO_QK_NORM_EXPERTS),
        "MoE layers at regular places": step > 0 and t.moe_layers == tuple(range(step - 1, t.num_layers, step)),
        "a vision tower with rope theta 10000": v is None or v.rope_theta == 10000.0,
    }
    for what, fits in fixed.items():
        if not fits:
            raise UsageError(
                f"llama.cpp computes Llama 4 with {what}, this checkpoint has something else", hint="use --to hf"
            )


def rope_factors(t: TextArch) -> list[float] | None:
    """What each of the D/2 frequencies is divided by; None without scaling. llama.cpp's `rope_freqs.weight`."""
    s = t.rope_scaling
    if s is None:
        return None
    return scaling_factors(t.rope_theta, t.head_dim, s)


def scaling_factors(theta: float, head_dim: int, s: RopeScaling) -> list[float]:
    """Llama 3's scaling (transformers' `_compute_llama3_parameters`) as divisors of the frequencies."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    low = s.original_max_position_embeddings / s.low_freq_factor
    high = s.original_max_position_embeddings / s.high_freq_factor
    factors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(s.factor)
        else:
            ratio = s.original_max_position_embeddings / wavelength - s.low_freq_factor
            smooth = ratio / (s.high_freq_factor - s.low_freq_factor)
            factors.append(float(1 / ((1 - smooth) / s.factor + smooth)))
    return factors


def text_metadata(arch: Arch) -> list[tuple[str, str, Any]]:
    """(key, method of GGUFWriter, value) of the language model, without tokenizer and names."""
    t = arch.text
    return [
        ("vocab_size", "add_vocab_size", t.vocab_size),
        ("context_length", "add_context_length", t.max_position_embeddings),
        ("embedding_length", "add_embedding_length", t.hidden_size),
        ("block_count", "add_block_count", t.num_layers),
        ("feed_forward_length", "add_feed_forward_length", t.intermediate_size_mlp),
        ("attention.head_count", "add_head_count", t.num_heads),
        ("attention.head_count_kv", "add_head_count_kv", t.num_kv_heads),
        ("rope.freq_base", "add_rope_freq_base", t.rope_theta),
        ("attention.layer_norm_rms_epsilon", "add_layer_norm_rms_eps", t.rms_norm_eps),
        ("expert_count", "add_expert_count", t.num_experts),
        ("expert_used_count", "add_expert_used_count", t.experts_per_token),
        ("attention.key_length", "add_key_length", t.head_dim),
        ("attention.value_length", "add_value_length", t.head_dim),
        ("rope.dimension_count", "add_rope_dimension_count", t.head_dim),
        ("interleave_moe_layer_step", "add_interleave_moe_layer_step", t.moe_layers[0] + 1),
        ("expert_feed_forward_length", "add_expert_feed_forward_length", t.intermediate_size),
    ]


def vision_metadata(v: VisionArch, text_hidden: int, processor: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(method of GGUFWriter, value) of the vision tower and of `processor`, preprocessor_config.json's content.

    Raises CheckpointError for a mean or deviation that is not three numbers.
    """
    return [
        ("add_clip_has_vision_encoder", True),
        ("add_vision_projection_dim", text_hidden),
        ("add_vision_image_size", v.image_size),
        ("add_vision_patch_size", v.patch_size),
        ("add_vision_embedding_length", v.hidden_size),
        ("add_vision_feed_forward_length", v.intermediate_size),
        ("add_vision_block_count", v.num_layers),
        ("add_vision_head_count", v.num_heads),
        ("add_vision_image_mean", _per_channel(processor, "image_mean")),
        ("add_vision_image_std", _per_channel(processor, "image_std")),
        ("add_clip_projector_type", PROJECTOR),
        ("add_vision_attention_layernorm_eps", 1e-5),
        ("add_vision_projector_scale_factor", round(1 / v.pixel_shuffle_ratio)),
        ("add_vision_use_gelu", True),
    ]


def _per_channel(processor: Mapping[str, Any], name: str) -> list[float]:
    """Three numbers, for red, green and blue; Llama 4's 0.5 where the file has none."""
    values = processor.get(name, [0.5] * 3)
    if isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values):
        return [float(value) for value in values]
    raise CheckpointError(f"preprocessor_config.json: {name} {values!r} is not three numbers")


def arch_from_metadata(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None, factors: list[float] | None, dtype: str, where: str
) -> tuple[Arch, dict[str, Any]]:
    """Metadata of the model's file (and of its mmproj) → (Arch, config.json). Raises CheckpointError."""
    if text.get("general.architecture") != ARCH:
        raise CheckpointError(
            f"{where} holds architecture {text.get('general.architecture')!r}, not {ARCH!r}",
            hint="this tool reads Llama 4 checkpoints only",
        )
    if CONFIG_KEY in text:
        return _from_own_key(text, vision is not None, dtype, where)
    try:
        arch = Arch(_text(text, factors, where), None, dtype)
        if vision is not None:
            first = arch.text.vocab_size - NUM_SPECIAL
            arch = Arch(arch.text, _vision(vision), dtype, first + 80, first + 81, first + 92)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(
            f"{where}: metadata {error} is missing or wrong", hint="convert the model anew"
        ) from error
    config = hf_config(arch)
    return arch_from_config(config, where), config


def _from_own_key(text: Mapping[str, Any], has_vision: bool, dtype: str, where: str) -> tuple[Arch, dict[str, Any]]:
    try:
        config = json.loads(text[CONFIG_KEY])
        if not has_vision and "text_config" in config:
            inner = {key: value for key, value in config.items() if key in ("tie_word_embeddings",)}
            config = {**inner, **config["text_config"], "architectures": ["Llama4ForCausalLM"]}
        for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: {CONFIG_KEY} is not a config.json: {error}") from error
    return arch_from_config(config, f"{where}: {CONFIG_KEY}"), config


def _text(m: Mapping[str, Any], factors: list[float] | None, where: str) -> TextArch:
    def value(key: str) -> int:
        return int(m[f"{ARCH}.{key}"])

    layers, heads, experts = value("block_count"), value("attention.head_count"), value("expert_count")
    hidden, step = value("embedding_length"), value("interleave_moe_layer_step")
    if not 0 < layers <= MAX_LAYERS or not 0 < experts <= MAX_EXPERTS:
        raise ValueError(f"block_count {layers} or expert_count {experts}")
    head_dim = int(m.get(f"{ARCH}.attention.key_length", hidden // heads))
    theta = float(m[f"{ARCH}.rope.freq_base"])
    vocab = len(m["tokenizer.ggml.tokens"])
    first = vocab - NUM_SPECIAL
    return TextArch(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=value("expert_feed_forward_length"),
        intermediate_size_mlp=value("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv"),
        head_dim=head_dim,
        num_experts=experts,
        experts_per_token=value("expert_used_count"),
        moe_layers=tuple(range(step - 1, layers, step)),
        rope_layers=tuple((layer + 1) % FULL_EVERY != 0 for layer in range(layers)),
        attention_chunk_size=CHUNK,
        rope_theta=theta,
        rope_scaling=_scaling(theta, head_dim, factors, where),
        use_qk_norm=experts != NO_QK_NORM_EXPERTS,
        attn_temperature_tuning=True,
        floor_scale=FLOOR,
        attn_scale=SCALE,
        # metadata are float32: 9.999999747378752e-06 is meant as 1e-05
        rms_norm_eps=float(f"{float(m[f'{ARCH}.attention.layer_norm_rms_epsilon']):.6g}"),
        max_position_embeddings=value("context_length"),
        tie_word_embeddings=False,
        bos_token_id=int(m.get("tokenizer.ggml.bos_token_id", first)),
        eos_token_ids=(first + 1, first + 7, first + 8),
        pad_token_id=int(m.get("tokenizer.ggml.padding_token_id", first + 18)),
    )


def _scaling(theta: float, head_dim: int, factors: list[float] | None, where: str) -> RopeScaling | None:
    """The published scaling that gives these factors."""
    if factors is None:
        return None
    wanted = torch.tensor(factors, dtype=torch.float32)
    for known in SCALINGS if 2 * len(factors) == head_dim else ():
        scaling = RopeScaling(*known)
        if torch.allclose(torch.tensor(scaling_factors(theta, head_dim, scaling)), wanted, rtol=1e-5, atol=0):
            return scaling
    raise CheckpointError(
        f"{where}: its rope_freqs are those of no published Llama 4", hint="convert from the original checkpoint"
    )


def _vision(m: Mapping[str, Any]) -> VisionArch:
    if m.get("clip.projector_type") != PROJECTOR:
        raise ValueError(f"clip.projector_type {m.get('clip.projector_type')!r}")
    hidden, ratio = int(m["clip.vision.embedding_length"]), 1 / int(m["clip.vision.projector.scale_factor"])
    out = int(m["mm.model.mlp.2"])  # the reader's word for the rows of that tensor
    return VisionArch(
        hidden_size=hidden,
        intermediate_size=int(m["clip.vision.feed_forward_length"]),
        num_layers=int(m["clip.vision.block_count"]),
        num_heads=int(m["clip.vision.attention.head_count"]),
        num_channels=3,
        image_size=int(m["clip.vision.image_size"]),
        patch_size=int(m["clip.vision.patch_size"]),
        pixel_shuffle_ratio=ratio,
        projector_input_dim=out,
        projector_output_dim=out,
        output_dim=out,
        rope_theta=10000.0,
    )
