"""Rotary position embeddings of the language model, with Llama 3 frequency scaling, and attention temperature."""

from __future__ import annotations

import math

import torch

from l4tool.core.arch import TextArch


def inverse_frequencies(arch: TextArch) -> torch.Tensor:
    """float32 [D/2]. Scaling (Llama 3): wavelengths over original/low are divided by `factor`, those under
    original/high are kept, the band between is interpolated; low == high (Scout) leaves no band."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    base = 1.0 / (arch.rope_theta**exponents)  # [D/2]
    scaling = arch.rope_scaling
    if scaling is None:
        return base
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / base
    scaled = torch.where(wavelength > original / low, base / scaling.factor, base)
    if high == low:
        return scaled
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled)


def cos_sin(positions: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions int64 [T], inverse [D/2] → cos and sin, float32 [T, D/2].

    The functions are taken in float64 here and below: torch's float32 ones may give a position another last bit when
    it stands elsewhere in the tensor (vector body or scalar tail).
    """
    angles = (positions.float()[:, None] * inverse).double()  # [T, D/2]
    return angles.cos().float(), angles.sin().float()


def temperature(positions: torch.Tensor, arch: TextArch) -> torch.Tensor | None:
    """Factor of q in NoPE layers: log1p(floor((p + 1) / floor_scale)) · attn_scale + 1, float32 [T]; None if off."""
    if not arch.attn_temperature_tuning:
        return None
    steps = torch.floor((positions.float() + 1.0) / arch.floor_scale)
    return torch.log1p(steps.double()).float() * arch.attn_scale + 1.0
