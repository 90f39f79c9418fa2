"""The weight of a linear layer as it lies in memory: dense, INT4 groups, FP8 channels, or several stacked by rows.

Legend: N out features, K in features, G group size. Every weight is [out, in]; y = x · weightᵀ, no bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """weight [N, K] in the activation dtype."""

    weight: torch.Tensor

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

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())


Linear = DenseLinear | Int4Linear | Fp8Linear | FusedLinear


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of one layer: gate_up[e] maps H → 2I (gate rows first), down[e] maps I → H."""

    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
