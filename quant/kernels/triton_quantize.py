"""INT4 and FP8 quantization on a CUDA device, bit for bit as `quant/reference.py` has it.

A lane takes one group (INT4) or one row (FP8) and goes over its columns one after the other, so that sums are those of
the specification; products and sums are not fused, divisions are rounded correctly. Either memory order of the weight
will do: what a fused expert stores by columns is read as it is.

Legend: R rows, C columns, G group size. Written for Triton 3.6; TRITON_INTERPRET=1 runs it on CPU tensors.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from quant.reference import FP8_BLOCK, NUM_CANDIDATES, SHRINK_STEP

LANES = 128
CANDIDATES = 16  # a power of two that NUM_CANDIDATES fit


@triton.jit
def _round(x: tl.tensor) -> tl.tensor:
    """float32 → the nearest integer, ties to even, of what is far below 2²³."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_q(x: tl.tensor) -> tl.tensor:
    return _round(tl.minimum(tl.maximum(x, -8.0), 7.0))


@triton.jit
def _bf16(x: tl.tensor) -> tl.tensor:
    """float32 rounded to bfloat16, as float32."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _safe(scale: tl.tensor) -> tl.tensor:
    """As `reference._safe_scale`: TINY_SCALE is 2⁻¹²⁰, ZERO_GROUP_SCALE 2⁻⁷."""
    scale = _bf16(scale)
    return tl.where(tl.abs(scale) >= 7.52316384526264e-37, scale, 0.0078125)


@triton.jit
def _mse_scale(
    at: tl.tensor, stride_c: tl.tensor, there: tl.tensor, factors: tl.tensor,
    GROUP: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, CANDIDATES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As `reference.int4_mse_scale`, float32 [LANES]."""
    high, low = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for k in range(GROUP):
        w = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32)
        high, low = tl.maximum(high, w), tl.minimum(low, w)
    base = tl.where(high >= -low, high, low) * -0.125
    c = tl.arange(0, CANDIDATES)
    scales = _safe(base[:, None] * tl.load(factors + c)[None, :])  # [LANES, CANDIDATES]
    inverse = tl.math.div_rn(tl.full((LANES, CANDIDATES), 1.0, tl.float32), scales)
    errors = tl.zeros((LANES, CANDIDATES), tl.float32)
    for k in range(GROUP):
        w = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32)
        quotient = w[:, None] * inverse
        d = quotient - _round_q(quotient)
        errors += d * d
    errors = tl.where((c < COUNT)[None, :], errors * (scales * scales), float("inf"))
    chosen = c[None, :] == tl.argmin(errors, 1)[:, None]
    best, scale = tl.min(errors, 1), tl.sum(tl.where(chosen, scales, 0.0), 1)
    inverse_best = tl.math.div_rn(tl.full((LANES,), 1.0, tl.float32), scale)
    dot, norm = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for k in range(GROUP):
        w = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32)
        q = _round_q(w * inverse_best)
        dot += w * q
        norm += q * q
    trial = _safe(tl.math.div_rn(dot, tl.where(norm > 0, norm, 1.0)))
    inverse_trial = tl.math.div_rn(tl.full((LANES,), 1.0, tl.float32), trial)
    error = tl.zeros((LANES,), tl.float32)
    for k in range(GROUP):
        quotient = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32) * inverse_trial
        d = quotient - _round_q(quotient)
        error += d * d
    return tl.where(error * (trial * trial) < best, trial, scale)


@triton.jit
def _absmax_scale(
    at: tl.tensor, stride_c: tl.tensor, there: tl.tensor, by: tl.tensor, COLUMNS: tl.constexpr, LANES: tl.constexpr
) -> tl.tensor:
    """bf16(absmax / by), 2⁻⁷ for what is all zero, float32 [LANES]."""
    largest = tl.zeros((LANES,), tl.float32)
    for k in range(COLUMNS):
        w = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w))
    scale = _bf16(tl.math.div_rn(largest, tl.zeros((LANES,), tl.float32) + by))
    return tl.where(scale == 0, 0.0078125, scale)


@triton.jit
def _int4(
    weight: tl.tensor, stride_r: tl.tensor, stride_c: tl.tensor, rows: tl.tensor, factors: tl.tensor, packed: tl.tensor,
    scales: tl.tensor, errors: tl.tensor, squares: tl.tensor,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, MSE: tl.constexpr, BF16: tl.constexpr,
    COUNT: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """One group of LANES rows."""
    row, group = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES), tl.program_id(1)
    there = row < rows
    at = weight + row * stride_r + (group * GROUP).to(tl.int64) * stride_c
    if MSE:
        scale = _mse_scale(at, stride_c, there, factors, GROUP, LANES, COUNT, CANDIDATES)
    else:
        scale = _absmax_scale(at, stride_c, there, 7.5, GROUP, LANES)
    inverse = tl.math.div_rn(tl.full((LANES,), 1.0, tl.float32), scale)
    error, square = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for j in range(GROUP // 8):
        word = tl.zeros((LANES,), tl.int32)
        for i in tl.static_range(8):
            w = tl.load(at + (8 * j + i) * stride_c, mask=there, other=0.0).to(tl.float32)
            if MSE:
                quotient = w * inverse
            else:
                quotient = tl.math.div_rn(w, scale)
                if BF16:
                    quotient = _bf16(quotient)
            q = _round_q(quotient)
            d = w - _bf16(q * scale)
            error += d * d
            square += w * w
            word = word | ((q.to(tl.int32) + 8) << (4 * i))
        tl.store(packed + row * (GROUPS * GROUP // 8) + group * (GROUP // 8) + j, word, mask=there)
    place = row * GROUPS + group
    tl.store(scales + place, scale.to(tl.bfloat16), mask=there)
    tl.store(errors + place, error, mask=there)
    tl.store(squares + place, square, mask=there)


@triton.jit
def _fp8(
    weight: tl.tensor, stride_r: tl.tensor, stride_c: tl.tensor, rows: tl.tensor, out: tl.tensor, scales: tl.tensor,
    errors: tl.tensor, squares: tl.tensor,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, BF16: tl.constexpr,
) -> None:  # fmt: skip
    """LANES rows."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = row < rows
    at = weight + row * stride_r
    scale = _absmax_scale(at, stride_c, there, 448.0, COLUMNS, LANES)
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    for block in range(blocks):
        error, square = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
        for k in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, COLUMNS)):
            w = tl.load(at + k * stride_c, mask=there, other=0.0).to(tl.float32)
            quotient = tl.math.div_rn(w, scale)
            if BF16:
                quotient = _bf16(quotient)
            q = tl.minimum(tl.maximum(quotient, -448.0), 448.0).to(tl.float8e4nv)
            tl.store(out + row * COLUMNS + k, q, mask=there)
            d = w - _bf16(q.to(tl.float32) * scale)
            error += d * d
            square += w * w
        tl.store(errors + row * blocks + block, error, mask=there)
        tl.store(squares + row * blocks + block, square, mask=there)
    tl.store(scales + row, scale.to(tl.bfloat16), mask=there)


@triton.jit
def _sum(parts: tl.tensor, rows: tl.tensor, total: tl.tensor, COUNT: tl.constexpr, LANES: tl.constexpr) -> None:
    """float32 [R, COUNT] → float64 [R], one after the other."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    found = tl.zeros((LANES,), tl.float64)
    for part in range(COUNT):
        found += tl.load(parts + row * COUNT + part, mask=row < rows, other=0.0).to(tl.float64)
    tl.store(total + row, found, mask=row < rows)


def int4(
    weight: torch.Tensor, group_size: int, scale_method: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [R, C], finite → packed int32 [R, C/8], scale bf16 [R, C/G], error and square float64 [R]."""
    rows, columns = weight.shape
    groups, device = columns // group_size, weight.device
    packed = torch.empty((rows, columns // 8), dtype=torch.int32, device=device)
    scale = torch.empty((rows, groups), dtype=torch.bfloat16, device=device)
    errors, squares = torch.empty((2, rows, groups), dtype=torch.float32, device=device)
    _int4[(triton.cdiv(rows, LANES), groups)](
        weight, weight.stride(0), weight.stride(1), rows, _factors(device), packed, scale, errors, squares,
        GROUPS=groups, GROUP=group_size, LANES=LANES, MSE=scale_method == "mse", BF16=weight.dtype == torch.bfloat16,
        COUNT=NUM_CANDIDATES, CANDIDATES=CANDIDATES, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return packed, scale, _row_sums(errors), _row_sums(squares)


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [R, C], finite → e4m3fn [R, C], scale bf16 [R, 1], error and square float64 [R]."""
    rows, columns = weight.shape
    out = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty((rows, 1), dtype=torch.bfloat16, device=weight.device)
    shape = (2, rows, triton.cdiv(columns, FP8_BLOCK))
    errors, squares = torch.empty(shape, dtype=torch.float32, device=weight.device)
    lanes = LANES // 4  # so that a matrix has enough programs
    _fp8[(triton.cdiv(rows, lanes),)](
        weight, weight.stride(0), weight.stride(1), rows, out, scale, errors, squares, COLUMNS=columns,
        BLOCK=FP8_BLOCK, LANES=lanes, BF16=weight.dtype == torch.bfloat16, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out, scale, _row_sums(errors), _row_sums(squares)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """What each candidate shrinks the scale by, float32 [CANDIDATES], computed as the specification does."""
    numbers = torch.arange(CANDIDATES, dtype=torch.float32)
    return (torch.tensor(1.0) - numbers * torch.tensor(SHRINK_STEP)).to(device)


def _row_sums(parts: torch.Tensor) -> torch.Tensor:
    total = torch.empty(parts.shape[0], dtype=torch.float64, device=parts.device)
    _sum[(triton.cdiv(parts.shape[0], LANES),)](parts, parts.shape[0], total, COUNT=parts.shape[1], LANES=LANES)
    return total
