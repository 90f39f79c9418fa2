"""config.json → Arch: old style (`rope_scaling`, `no_rope_layers: []`) and transformers-5 style (`rope_parameters`).

Defaults are those of transformers' `configuration_llama4.py`. Every value is checked; anything this tool would
compute wrongly is one CheckpointError that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.fields import Fields, read_json_object
from l4tool.core.arch import Arch, RopeScaling, TextArch, VisionArch

DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS, MAX_EXPERTS = 512, 1024  # beyond any Llama 4; a larger name table would only eat memory
MULTIMODAL, TEXT_ONLY = "llama4", "llama4_text"
SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_arch(folder: Path) -> tuple[Arch, dict[str, Any]]:
    """A checkpoint folder's Arch and its raw config.json; stop ids of generation_config.json are merged in."""
    path = folder / "config.json"
    config = read_json_object(path)
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.exists() else None
    return arch_from_config(config, str(path), generation), config


def arch_from_config(config: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None) -> Arch:
    """config.json's object → Arch. `where` names the file in errors; `generation` is generation_config.json's object.

    Raises CheckpointError for a wrong type, a value out of range, fields that contradict each other, or an
    architecture that is not Llama 4.
    """
    top = Fields(config if isinstance(config, dict) else dict(config) if isinstance(config, Mapping) else config, where)
    kind = top.string("model_type")
    if kind not in (MULTIMODAL, TEXT_ONLY):
        raise top.bad("model_type", "'llama4' or 'llama4_text'", hint="this tool reads Llama 4 checkpoints only")
    text_fields = top.child("text_config") if kind == MULTIMODAL else top
    vision_fields = top.child("vision_config") if kind == MULTIMODAL else None
    if text_fields is None or (kind == MULTIMODAL and vision_fields is None):
        raise top.bad("text_config" if text_fields is None else "vision_config", "an object")
    text = _text_arch(text_fields, top, generation)
    if vision_fields is None:
        return Arch(text=text, vision=None, dtype=_dtype(top, text_fields))
    last = text.vocab_size - 1
    return Arch(
        text=text,
        vision=_vision_arch(vision_fields),
        dtype=_dtype(top, text_fields),
        boi_token_id=_token(top, "boi_token", 200080, last),
        eoi_token_id=_token(top, "eoi_token", 200081, last),
        image_token_id=_token(top, "image_token", 200092, last),
    )


def _token(top: Fields, name: str, default: int, last: int) -> int:
    """transformers writes `boi_token_index`, and also accepts `boi_token_id`."""
    key = f"{name}_id" if top.get(f"{name}_id") is not None else f"{name}_index"
    value: int = top.integer(key, default, low=0, high=last)
    if value > last:
        raise top.bad(key, f"a token id below vocab_size {last + 1}")
    return value


def _dtype(top: Fields, text: Fields) -> str:
    for fields in (top, text):
        for key in ("dtype", "torch_dtype"):
            if fields.get(key) is None:
                continue
            value = fields.string(key)
            if value not in DTYPES:
                raise fields.bad(key, "bfloat16, float16 or float32")
            return value
    return "bfloat16"


def _text_arch(f: Fields, top: Fields, generation: Mapping[str, Any] | None) -> TextArch:
    _refuse_unsupported(f)
    num_layers = f.integer("num_hidden_layers", 48, high=MAX_LAYERS)
    num_heads = f.integer("num_attention_heads", 40)
    num_kv_heads = f.integer("num_key_value_heads", 8 if "num_key_value_heads" not in f.values else num_heads)
    if num_heads % num_kv_heads:
        raise f.bad("num_attention_heads", f"a multiple of num_key_value_heads {num_kv_heads}")
    hidden_size = f.integer("hidden_size", 5120)
    head_dim = f.integer("head_dim", 128 if "head_dim" not in f.values else max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise f.bad("head_dim", "even")
    vocab_size = f.integer("vocab_size", 202048)
    theta, scaling = _rope(f, 500000.0)
    max_positions = f.integer("max_position_embeddings", 4096 * 32)
    tie_from = f if f.get("tie_word_embeddings") is not None else top
    pad_id = f.integer("pad_token_id", None, low=-1, high=vocab_size - 1)
    return TextArch(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=f.integer("intermediate_size", 8192),
        intermediate_size_mlp=f.integer("intermediate_size_mlp", 16384),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=f.integer("num_local_experts", 16, high=MAX_EXPERTS),
        experts_per_token=f.integer("num_experts_per_tok", 1),
        moe_layers=_moe_layers(f, num_layers),
        rope_layers=_rope_layers(f, num_layers),
        attention_chunk_size=f.integer(
            "attention_chunk_size", max_positions if "attention_chunk_size" in f.values else 8192
        ),
        rope_theta=theta,
        rope_scaling=scaling,
        use_qk_norm=f.flag("use_qk_norm", True),
        attn_temperature_tuning=f.flag("attn_temperature_tuning", True),
        floor_scale=f.number("floor_scale", 8192.0),
        attn_scale=f.number("attn_scale", 0.1, above=-1e-9),
        rms_norm_eps=f.number("rms_norm_eps", 1e-5, high=1.0),
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_from.flag("tie_word_embeddings", False),
        bos_token_id=_bos(f, vocab_size),
        eos_token_ids=_eos(f, top, generation, vocab_size),
        pad_token_id=None if pad_id is None or pad_id < 0 else pad_id,
    )


def _refuse_unsupported(f: Fields) -> None:
    f.only("hidden_act", ["silu"], "silu", "the experts compute SwiGLU")
    f.only("attention_bias", [False], False, "Llama 4 attention has no biases")
    f.only("num_experts_per_tok", [1], 1, "Llama 4 routes each token to one expert")


def _bos(f: Fields, vocab_size: int) -> int | None:
    if "bos_token_id" in f.values and f.get("bos_token_id") is None:
        return None
    return f.integer("bos_token_id", 1, low=0, high=vocab_size - 1)


def _eos(f: Fields, top: Fields, generation: Mapping[str, Any] | None, vocab_size: int) -> tuple[int, ...]:
    """Stop ids: the text config's, then the top level's, then generation_config.json's, each once."""
    ids = f.ids("eos_token_id", vocab_size - 1) + top.ids("eos_token_id", vocab_size - 1)
    if "eos_token_id" not in f.values and not ids:
        ids = [2] if vocab_size > 2 else []
    if generation is not None:
        ids += Fields(generation, f"{top.where} (generation_config.json)").ids("eos_token_id", vocab_size - 1)
    return tuple(dict.fromkeys(ids))


def _moe_layers(f: Fields, num_layers: int) -> tuple[int, ...]:
    step = f.integer("interleave_moe_layer_step", 1, high=10_000)
    given = f.integers("moe_layers", high=num_layers - 1)
    if given is None:
        return tuple(range(step - 1, num_layers, step))
    if len(set(given)) != len(given):
        raise f.bad("moe_layers", "a list in which no layer occurs twice")
    return tuple(sorted(given))


def _rope_layers(f: Fields, num_layers: int) -> tuple[bool, ...]:
    """`no_rope_layers[i]` is 1 where the layer HAS rope; [] (old configs) means each 4th or so has not."""
    interval = f.integer("no_rope_layer_interval", 4)
    flags = f.integers("no_rope_layers", high=1)
    if not flags:
        layers = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    elif len(flags) < num_layers:
        raise f.bad("no_rope_layers", f"a list of at least {num_layers} entries, one for each layer")
    else:
        layers = tuple(bool(flag) for flag in flags[:num_layers])
    types = f.get("layer_types")
    expected = ["chunked_attention" if rope else "full_attention" for rope in layers]
    if types is not None and (not isinstance(types, list) or types[:num_layers] != expected):
        raise f.bad("layer_types", "chunked_attention on the rope layers and full_attention on the others")
    return layers


def _rope(f: Fields, default_theta: float) -> tuple[float, RopeScaling | None]:
    """rope theta and llama3 scaling out of `rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    new, old = f.child("rope_parameters"), f.child("rope_scaling")
    rope = new or old
    theta_from = new if new is not None and new.get("rope_theta") is not None else f
    theta = theta_from.number("rope_theta", default_theta)
    if rope is None or not rope.values:
        return theta, None
    kind = rope.string("rope_type") or rope.string("type")
    if kind == "default" or (kind is None and not any(key in rope.values for key in SCALING_KEYS)):
        return theta, None
    if kind != "llama3":
        raise rope.bad("rope_type", "'llama3' or 'default'")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low > high:
        raise rope.bad("low_freq_factor", f"at most high_freq_factor {high:g}")
    original = rope.integer("original_max_position_embeddings")
    return theta, RopeScaling(rope.number("factor"), low, high, original)


def _side(f: Fields, name: str, default: int) -> int:
    """Pixels per side; transformers also allows [side, side]."""
    sides = f.get(name, default)
    if isinstance(sides, list):
        if len(sides) != 2 or sides[0] != sides[1]:
            raise f.bad(name, "an integer, or twice the same integer")
        f = Fields({name: sides[0]}, f.where)
    return f.integer(name, default, high=100_000)


def _vision_arch(f: Fields) -> VisionArch:
    f.only("hidden_act", ["gelu"], "gelu", "the vision tower computes exact GELU")
    f.only("vision_feature_select_strategy", ["default"], "default", "the class token is always dropped")
    f.only("multi_modal_projector_bias", [False], False, "the projector has no bias")
    theta, scaling = _rope(f, 10000.0)
    if scaling is not None:
        raise f.bad("rope_parameters", "without scaling")
    arch = VisionArch(
        hidden_size=f.integer("hidden_size", 768),
        intermediate_size=f.integer("intermediate_size", 5632),
        num_layers=f.integer("num_hidden_layers", 34, high=MAX_LAYERS),
        num_heads=f.integer("num_attention_heads", 16),
        num_channels=f.integer("num_channels", 3, high=3),
        image_size=_side(f, "image_size", 448),
        patch_size=_side(f, "patch_size", 14),
        pixel_shuffle_ratio=f.number("pixel_shuffle_ratio", 0.5, high=1.0),
        projector_input_dim=f.integer("projector_input_dim", 4096),
        projector_output_dim=f.integer("projector_output_dim", 4096),
        output_dim=f.integer("vision_output_dim", 7680),
        rope_theta=theta,
    )
    _check_vision(f, arch)
    return arch


def _check_vision(f: Fields, arch: VisionArch) -> None:
    """The sizes that must agree for the tower's own matrix products."""
    if arch.hidden_size % (4 * arch.num_heads):
        raise f.bad("hidden_size", "a multiple of 4 · num_attention_heads (2-D rope)")
    if arch.image_size % arch.patch_size:
        raise f.bad("image_size", f"a multiple of patch_size {arch.patch_size}")
    if not (arch.patches_per_side * arch.pixel_shuffle_ratio).is_integer() or arch.tokens_per_tile < 1:
        raise f.bad("pixel_shuffle_ratio", f"a ratio that divides {arch.patches_per_side} patches per side evenly")
    shuffled = arch.hidden_size / arch.pixel_shuffle_ratio**2
    if shuffled != arch.intermediate_size:
        raise f.bad("intermediate_size", f"hidden_size / pixel_shuffle_ratio² = {shuffled:g}, the adapter's input")
    if arch.projector_input_dim != arch.projector_output_dim:
        raise f.bad("projector_input_dim", f"projector_output_dim {arch.projector_output_dim}")
    if arch.output_dim != arch.projector_output_dim:
        raise f.bad("vision_output_dim", f"projector_output_dim {arch.projector_output_dim}")
