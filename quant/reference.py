"""The specification of every quantized format, in plain torch; runs on any device.

Weights are [out, in]. Sums over a group's columns are sequential, so that every implementation gives the same bits.
The fast kernels in `quant/kernels` are tested against this, bit for bit.
"""

from __future__ import annotations

import torch

INT4_MIN, INT4_MAX = -8, 7
FP8_MAX = 448.0
FP8_BLOCK = 128  # columns whose float32 error is summed before it goes to float64
NUM_CANDIDATES = 9
SHRINK_STEP = 0.04
TINY_SCALE = 2.0**-120
ZERO_GROUP_SCALE = 2.0**-7


def int4_absmax_scale(groups: torch.Tensor) -> torch.Tensor:
    """float32 groups [out, n, g] → float32 scale [out, n] = bf16(absmax / 7.5), as compressed-tensors computes it."""
    scale = _divide(groups.abs().amax(-1), 7.5).bfloat16().float()
    return torch.where(scale == 0, torch.full_like(scale, ZERO_GROUP_SCALE), scale)


def int4_mse_scale(groups: torch.Tensor) -> torch.Tensor:
    """float32 groups [out, n, g] → the signed float32 scale [out, n] (a bfloat16 value) of least squared error.

    The group's largest |w| falls on -8; nine shrunk candidates are tried, the best is refined once by least squares.
    """
    high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    base = torch.where(high >= -low, high, low) * -0.125
    best_scale = best = torch.empty(0)
    for c in range(NUM_CANDIDATES):
        factor = torch.tensor(1.0) - torch.tensor(float(c)) * torch.tensor(SHRINK_STEP)
        scale = _safe_scale(base * factor.to(base.device))
        error = _search_error(groups, scale)
        better = torch.ones_like(error, dtype=torch.bool) if c == 0 else error < best
        best_scale = torch.where(better, scale, best_scale) if c else scale
        best = torch.where(better, error, best) if c else error
    q = _round_q(groups * (1.0 / best_scale)[..., None])
    dot, norm = _column_sum(groups * q), _column_sum(q * q)
    trial = _safe_scale(dot / torch.where(norm > 0, norm, torch.ones_like(norm)))
    return torch.where(_search_error(groups, trial) < best, trial, best_scale)


def int4_quantize(weight: torch.Tensor, group_size: int, scale_method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] bf16/f16/f32 → (q int8 [out, in] in [-8, 7], scale bf16 [out, in/g])."""
    groups = weight.float().unflatten(-1, (-1, group_size))
    if scale_method == "absmax":
        scale = int4_absmax_scale(groups)
        quotient = groups / scale[..., None]
        if weight.dtype == torch.bfloat16:
            quotient = quotient.bfloat16().float()
    else:
        scale = int4_mse_scale(groups)
        quotient = groups * (1.0 / scale)[..., None]
    return _round_q(quotient).to(torch.int8).flatten(-2), scale.bfloat16()


def int4_pack(q: torch.Tensor) -> torch.Tensor:
    """q int8 [out, in] → int32 [out, in/8]: element 8j+k plus 8 in bits 4k..4k+3."""
    shift = torch.arange(0, 32, 4, device=q.device)
    words = ((q.long() + 8).unflatten(-1, (-1, 8)) << shift).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def int4_unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [out, in/8] → q int8 [out, in]."""
    shift = torch.arange(0, 32, 4, device=packed.device)
    return (((packed.long()[..., None] >> shift) & 15) - 8).to(torch.int8).flatten(-2)


def int4_dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q int8 [out, in], scale [out, in/g] → [out, in] in the scale's dtype, rounded as compressed-tensors does."""
    groups = q.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None]).flatten(-2)


def fp8_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] bf16/f16/f32 → (e4m3fn [out, in], scale bf16 [out, 1] = absmax / 448)."""
    scale = _divide(weight.float().abs().amax(-1, keepdim=True), FP8_MAX).bfloat16().float()
    scale = torch.where(scale == 0, torch.full_like(scale, ZERO_GROUP_SCALE), scale)
    quotient = weight.float() / scale
    if weight.dtype == torch.bfloat16:
        quotient = quotient.bfloat16().float()
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale.bfloat16()


def fp8_dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3fn [out, in], scale [out, 1] → [out, in] in the scale's dtype, rounded as compressed-tensors does."""
    return q.to(scale.dtype) * scale


def squared_error(weight: torch.Tensor, back: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum (w - back)**2, sum w**2) per row, float64: float32 inside blocks of `block` columns, float64 over blocks."""
    w, b = weight.float(), back.float()
    error = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    square = torch.zeros_like(error)
    for start in range(0, w.shape[1], block):
        d, x = w[:, start : start + block] - b[:, start : start + block], w[:, start : start + block]
        error += _column_sum(d * d).double()
        square += _column_sum(x * x).double()
    return error, square


def _divide(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, correctly rounded on every device: CUDA would multiply by the inverse of a Python number."""
    return x / torch.tensor(by, device=x.device)


def _round_q(quotient: torch.Tensor) -> torch.Tensor:
    return quotient.clamp(INT4_MIN, INT4_MAX).round()


def _safe_scale(scale: torch.Tensor) -> torch.Tensor:
    """float32 → a bfloat16 value whose inverse is finite."""
    scale = scale.bfloat16().float()
    return torch.where(scale.abs() >= TINY_SCALE, scale, torch.full_like(scale, ZERO_GROUP_SCALE))


def _search_error(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared error [out, n] of dequantizing with `scale`, before the product is rounded."""
    quotient = groups * (1.0 / scale)[..., None]
    d = quotient - _round_q(quotient)
    return _column_sum(d * d) * (scale * scale)


def _column_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, one column after the other in float32."""
    total = torch.zeros_like(x[..., 0])
    for column in x.unbind(-1):
        total = total + column
    return total
