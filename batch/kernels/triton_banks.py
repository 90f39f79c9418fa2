"""Weights as the grouped products take them: one kind and shape, each by its address.

Legend: T tokens, R rows, N out features, K in features, G group size, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batch.kernels.linears import DenseLinear, Fp8Linear, FusedLinear, Int4Linear, Linear
from batch.kernels.transfer import send
from batch.kernels.triton_support import ceil_div, knows_fp8, power_of_two

DENSE, INT4, FP8, FP8_TOKENS = 0, 1, 2, 3  # FP8_TOKENS: activations in e4m3, too
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Form:
    """What the weights of a Bank have in common. `scale_strides`: per out feature, per group; `group_size` k are
    multiplied at a time."""

    kind: int
    group_size: int
    out_features: int
    in_features: int
    scale_strides: tuple[int, int]

    @property
    def num_sums(self) -> int:
        """Groups, filled up to what a product takes as its inner dimension."""
        return max(power_of_two(ceil_div(self.in_features, self.group_size)), 16)


@dataclass(frozen=True)
class Bank:
    """Weights by their addresses: of value and scale, and, of gated ones, of up's: table int64 [2 or 4, E].

    `form` is that of gate where they are gated. `held` keeps the memory.
    """

    form: Form
    table: torch.Tensor
    gated: bool
    held: tuple[torch.Tensor, ...]

    @staticmethod
    def of(weights: Sequence[Linear], gated: bool) -> Bank | None:
        """None where they are not all of a kind that the kernels know."""
        parts = [part for weight in weights for part in (_halves(weight) if gated else (weight,))]
        forms = {_form(part) for part in parts}
        form = forms.pop()
        if forms or form is None or len(parts) != len(weights) * (2 if gated else 1):
            return None
        addresses = [tensor.data_ptr() for part in parts for tensor in _data(part)]
        table = torch.tensor(addresses, dtype=torch.int64).view(len(weights), -1).T.contiguous()
        held = tuple(tensor for part in parts for tensor in part.tensors())
        return Bank(form, send([table], held[0].device)[0], gated, held)


def _halves(weight: Linear) -> tuple[Linear, ...]:
    """Gate and up, the rows of one weight or the parts of two."""
    if isinstance(weight, FusedLinear):
        return weight.parts
    rows = weight.out_features // 2
    if isinstance(weight, DenseLinear):
        return tuple(DenseLinear(half) for half in weight.weight.split(rows))
    if isinstance(weight, Int4Linear):
        both = zip(weight.packed.split(rows), weight.scale.split(rows), strict=True)
        return tuple(Int4Linear(*half, weight.group_size) for half in both)
    if isinstance(weight, Fp8Linear):
        both = zip(weight.weight.split(rows), weight.scale.split(rows), strict=True)
        return tuple(Fp8Linear(*half, weight.dynamic_activations) for half in both)
    return (weight,)


def _data(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and the scale; dense weights have none, and name themselves."""
    tensors = weight.tensors()
    return tensors[0], tensors[-1]


def _form(weight: Linear) -> Form | None:
    """None where the kernels do not know it."""
    if not isinstance(weight, DenseLinear | Int4Linear | Fp8Linear):
        return None
    values, scale = _data(weight)
    shape = weight.out_features, weight.in_features
    if not values.is_contiguous() or values.data_ptr() % 16 or weight.in_features % 16:
        return None
    if isinstance(weight, DenseLinear):
        return Form(DENSE, 64, *shape, (0, 0))
    strides = (scale.stride(0), scale.stride(1))
    if scale.dtype != torch.bfloat16:
        return None
    if isinstance(weight, Fp8Linear) and not knows_fp8(values.device):
        return None
    if isinstance(weight, Int4Linear):
        return Form(INT4, weight.group_size, *shape, strides) if weight.group_size in GROUP_SIZES else None
    return Form(FP8_TOKENS if weight.dynamic_activations else FP8, 128, *shape, strides)
