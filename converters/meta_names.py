"""Meta's own names: tensor-parallel files, one for each rank, each with its slice of every matrix.

Checked against the modules and load hooks of llama-models (`models/llama4/{model,moe,ffn}.py`, `vision/`): which of
fairscale's parallel layers a weight belongs to says along which dimension it is cut. Sizes as in `l4tool/core/arch.py`;
n is the number of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from converters.names import EMBEDDING, LM_HEAD, Part, Row
from l4tool.core.arch import Arch, TextArch, VisionArch
from l4tool.core.errors import UsageError

META = "meta"
TEXT = "language_model.model."
VISION = "vision_embeddings.vision_encoder."
# Not weights: statistics and caches of training, and transformer-engine's state (an io.BytesIO).
DROPPED = re.compile(
    r"rope\.freqs|freqs_cis|layers\.\d+\.feed_forward\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)|.*\._extra_state"
)


def is_dropped(name: str) -> bool:
    """True for an entry of a file that no converted checkpoint needs."""
    return DROPPED.fullmatch(name) is not None


def file_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def meta_rows(arch: Arch, ranks: int) -> list[list[Row]]:
    """For each rank the rows of its file. Raises UsageError where `ranks` does not divide what is cut."""
    _require_divisible(arch, ranks)
    return [[*_text(arch.text, _Cut(rank, ranks)), *_vision(arch, _Cut(rank, ranks))] for rank in range(ranks)]


class _Cut:
    """One rank's slices."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def span(self, size: int) -> tuple[int, int] | None:
        """This rank's share of a dimension; None for all of it."""
        share = size // self.ranks
        return None if self.ranks == 1 else (self.rank * share, (self.rank + 1) * share)

    def whole(self, stored: str, name: str, *shape: int) -> Row:
        """The same in every file."""
        return Row(stored, shape, (Part(name, shape),))

    def by_rows(self, stored: str, name: str, *shape: int) -> Row:
        """ColumnParallelLinear, VocabParallelEmbedding: dimension 0 of [out, in] (or of a bias [out]) is cut."""
        return Row(stored, (shape[0] // self.ranks, *shape[1:]), (Part(name, shape, rows=self.span(shape[0])),))

    def by_cols(self, stored: str, name: str, out: int, inner: int) -> Row:
        """RowParallelLinear: dimension 1 of [out, in] is cut."""
        part = Part(name, (out, inner), cols=self.span(inner))
        return Row(stored, (out, inner // self.ranks), (part,))

    def stacked(self, stored: str, *named: tuple[str, int, int]) -> Row:
        """Several [out, in], each cut along dimension 0, one below the other."""
        parts, row = [], 0
        for name, out, inner in named:
            parts.append(Part(name, (out, inner), row=row, rows=self.span(out)))
            row += out // self.ranks
        return Row(stored, (row, named[0][2]), tuple(parts))


def _text(t: TextArch, cut: _Cut) -> Iterator[Row]:
    hidden = t.hidden_size
    yield cut.by_rows("tok_embeddings.weight", EMBEDDING, t.vocab_size, hidden)
    for layer in range(t.num_layers):
        ours, theirs = f"{TEXT}layers.{layer}.", f"layers.{layer}."
        q, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
        yield cut.stacked(
            theirs + "attention.wqkv.weight",  # [(q + 2 kv) / n, H]: each rank's q, k, v
            (ours + "self_attn.q_proj.weight", q, hidden),
            (ours + "self_attn.k_proj.weight", kv, hidden),
            (ours + "self_attn.v_proj.weight", kv, hidden),
        )
        yield cut.by_cols(theirs + "attention.wo.weight", ours + "self_attn.o_proj.weight", hidden, q)
        yield cut.whole(theirs + "attention.wqkv.layer_norm_weight", ours + "input_layernorm.weight", hidden)
        moe = t.is_moe(layer)
        norm = "feed_forward.norm.weight" if moe else "feed_forward.mlp.layer_norm_weight"
        yield cut.whole(theirs + norm, ours + "post_attention_layernorm.weight", hidden)
        block = _moe if moe else _dense
        yield from block(t, theirs + "feed_forward.", ours + "feed_forward.", cut)
    yield cut.whole("norm.weight", TEXT + "norm.weight", hidden)
    yield cut.by_rows("output.weight", LM_HEAD, t.vocab_size, hidden)


def _dense(t: TextArch, theirs: str, ours: str, cut: _Cut) -> Iterator[Row]:
    inner, hidden = t.intermediate_size_mlp, t.hidden_size
    gate, up = (ours + "gate_proj.weight", inner, hidden), (ours + "up_proj.weight", inner, hidden)
    yield cut.stacked(theirs + "mlp.fc1_weight", gate, up)  # [2M / n, H]
    yield cut.by_cols(theirs + "mlp.fc2_weight", ours + "down_proj.weight", hidden, inner)  # [H, M / n]


def _moe(t: TextArch, theirs: str, ours: str, cut: _Cut) -> Iterator[Row]:
    """Routed experts are stored [in, out], one below the other, the inner dimension F = I cut."""
    hidden, inner, experts = t.hidden_size, t.intermediate_size, t.num_experts
    share, span = inner // cut.ranks, cut.span(inner)
    for stored, projection in (("moe_w_in_eD_F", "gate_proj"), ("moe_w_swiglu_eD_F", "up_proj")):
        parts = tuple(
            Part(f"{ours}experts.{e}.{projection}.weight", (inner, hidden), e * hidden, 0, True, rows=span)
            for e in range(experts)
        )
        yield Row(f"{theirs}experts.{stored}", (experts * hidden, share), parts)  # [E·D, F/n]
    parts = tuple(
        Part(f"{ours}experts.{e}.down_proj.weight", (hidden, inner), e * share, 0, True, cols=span)
        for e in range(experts)
    )
    yield Row(f"{theirs}experts.moe_w_out_eF_D", (experts * share, hidden), parts)  # [E·F/n, D]
    router = Part(ours + "router.weight", (experts, hidden), transposed=True)
    yield Row(theirs + "router_DE", (hidden, experts), (router,))
    shared = ours + "shared_expert."
    yield cut.by_rows(theirs + "w_in_shared_FD.weight", shared + "gate_proj.weight", inner, hidden)
    yield cut.by_rows(theirs + "w_swiglu_FD.weight", shared + "up_proj.weight", inner, hidden)
    yield cut.by_cols(theirs + "w_out_shared_DF.weight", shared + "down_proj.weight", hidden, inner)


def _vision(arch: Arch, cut: _Cut) -> Iterator[Row]:
    v = arch.vision
    if v is None:
        return
    hidden, ours = v.hidden_size, "vision_model."
    yield cut.whole(VISION + "class_embedding", ours + "class_embedding", hidden)
    positions = v.patches_per_side**2 + 1
    yield cut.whole(VISION + "positional_embedding_vlm", ours + "positional_embedding_vlm", positions, hidden)
    patch = v.num_channels * v.patch_size**2
    yield cut.by_rows(VISION + "conv1._linear.weight", ours + "patch_embedding.linear.weight", hidden, patch)
    for stored, name in (("ln_pre", "layernorm_pre"), ("ln_post", "layernorm_post")):
        for kind in ("weight", "bias"):
            yield cut.whole(f"{VISION}{stored}.{kind}", f"{ours}{name}.{kind}", hidden)
    for layer in range(v.num_layers):
        yield from _vision_layer(v, f"{VISION}transformer.resblocks.{layer}.", f"{ours}model.layers.{layer}.", cut)
    adapter, theirs = ours + "vision_adapter.mlp.", "vision_embeddings.vision_adapter.mlp."
    yield cut.by_rows(theirs + "c_fc.weight", adapter + "fc1.weight", v.projector_input_dim, v.intermediate_size)
    out = v.projector_output_dim
    yield cut.by_cols(theirs + "c_proj.weight", adapter + "fc2.weight", out, out)
    projector = "multi_modal_projector.linear_1.weight"
    yield cut.by_rows("vision_projection.weight", projector, arch.text.hidden_size, v.output_dim)


def _vision_layer(v: VisionArch, theirs: str, ours: str, cut: _Cut) -> Iterator[Row]:
    hidden, inner = v.hidden_size, v.intermediate_size
    for stored, name in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj")):
        yield cut.by_rows(f"{theirs}attn.{stored}.weight", f"{ours}self_attn.{name}.weight", hidden, hidden)
        yield cut.by_rows(f"{theirs}attn.{stored}.bias", f"{ours}self_attn.{name}.bias", hidden)
    yield cut.by_cols(theirs + "attn.wo.weight", ours + "self_attn.o_proj.weight", hidden, hidden)
    yield cut.whole(theirs + "attn.wo.bias", ours + "self_attn.o_proj.bias", hidden)
    yield cut.by_rows(theirs + "mlp.c_fc.weight", ours + "mlp.fc1.weight", inner, hidden)
    yield cut.by_rows(theirs + "mlp.c_fc.bias", ours + "mlp.fc1.bias", inner)
    yield cut.by_cols(theirs + "mlp.c_proj.weight", ours + "mlp.fc2.weight", hidden, inner)
    yield cut.whole(theirs + "mlp.c_proj.bias", ours + "mlp.fc2.bias", hidden)
    for stored, name in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
        for kind in ("weight", "bias"):
            yield cut.whole(f"{theirs}{stored}.{kind}", f"{ours}{name}.{kind}", hidden)


def _require_divisible(arch: Arch, ranks: int) -> None:
    t, v = arch.text, arch.vision
    cut = {
        "num_key_value_heads": t.num_kv_heads, "num_attention_heads": t.num_heads, "vocab_size": t.vocab_size,
        "intermediate_size": t.intermediate_size, "hidden_size": t.hidden_size,
    }  # fmt: skip
    if len(t.moe_layers) < t.num_layers:
        cut["intermediate_size_mlp"] = t.intermediate_size_mlp
    if v is not None:
        cut |= {
            "vision num_attention_heads": v.num_heads, "vision intermediate_size": v.intermediate_size,
            "vision projector_output_dim": v.projector_output_dim,
        }  # fmt: skip
    for what, size in cut.items():
        if size % ranks:
            fits = [n for n in range(1, ranks) if all(value % n == 0 for value in cut.values())]
            raise UsageError(f"{ranks} files do not divide {what} {size}", hint=f"use --shards {fits[-1]}")
    if t.tie_word_embeddings:
        raise UsageError("Meta's layout has no tied embeddings", hint="use --to hf or --to gguf")
