"""Arch → config.json, for checkpoints whose layout says the same in other words."""

from __future__ import annotations

from typing import Any

from l4tool.core.arch import Arch, TextArch, VisionArch


def hf_config(arch: Arch) -> dict[str, Any]:
    """config.json in the style of transformers 5; `arch_io.arch_from_config` of it is `arch` again."""
    text = _text(arch.text) | {"dtype": arch.dtype}
    if arch.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": arch.dtype,
        "boi_token_index": arch.boi_token_id, "eoi_token_index": arch.eoi_token_id,
        "image_token_index": arch.image_token_id, "tie_word_embeddings": arch.text.tie_word_embeddings,
        "text_config": text, "vision_config": _vision(arch.vision),
    }  # fmt: skip


def _text(t: TextArch) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": t.rope_theta}
    if t.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3", "factor": t.rope_scaling.factor,
            "low_freq_factor": t.rope_scaling.low_freq_factor, "high_freq_factor": t.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": t.rope_scaling.original_max_position_embeddings,
        }  # fmt: skip
    step = (t.moe_layers[0] + 1) if t.moe_layers else 1
    return {
        "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": t.attention_chunk_size,
        "attention_dropout": 0.0, "attn_scale": t.attn_scale, "attn_temperature_tuning": t.attn_temperature_tuning,
        "bos_token_id": t.bos_token_id, "eos_token_id": list(t.eos_token_ids), "floor_scale": t.floor_scale,
        "head_dim": t.head_dim, "hidden_act": "silu", "hidden_size": t.hidden_size, "initializer_range": 0.02,
        "interleave_moe_layer_step": step, "intermediate_size": t.intermediate_size,
        "intermediate_size_mlp": t.intermediate_size_mlp,
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in t.rope_layers],
        "max_position_embeddings": t.max_position_embeddings, "moe_layers": list(t.moe_layers),
        "no_rope_layers": [int(rope) for rope in t.rope_layers], "num_attention_heads": t.num_heads,
        "num_experts_per_tok": t.experts_per_token, "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.num_kv_heads, "num_local_experts": t.num_experts, "output_router_logits": False,
        "pad_token_id": t.pad_token_id, "rms_norm_eps": t.rms_norm_eps, "rope_parameters": rope,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "tie_word_embeddings": t.tie_word_embeddings,
        "use_cache": True, "use_qk_norm": t.use_qk_norm, "vocab_size": t.vocab_size,
    }  # fmt: skip


def _vision(v: VisionArch) -> dict[str, Any]:
    return {
        "model_type": "llama4_vision_model", "attention_dropout": 0.0, "hidden_act": "gelu",
        "hidden_size": v.hidden_size, "image_size": v.image_size, "initializer_range": 0.02,
        "intermediate_size": v.intermediate_size, "multi_modal_projector_bias": False, "norm_eps": 1e-05,
        "num_attention_heads": v.num_heads, "num_channels": v.num_channels, "num_hidden_layers": v.num_layers,
        "patch_size": v.patch_size, "pixel_shuffle_ratio": v.pixel_shuffle_ratio, "projector_dropout": 0.0,
        "projector_input_dim": v.projector_input_dim, "projector_output_dim": v.projector_output_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": v.rope_theta}, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "vision_output_dim": v.output_dim,
    }  # fmt: skip
