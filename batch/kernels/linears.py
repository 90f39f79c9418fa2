"""The weight of a linear layer as it lies in memory: dense, INT4 groups, FP8 channels, or several stacked by rows; and,
for the CPU's bfloat16 kernels, dense and INT4 weights packed in panels.

Legend: N out features, K in features, G group size. Every weight is [out, in]; y = x · weightᵀ, no bias.
A panel holds 32 out features ("columns"), P = N / 32. Gated weights interleave gate and up: columns 0 … 15 of panel p
are rows 16p … of gate, 16 … 31 the same rows of up, so that one register tile ends in silu(gate) · up.
`derived`, of every weight: what kernels work out once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

PANEL = 32  # columns
HALF = PANEL // 2
PANEL_GROUP = 128  # k per scale of an INT4 panel


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """weight [N, K] in the activation dtype."""

    weight: torch.Tensor
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,)


@dataclass(frozen=True, eq=False)
class Int4Linear:
    """compressed-tensors `pack-quantized`: element k of row n sits in bits 4(k % 8) of packed[n, k // 8], as q + 8.

    packed int32 [N, K/8]; scale bf16 [N, K/G]; weight = q · scale.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    group_size: int
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.packed, self.scale)


@dataclass(frozen=True, eq=False)
class Fp8Linear:
    """compressed-tensors `float-quantized`: weight float8_e4m3fn [N, K], scale bf16 [N, 1].

    dynamic_activations: the input is quantized to e4m3 per token (scale absmax / 448) before the product.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    dynamic_activations: bool
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight, self.scale)


@dataclass(frozen=True, eq=False)
class FusedLinear:
    """Several linears over the same input; outputs follow one another (q, k, v or gate, up) without joining storage."""

    parts: tuple[DenseLinear | Int4Linear | Fp8Linear, ...]
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())


@dataclass(frozen=True, eq=False)
class PanelLinear:
    """words int32 [P, K/2, 32]: word [p, j, c] is column c of panel p at k = 2j (low half) and 2j + 1, bfloat16.

    Columns past `out_features` in the last panel are 0.
    """

    words: torch.Tensor
    gated: bool
    out_features: int
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 2

    def addresses(self) -> tuple[int, int]:
        """Of the words, and 0 for the scales that there are none of."""
        return self.words.data_ptr(), 0

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words,)

    def dense(self) -> torch.Tensor:
        """The weight bfloat16 [N, K], gate rows first."""
        pairs = self.words.view(torch.bfloat16).view(*self.words.shape, 2)  # [P, K/2, 32, 2]
        return _rows_in_order(pairs.transpose(1, 2).flatten(2), self.gated)[: self.out_features]


@dataclass(frozen=True, eq=False)
class PanelInt4Linear:
    """words int32 [P, K/8, 32]: bits 4(4h + i) of word [p, j, c] hold q + 8 of column c at k = 8j + 2i + h.

    scale bfloat16 [P, K/128, 32]; weight = q · scale. int8_activations: the input is quantized to int8, in groups of
    128 per token (scale absmax / 127), before the product.
    """

    words: torch.Tensor
    scale: torch.Tensor
    gated: bool
    int8_activations: bool = False
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return self.words.shape[0] * PANEL

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 8

    def addresses(self) -> tuple[int, int]:
        """Of the words and of the scales."""
        return self.words.data_ptr(), self.scale.data_ptr()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words, self.scale)

    def dense(self) -> torch.Tensor:
        """The weight bfloat16 [N, K], gate rows first, each q · scale rounded as `reference.dequantize_int4` does."""
        shifts = torch.tensor([4 * (4 * h + i) for i in range(4) for h in (0, 1)], dtype=torch.int32)
        q = ((self.words[..., None] >> shifts) & 15) - 8  # [P, K/8, 32, 8]
        q = q.transpose(1, 2).reshape(q.shape[0], PANEL, -1, PANEL_GROUP)  # [P, 32, K/128, 128]
        weight = q.to(torch.bfloat16) * self.scale.transpose(1, 2)[..., None]
        return _rows_in_order(weight.flatten(2), self.gated)


@dataclass(frozen=True, eq=False)
class PanelFp8Linear:
    """words int32 [P, K/4, 32]: byte b of word [p, j, c] is column c of panel p at k = 4j + b, float8_e4m3fn.

    scale float32 [P, 32]; dynamic_activations: as in Fp8Linear.
    """

    words: torch.Tensor
    scale: torch.Tensor
    gated: bool
    dynamic_activations: bool
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def out_features(self) -> int:
        return self.words.shape[0] * PANEL

    @property
    def in_features(self) -> int:
        return self.words.shape[1] * 4

    def addresses(self) -> tuple[int, int]:
        """Of the words and of the scales."""
        return self.words.data_ptr(), self.scale.data_ptr()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words, self.scale)

    def plain(self) -> Fp8Linear:
        """The same weight [N, K], gate rows first."""
        values = self.words.view(torch.uint8).view(*self.words.shape, 4)  # [P, K/4, 32, 4]
        weight = _rows_in_order(values.transpose(1, 2).flatten(2), self.gated).view(torch.float8_e4m3fn)
        scale = _rows_in_order(self.scale[..., None], self.gated)  # [N, 1]
        return Fp8Linear(weight, scale, self.dynamic_activations)


def _rows_in_order(panels: torch.Tensor, gated: bool) -> torch.Tensor:
    """[P, 32, K] → [N, K]."""
    if not gated:
        return panels.flatten(0, 1)
    return torch.cat([panels[:, :HALF].flatten(0, 1), panels[:, HALF:].flatten(0, 1)])


Panels = PanelLinear | PanelInt4Linear | PanelFp8Linear
Linear = DenseLinear | Int4Linear | Fp8Linear | FusedLinear | Panels


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of one layer: gate_up[e] maps H → 2I (gate rows first), down[e] maps I → H."""

    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    derived: dict[str, Any] = field(default_factory=dict, repr=False)
