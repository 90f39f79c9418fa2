"""The one table of tensor names: what a file calls each tensor, its stored shape, and what it is canonically.

A row says: the stored tensor `stored` of shape `shape` holds the canonical tensors, or pieces of them, that `parts`
names. A row without parts is a deliberate drop. A name without a row is an error. The same rows serve for reading
(canonical out of stored) and for writing (stored out of canonical). Shapes use the dimension legend of
`l4tool/core/arch.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from l4tool.core.arch import Arch, TextArch, VisionArch

TEXT_PREFIX = "language_model."
LM_HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
MULTIMODAL_HF, TEXT_HF, PER_EXPERT, COMPRESSED = "hf", "hf-text", "per-expert", "compressed-tensors"


@dataclass(frozen=True)
class Part:
    """One canonical tensor, or a piece of it, inside a stored one.

    Both are seen as matrices: all dimensions but the last flattened, and a vector [n] as [n, 1]. The piece is canonical
    rows × cols (None: all of them), and it lies in the stored tensor with its first element at (`row`, `col`), turned
    where `transposed`.
    """

    name: str
    shape: tuple[int, ...]  # of the whole canonical tensor
    row: int = 0
    col: int = 0
    transposed: bool = False
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, cols) of the piece, canonical orientation."""
        height, width = as_matrix(self.shape)
        rows, cols = self.rows or (0, height), self.cols or (0, width)
        return rows[1] - rows[0], cols[1] - cols[0]

    @property
    def stored_size(self) -> tuple[int, int]:
        """(rows, cols) that the piece takes in the stored tensor."""
        height, width = self.size
        return (width, height) if self.transposed else (height, width)

    @property
    def is_whole(self) -> bool:
        return self.size == as_matrix(self.shape)


@dataclass(frozen=True)
class Row:
    """A stored tensor. `required` False: the file may leave it out (a tied lm_head)."""

    stored: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    required: bool = True


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, cols) of a tensor seen as a matrix: leading dimensions flattened, a vector as one column."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def is_linear(name: str) -> bool:
    """True for the text model's quantizable Linear weights: attention, experts, shared experts and dense MLPs."""
    if not name.startswith("language_model.model.layers.") or not name.endswith("_proj.weight"):
        return False
    return ".self_attn." in name or ".feed_forward." in name


def hf_rows(arch: Arch) -> list[Row]:
    """The table of Hugging Face's fused layout: multimodal when `arch.vision`, else the text-only export's names."""
    text_only = arch.vision is None
    rows = [*_vision_rows(arch.vision, arch.text.hidden_size)] if arch.vision is not None else []
    for row in _text_rows(arch.text):
        stored = row.stored.removeprefix(TEXT_PREFIX) if text_only else row.stored
        rows.append(Row(stored, row.shape, row.parts, row.required))
    return rows


def canonical_rows(arch: Arch) -> list[Row]:
    """The per-expert table: every canonical tensor stored under its own name (text-only: without `language_model.`)."""
    rows = []
    for row in hf_rows(arch):
        for part in row.parts:
            stored = part.name.removeprefix(TEXT_PREFIX) if arch.vision is None else part.name
            rows.append(Row(stored, part.shape, (Part(part.name, part.shape),)))
        if not row.parts:
            rows.append(row)
    return rows


def canonical_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape, in table order: what a complete checkpoint of this architecture holds."""
    return {part.name: part.shape for row in hf_rows(arch) for part in row.parts}


def _whole(name: str, *shape: int) -> Row:
    return Row(name, shape, (Part(name, shape),))


def _text_rows(t: TextArch) -> Iterator[Row]:
    yield _whole(EMBEDDING, t.vocab_size, t.hidden_size)  # [V, H]
    for layer in range(t.num_layers):
        base = f"language_model.model.layers.{layer}."
        q_out, kv_out = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
        yield _whole(base + "self_attn.q_proj.weight", q_out, t.hidden_size)  # [A·D, H]
        yield _whole(base + "self_attn.k_proj.weight", kv_out, t.hidden_size)  # [K·D, H]
        yield _whole(base + "self_attn.v_proj.weight", kv_out, t.hidden_size)  # [K·D, H]
        yield _whole(base + "self_attn.o_proj.weight", t.hidden_size, q_out)  # [H, A·D]
        if t.is_moe(layer):
            yield from _moe_rows(base + "feed_forward.", t)
        else:
            yield from _mlp_rows(base + "feed_forward.", t.intermediate_size_mlp, t.hidden_size)
        yield _whole(base + "input_layernorm.weight", t.hidden_size)  # [H]
        yield _whole(base + "post_attention_layernorm.weight", t.hidden_size)  # [H]
    yield _whole("language_model.model.norm.weight", t.hidden_size)  # [H]
    if t.tie_word_embeddings:
        yield Row(LM_HEAD, (t.vocab_size, t.hidden_size), (), required=False)
    else:
        yield _whole(LM_HEAD, t.vocab_size, t.hidden_size)  # [V, H]


def _mlp_rows(base: str, inner: int, hidden: int) -> Iterator[Row]:
    yield _whole(base + "gate_proj.weight", inner, hidden)
    yield _whole(base + "up_proj.weight", inner, hidden)
    yield _whole(base + "down_proj.weight", hidden, inner)


def _moe_rows(base: str, t: TextArch) -> Iterator[Row]:
    """Fused experts are stored [in, out], gate before up: a canonical projection is a transposed slice."""
    hidden, inner = t.hidden_size, t.intermediate_size
    gate_up, down = [], []
    for e in range(t.num_experts):
        expert = f"{base}experts.{e}."
        gate_up.append(Part(f"{expert}gate_proj.weight", (inner, hidden), e * hidden, 0, transposed=True))
        gate_up.append(Part(f"{expert}up_proj.weight", (inner, hidden), e * hidden, inner, transposed=True))
        down.append(Part(f"{expert}down_proj.weight", (hidden, inner), e * inner, 0, transposed=True))
    yield Row(base + "experts.gate_up_proj", (t.num_experts, hidden, 2 * inner), tuple(gate_up))  # [E, H, 2I]
    yield Row(base + "experts.down_proj", (t.num_experts, inner, hidden), tuple(down))  # [E, I, H]
    yield _whole(base + "router.weight", t.num_experts, hidden)  # [E, H]
    yield from _mlp_rows(base + "shared_expert.", inner, hidden)


def _vision_rows(v: VisionArch, text_hidden: int) -> Iterator[Row]:
    hidden, inner = v.hidden_size, v.intermediate_size
    yield _whole("vision_model.class_embedding", hidden)
    yield _whole("vision_model.positional_embedding_vlm", v.patches_per_side**2 + 1, hidden)  # class token last
    yield _whole("vision_model.patch_embedding.linear.weight", hidden, v.num_channels * v.patch_size**2)
    for norm in ("layernorm_pre", "layernorm_post"):
        yield from _biased(f"vision_model.{norm}", hidden)
    for layer in range(v.num_layers):
        base = f"vision_model.model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from _biased(f"{base}self_attn.{name}", hidden, hidden)
        yield from _biased(base + "mlp.fc1", inner, hidden)
        yield from _biased(base + "mlp.fc2", hidden, inner)
        yield from _biased(base + "input_layernorm", hidden)
        yield from _biased(base + "post_attention_layernorm", hidden)
    yield _whole("vision_model.vision_adapter.mlp.fc1.weight", v.projector_input_dim, inner)
    yield _whole("vision_model.vision_adapter.mlp.fc2.weight", v.projector_output_dim, v.projector_output_dim)
    yield _whole("multi_modal_projector.linear_1.weight", text_hidden, v.output_dim)


def _biased(module: str, *shape: int) -> Iterator[Row]:
    yield _whole(module + ".weight", *shape)
    yield _whole(module + ".bias", shape[0])
