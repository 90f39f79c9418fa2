"""llama.cpp's names for Llama 4 (GGUF architecture `llama4`), and for its vision tower (`clip`, projector `llama4`).

Shapes are the reverse of what GGUF's headers list: [rows, cols] with cols contiguous, experts [E, out, in]. Q and K are
not permuted. Checked against what llama.cpp's converter writes and its loaders (`src/models/llama4.cpp`,
`tools/mtmd/clip.cpp`) ask for.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.names import EMBEDDING, LM_HEAD, Part, Row
from l4tool.core.arch import TextArch, VisionArch

GGUF = "gguf"
ROPE_FREQS = "rope_freqs.weight"
TEXT, VISION = "language_model.model.", "vision_model."
# Always float32: what llama.cpp adds, multiplies by or routes with, one value at a time.
ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")


def is_always_f32(row: Row) -> bool:
    return len(row.shape) < 2 or row.stored.endswith(ALWAYS_F32)


def text_rows(t: TextArch) -> list[Row]:
    """The language model's tensors, in the order of the layers."""
    return list(_text(t))


def vision_rows(v: VisionArch, text_hidden: int) -> list[Row]:
    """The vision tower's, for a file of its own (`mmproj`)."""
    return list(_vision(v, text_hidden))


def _whole(stored: str, name: str, *shape: int) -> Row:
    return Row(stored, shape, (Part(name, shape),))


def _text(t: TextArch) -> Iterator[Row]:
    hidden = t.hidden_size
    yield _whole("token_embd.weight", EMBEDDING, t.vocab_size, hidden)
    for layer in range(t.num_layers):
        ours, theirs = f"{TEXT}layers.{layer}.", f"blk.{layer}."
        q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
        yield _whole(theirs + "attn_norm.weight", ours + "input_layernorm.weight", hidden)
        yield _whole(theirs + "attn_q.weight", ours + "self_attn.q_proj.weight", q, hidden)
        yield _whole(theirs + "attn_k.weight", ours + "self_attn.k_proj.weight", kv, hidden)
        yield _whole(theirs + "attn_v.weight", ours + "self_attn.v_proj.weight", kv, hidden)
        yield _whole(theirs + "attn_output.weight", ours + "self_attn.o_proj.weight", hidden, q)
        yield _whole(theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight", hidden)
        if t.is_moe(layer):
            yield from _moe(t, theirs, ours + "feed_forward.")
        else:
            yield from _mlp(theirs, "", ours + "feed_forward.", t.intermediate_size_mlp, hidden)
    yield _whole("output_norm.weight", TEXT + "norm.weight", hidden)
    if not t.tie_word_embeddings:  # llama.cpp then takes the embedding
        yield _whole("output.weight", LM_HEAD, t.vocab_size, hidden)


def _mlp(theirs: str, suffix: str, ours: str, inner: int, hidden: int) -> Iterator[Row]:
    yield _whole(f"{theirs}ffn_gate{suffix}.weight", ours + "gate_proj.weight", inner, hidden)
    yield _whole(f"{theirs}ffn_up{suffix}.weight", ours + "up_proj.weight", inner, hidden)
    yield _whole(f"{theirs}ffn_down{suffix}.weight", ours + "down_proj.weight", hidden, inner)


def _moe(t: TextArch, theirs: str, ours: str) -> Iterator[Row]:
    hidden, inner, experts = t.hidden_size, t.intermediate_size, t.num_experts
    yield _whole(theirs + "ffn_gate_inp.weight", ours + "router.weight", experts, hidden)
    for projection, out, cols in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        parts = tuple(
            Part(f"{ours}experts.{e}.{projection}_proj.weight", (out, cols), row=e * out) for e in range(experts)
        )
        yield Row(f"{theirs}ffn_{projection}_exps.weight", (experts, out, cols), parts)
    yield from _mlp(theirs, "_shexp", ours + "shared_expert.", inner, hidden)


def _vision(v: VisionArch, text_hidden: int) -> Iterator[Row]:
    hidden, inner = v.hidden_size, v.intermediate_size
    yield _whole("v.class_embd", VISION + "class_embedding", hidden)
    positions = v.patches_per_side**2 + 1
    yield _whole("v.position_embd.weight", VISION + "positional_embedding_vlm", positions, hidden)
    patch = v.num_channels * v.patch_size**2
    yield _whole("v.patch_embd.weight", VISION + "patch_embedding.linear.weight", hidden, patch)
    for stored, name in (("pre_ln", "layernorm_pre"), ("post_ln", "layernorm_post")):
        yield from _biased(f"v.{stored}", VISION + name, hidden)
    for layer in range(v.num_layers):
        ours, theirs = f"{VISION}model.layers.{layer}.", f"v.blk.{layer}."
        yield from _biased(theirs + "ln1", ours + "input_layernorm", hidden)
        for stored, name in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_out", "o_proj")):
            yield from _biased(theirs + stored, f"{ours}self_attn.{name}", hidden, hidden)
        yield from _biased(theirs + "ln2", ours + "post_attention_layernorm", hidden)
        yield from _biased(theirs + "ffn_up", ours + "mlp.fc1", inner, hidden)
        yield from _biased(theirs + "ffn_down", ours + "mlp.fc2", hidden, inner)
    adapter = VISION + "vision_adapter.mlp."
    yield _whole("mm.model.mlp.1.weight", adapter + "fc1.weight", v.projector_input_dim, inner)
    yield _whole("mm.model.mlp.2.weight", adapter + "fc2.weight", v.projector_output_dim, v.projector_output_dim)
    yield _whole("mm.model.fc.weight", "multi_modal_projector.linear_1.weight", text_hidden, v.output_dim)


def _biased(stored: str, module: str, *shape: int) -> Iterator[Row]:
    yield _whole(stored + ".weight", module + ".weight", *shape)
    yield _whole(stored + ".bias", module + ".bias", shape[0])
