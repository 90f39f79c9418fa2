"""optimum-quanto's layout: its own quantizers, its own state dict names, a map that its `requantize` reads.

Every Linear is a module of its own (experts too), under the canonical names. qint4 is asymmetric with a float shift,
packs row r with row r + R/2, and HQQ looks at whole tensors: nothing here can be split by rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from converters.reader import TensorInfo
from converters.writer import TensorSpec
from converters.writing.encoder import Encoded, Encoder, Scratch
from converters.writing.plan import Plan
from l4tool.core.errors import UsageError
from quant import ops, reference

GROUP_SIZE = 128  # what quanto's QLinear chooses for every in_features that 128 divides
QTYPES = {"int4": "qint4", "fp8": "qfloat8_e4m3fn"}


def quantization_map(plan: Plan) -> dict[str, dict[str, str]]:
    """Module name → qtypes, as `optimum.quanto.quantization_map` gives it."""
    modules = {}
    for items in plan.items:
        for item in items:
            if item.encoder.kind in QTYPES:
                qtype = QTYPES[item.encoder.kind]
                modules[item.stored.removesuffix(".weight")] = {"weights": qtype, "activations": "none"}
    return modules


@dataclass(frozen=True)
class QuantoInt4(Encoder):
    """qint4, groups of 128: `_data._data` uint8 [ceil(n/2), 128], `_scale` and `_shift` [n, 1] of n = out·in/128."""

    scale: str
    kind = "int4"
    splittable = False

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        out, cols = info.shape
        if cols % GROUP_SIZE or cols == GROUP_SIZE:
            raise UsageError(f"optimum-quanto's groups of 128 do not fit the {cols} inputs of {info.name}")
        groups = out * cols // GROUP_SIZE
        return [
            TensorSpec(stored + "._data._data", ((groups + 1) // 2, GROUP_SIZE), torch.uint8),
            TensorSpec(stored + "._scale", (groups, 1), info.dtype),
            TensorSpec(stored + "._shift", (groups, 1), info.dtype),
        ]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        from optimum.quanto import qint4, quantize_weight

        weight = weight.contiguous()
        ops.require_finite(weight, info.name)
        with _python_unpack():
            scale, shift = _optimizer(self.scale)(weight, qtype=qint4, axis=0, group_size=GROUP_SIZE)
        quantized = quantize_weight(
            weight, qtype=qint4, axis=0, scale=scale, shift=shift, group_size=GROUP_SIZE, optimized=False
        )
        pieces = _pieces(quantized, stored)
        packed = pieces[0][1]
        back = unpack(packed, 4)[: len(scale)] * scale - shift
        return Encoded(pieces, *reference.squared_error(weight, back.view(info.shape), GROUP_SIZE))

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        return rows * info.shape[1] * (40 if self.scale == "hqq" else 24)


class QuantoFp8(Encoder):
    """qfloat8_e4m3fn per row: `_data` [out, in], `_scale` [out, 1]."""

    kind = "fp8"
    splittable = False

    def parts(self, info: TensorInfo, stored: str) -> list[TensorSpec]:
        data = TensorSpec(stored + "._data", info.shape, torch.float8_e4m3fn)
        return [data, TensorSpec(stored + "._scale", (info.shape[0], 1), info.dtype)]

    def encode(self, weight: torch.Tensor, info: TensorInfo, stored: str, row: int, scratch: Scratch) -> Encoded:
        from optimum.quanto import AbsmaxOptimizer, qfloat8_e4m3fn, quantize_weight

        weight = weight.contiguous()
        ops.require_finite(weight, info.name)
        scale = AbsmaxOptimizer()(weight, qtype=qfloat8_e4m3fn, axis=0)
        scale = _nonzero(scale)
        quantized = quantize_weight(weight, qtype=qfloat8_e4m3fn, axis=0, scale=scale, optimized=False)
        pieces = _pieces(quantized, stored)
        back = pieces[0][1].to(scale.dtype) * scale
        return Encoded(pieces, *reference.squared_error(weight, back, reference.FP8_BLOCK))

    def scratch_bytes(self, info: TensorInfo, rows: int) -> int:
        return rows * info.shape[1] * 24


def _pieces(quantized: Any, stored: str) -> list[tuple[str, torch.Tensor, int]]:
    state: dict[str, torch.Tensor] = {}
    quantized.save_to_state_dict(state, stored + ".", False)
    return [(name, tensor, 0) for name, tensor in state.items()]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """A scale of 0 (a constant group, a zero row) would make quanto store NaN."""
    return torch.where(scale == 0, torch.full_like(scale, reference.ZERO_GROUP_SCALE), scale)


def _optimizer(method: str) -> Any:
    from optimum.quanto import HqqOptimizer, MaxOptimizer

    class SafeMax(MaxOptimizer):
        def optimize(self, base: torch.Tensor, qtype: Any, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
            scale, shift = super().optimize(base, qtype, axis)
            return _nonzero(scale), shift

    class SafeHqq(HqqOptimizer, SafeMax):
        """HQQ starting from SafeMax: quanto's own class, found next in the method resolution order."""

    return SafeHqq() if method == "hqq" else SafeMax()


@contextlib.contextmanager
def _python_unpack() -> Iterator[None]:
    """HQQ dequantizes, for which quanto would compile C++ into its own package folder."""
    from optimum.quanto.library.extensions.extension import get_extension

    extension = get_extension("quanto_cpp")
    saved = extension._lib
    extension._lib = SimpleNamespace(unpack=unpack)
    try:
        yield
    finally:
        extension._lib = saved


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n/2, g] → uint8 [n, g]: low halves, then high halves."""
    assert bits == 4
    return torch.cat([packed & 15, packed >> 4])
