"""config.json of the published Scout and Maverick, in the style they were published in."""

from __future__ import annotations

import copy
from typing import Any

_VISION = {
    "_attn_implementation_autoset": True, "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408,
    "image_size": 336, "initializer_range": 0.02, "intermediate_size": 5632, "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False, "norm_eps": 1e-05, "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0,
    "projector_input_dim": 4096, "projector_output_dim": 4096, "rope_theta": 10000, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default", "vision_output_dim": 4096,
}  # fmt: skip
_TEXT = {
    "_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192,
    "attention_dropout": 0.0, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1,
    "num_hidden_layers": 48, "num_key_value_heads": 8, "output_router_logits": False, "pad_token_id": 200018,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 202048,
}  # fmt: skip
_SCOUT_TEXT = {
    "attn_temperature_tuning": 4, "interleave_moe_layer_step": 1, "max_position_embeddings": 10485760,
    "num_local_experts": 16, "use_qk_norm": True,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
_MAVERICK_TEXT = {
    "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192, "interleave_moe_layer_step": 2,
    "max_position_embeddings": 1048576, "num_local_experts": 128, "rope_scaling": None, "use_qk_norm": False,
}  # fmt: skip


def _multimodal(text: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080,
            "eoi_token_index": 200081, "image_token_index": 200092, "model_type": "llama4",
            "text_config": _TEXT | text, "torch_dtype": "bfloat16", "transformers_version": "4.51.0.dev0",
            "vision_config": _VISION,
        }
    )  # fmt: skip


def scout() -> dict[str, Any]:
    return _multimodal(_SCOUT_TEXT)


def maverick() -> dict[str, Any]:
    return _multimodal(_MAVERICK_TEXT)


def new_style(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    config = copy.deepcopy(config)
    text, vision = config["text_config"], config["vision_config"]
    scaling = text.pop("rope_scaling") or {"rope_type": "default"}
    text["rope_parameters"] = scaling | {"rope_theta": text.pop("rope_theta")}
    vision["rope_parameters"] = {"rope_type": "default", "rope_theta": float(vision.pop("rope_theta"))}
    layers, step = text["num_hidden_layers"], text["interleave_moe_layer_step"]
    text["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    text["layer_types"] = ["chunked_attention" if rope else "full_attention" for rope in text["no_rope_layers"]]
    text["moe_layers"] = list(range(step - 1, layers, step))
    text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    for part in (config, text):
        part["dtype"] = part.pop("torch_dtype")
    return config
