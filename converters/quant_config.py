"""compressed-tensors `quantization_config` → the format of every Linear."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearFormat:
    """How one Linear is stored.

    kind "int4": `weight_packed` int32 [out, in/8], `weight_scale` [out, in/group_size], `weight_shape` int64 [2].
    kind "fp8": `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1] (channel) or [1] (tensor).
    """

    kind: str
    num_bits: int
    strategy: str  # "group", "channel" or "tensor"
    group_size: int | None
    symmetric: bool
    dynamic_activations: bool  # activations quantized per token to FP8 at run time
