"""params.json ↔ Arch, as llama-models reads it (`models/llama4/args.py`, `model.py`, `moe.py`).

What the code fixes and the file does not say: RoPE scaling of factor 16, low and high 1, from 8192 positions, where
`use_scaled_rope` is set; a rope theta of 10000 in the vision tower; head_dim = dim / n_heads. What neither says (token
ids, the context length) is as Meta published it with the weights on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converters.fields import Fields
from l4tool.core.arch import Arch, RopeScaling, TextArch, VisionArch
from l4tool.core.errors import CheckpointError, UsageError

ORIGINAL_POSITIONS, LOW_FREQ_FACTOR, VISION_THETA = 8192, 1.0, 10000.0
DEFAULT_FACTOR, DEFAULT_HIGH = 16.0, 1.0
SCOUT_EXPERTS, SCOUT_POSITIONS, OTHER_POSITIONS = 16, 10485760, 1048576
# Special tokens by their place behind the base vocabulary (llama-models, `tokenizer.py`).
NUM_SPECIAL = 2048
BOS, EOS, PAD, IMAGE_START, IMAGE_END, PATCH = 0, (1, 7, 8), 18, 80, 81, 92
POSITIONS = "max_position_embeddings"  # our own key, ignored by Meta's code, where the length is another than published
KNOWN = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "ffn_exp", "norm_eps", "attention_chunk_size", "rope_theta", "use_scaled_rope", "rope_scaling_factor",
    "rope_high_freq_factor", "nope_layer_interval", "use_qk_norm", "attn_temperature_tuning", "floor_scale",
    "attn_scale", "vision_args", "moe_args", "quantization_args", "lora_args", "max_batch_size", "max_seq_len",
    POSITIONS,
)  # fmt: skip


def arch_from_params(params: Mapping[str, Any], where: str, dtype: str = "bfloat16") -> Arch:
    """params.json's object → Arch. `where` names the file in errors.

    `attn_temperature_tuning` is true where the file does not say it, as in the published config.json of these weights.
    Raises CheckpointError for a wrong or unknown field, and for what this tool would compute wrongly.
    """
    nested = params.get("model")
    f = Fields(dict(nested if isinstance(nested, dict) else params), where)
    unknown = sorted(set(f.values) - set(KNOWN))
    if unknown:
        raise CheckpointError(
            f"{where}: unknown field {unknown[0]!r}", hint="this may be another model than Llama 4, or a newer one"
        )
    for name in ("quantization_args", "lora_args"):
        if f.get(name) is not None:
            raise CheckpointError(f"{where}: {name} is not supported", hint="convert the unquantized checkpoint")
    text = _text(f)
    vision = f.child("vision_args")
    if vision is None:
        return Arch(text=text, vision=None, dtype=dtype)
    first = text.vocab_size - NUM_SPECIAL
    return Arch(text, _vision(vision), dtype, first + IMAGE_START, first + IMAGE_END, first + PATCH)


def _text(f: Fields) -> TextArch:
    dim, layers, heads = f.integer("dim"), f.integer("n_layers", high=512), f.integer("n_heads")
    kv_heads, vocab = f.integer("n_kv_heads", heads), f.integer("vocab_size", low=NUM_SPECIAL + 256)
    moe = f.child("moe_args")
    if moe is None:
        raise f.bad("moe_args", "an object: a Llama 4 has experts")
    if moe.integer("top_k", 1) != 1:
        raise moe.bad("top_k", "1")
    step, experts = moe.integer("interleave_moe_layer_step", 1, high=10_000), moe.integer("num_experts", high=1024)
    if dim % heads or f.integer("head_dim", dim // heads) != dim // heads or heads % kv_heads:
        raise f.bad("n_heads", f"a divisor of dim {dim} and a multiple of n_kv_heads {kv_heads}")
    interval = f.integer("nope_layer_interval", 0, low=0)
    positions = SCOUT_POSITIONS if experts == SCOUT_EXPERTS else OTHER_POSITIONS
    positions = f.integer(POSITIONS, positions)
    first = vocab - NUM_SPECIAL
    return TextArch(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=expert_size(f, moe, dim),
        intermediate_size_mlp=dense_size(f, dim),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        num_experts=experts,
        experts_per_token=1,
        moe_layers=tuple(range(step - 1, layers, step)),
        rope_layers=tuple(not interval or (layer + 1) % interval != 0 for layer in range(layers)),
        attention_chunk_size=f.integer("attention_chunk_size", positions),
        rope_theta=f.number("rope_theta", 500000.0),
        rope_scaling=_scaling(f),
        use_qk_norm=f.flag("use_qk_norm", False),
        attn_temperature_tuning=f.flag("attn_temperature_tuning", True),
        floor_scale=f.number("floor_scale", 8192.0),
        attn_scale=f.number("attn_scale", 0.1, above=-1e-9),
        rms_norm_eps=f.number("norm_eps", 1e-5, high=1.0),
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=first + BOS,
        eos_token_ids=tuple(first + eos for eos in EOS),
        pad_token_id=first + PAD,
    )


def _scaling(f: Fields) -> RopeScaling | None:
    if not f.flag("use_scaled_rope", False):
        return None
    factor, high = f.number("rope_scaling_factor", DEFAULT_FACTOR), f.number("rope_high_freq_factor", DEFAULT_HIGH)
    if high < LOW_FREQ_FACTOR:
        raise f.bad("rope_high_freq_factor", f"at least {LOW_FREQ_FACTOR:g}")
    return RopeScaling(factor, LOW_FREQ_FACTOR, high, ORIGINAL_POSITIONS)


def expert_size(f: Fields, moe: Fields, dim: int) -> int:
    """Hidden size of one expert: `MoE.__init__` in `moe.py`."""
    hidden = int(2 * int(f.number("ffn_exp") * dim) / 3)
    hidden = int(f.number("ffn_dim_multiplier") * hidden)
    if moe.flag("auto_scale_F", True):
        hidden = int(hidden / (moe.number("capacity_factor", 1.0) + 1))
    return hidden + -hidden % f.integer("multiple_of", 256)


def dense_size(f: Fields, dim: int) -> int:
    """Hidden size of a dense feed-forward: `TransformerBlock.__init__` in `model.py`."""
    hidden = int(2 * int(4 * dim) / 3)
    if f.get("ffn_dim_multiplier") is not None:
        hidden = int(f.number("ffn_dim_multiplier") * hidden)
    return hidden + -hidden % f.integer("multiple_of", 256)


def _vision(f: Fields) -> VisionArch:
    image, patch = _square(f, "image_size"), _square(f, "patch_size")
    dim, out, ratio = f.integer("dim"), f.integer("output_dim"), f.number("pixel_shuffle_ratio", high=1.0)
    inner = f.number("mlp_ratio") * dim
    shuffled = dim / ratio**2
    if not inner.is_integer() or shuffled != inner:
        raise f.bad("mlp_ratio", f"{1 / ratio**2:g}: the adapter reads dim / pixel_shuffle_ratio² values")
    return VisionArch(
        hidden_size=dim,
        intermediate_size=int(inner),
        num_layers=f.integer("n_layers", high=512),
        num_heads=f.integer("n_heads"),
        num_channels=3,
        image_size=image,
        patch_size=patch,
        pixel_shuffle_ratio=ratio,
        projector_input_dim=out,
        projector_output_dim=out,
        output_dim=out,
        rope_theta=VISION_THETA,
    )


def _square(f: Fields, name: str) -> int:
    """{"height": 336, "width": 336} → 336."""
    size = f.child(name)
    if size is None:
        raise f.bad(name, "an object with height and width")
    height: int = size.integer("height", high=100_000)
    if height != size.integer("width", high=100_000):
        raise f.bad(name, "a square")
    return height


def params_from_arch(arch: Arch) -> dict[str, Any]:
    """params.json's object, of which llama-models builds the same model.

    Raises UsageError for what Meta's code fixes otherwise: it would load the weights and compute something else.
    """
    t = arch.text
    _require_expressible(arch)
    interval = t.rope_layers.index(False) + 1 if False in t.rope_layers else None
    params: dict[str, Any] = {
        "dim": t.hidden_size, "n_layers": t.num_layers, "n_heads": t.num_heads, "n_kv_heads": t.num_kv_heads,
        "vocab_size": t.vocab_size, **_feed_forward(t), "norm_eps": t.rms_norm_eps,
        "attention_chunk_size": t.attention_chunk_size, "rope_theta": t.rope_theta,
        "use_scaled_rope": t.rope_scaling is not None, "nope_layer_interval": interval, "use_qk_norm": t.use_qk_norm,
        "attn_temperature_tuning": t.attn_temperature_tuning, "floor_scale": t.floor_scale,
        "attn_scale": t.attn_scale,
    }  # fmt: skip
    if t.rope_scaling is not None:
        params |= {
            "rope_scaling_factor": t.rope_scaling.factor, "rope_high_freq_factor": t.rope_scaling.high_freq_factor
        }  # fmt: skip
    if t.max_position_embeddings != (SCOUT_POSITIONS if t.num_experts == SCOUT_EXPERTS else OTHER_POSITIONS):
        params[POSITIONS] = t.max_position_embeddings
    if arch.vision is not None:
        params["vision_args"] = _vision_args(arch.vision)
    return params


def _require_expressible(arch: Arch) -> None:
    t, v = arch.text, arch.vision
    step = t.moe_layers[0] + 1 if t.moe_layers else 0
    scaling = t.rope_scaling
    fixed = {
        "head_dim": t.head_dim * t.num_heads == t.hidden_size,
        "the layers without rope": t.rope_layers == _every(t, False),
        "the MoE layers": step > 0 and t.moe_layers == tuple(range(step - 1, t.num_layers, step)),
        "rope scaling": scaling is None
        or (scaling.low_freq_factor, scaling.original_max_position_embeddings) == (LOW_FREQ_FACTOR, ORIGINAL_POSITIONS),
        "the vision tower's rope theta": v is None or v.rope_theta == VISION_THETA,
    }
    for what, fits in fixed.items():
        if not fits:
            raise UsageError(
                f"Meta's code fixes {what} to other values than this checkpoint has: it would compute something else",
                hint="use --to hf",
            )


def _every(t: TextArch, rope: bool) -> tuple[bool, ...]:
    """The pattern in which each n-th layer has no rope, n from the first of them."""
    interval = t.rope_layers.index(rope) + 1 if rope in t.rope_layers else 0
    return tuple(not interval or (layer + 1) % interval != 0 for layer in range(t.num_layers))


def _feed_forward(t: TextArch) -> dict[str, Any]:
    """Fields that make `expert_size` and `dense_size` come out right; the published ones where they do."""
    dense = None if len(t.moe_layers) == t.num_layers else t.intermediate_size_mlp
    moe = {"num_experts": t.num_experts, "top_k": 1, "interleave_moe_layer_step": t.moe_layers[0] + 1}
    published = {
        "ffn_exp": 4, "ffn_dim_multiplier": 1.2, "multiple_of": 2048,
        "moe_args": moe | {"capacity_factor": 1.0, "auto_scale_F": True},
    }  # fmt: skip
    multiple = math.gcd(t.intermediate_size, dense or t.intermediate_size)
    # half a multiple below the size wanted: both formulas truncate a few times, then round up
    by_dense = ((dense or t.intermediate_size) - multiple / 2) / (8 * t.hidden_size / 3)
    by_expert = 3 * (t.intermediate_size - multiple / 2) / (2 * t.hidden_size * by_dense)
    computed = {
        "ffn_exp": by_expert, "ffn_dim_multiplier": by_dense, "multiple_of": multiple,
        "moe_args": moe | {"capacity_factor": 1.0, "auto_scale_F": False},
    }  # fmt: skip
    for fields in (published, computed):
        f = Fields(fields, "params.json")
        inner = f.child("moe_args")
        assert inner is not None
        sizes = (expert_size(f, inner, t.hidden_size), dense_size(f, t.hidden_size))
        if sizes[0] == t.intermediate_size and dense in (None, sizes[1]):
            return fields
    raise UsageError(
        f"params.json cannot say intermediate sizes {t.intermediate_size} and {t.intermediate_size_mlp}",
        hint="use --to hf",
    )


def _vision_args(v: VisionArch) -> dict[str, Any]:
    return {
        "image_size": {"height": v.image_size, "width": v.image_size},
        "patch_size": {"height": v.patch_size, "width": v.patch_size},
        "dim": v.hidden_size, "n_layers": v.num_layers, "n_heads": v.num_heads,
        "mlp_ratio": v.intermediate_size / v.hidden_size, "output_dim": v.output_dim,
        "pixel_shuffle_ratio": v.pixel_shuffle_ratio,
    }  # fmt: skip
