"""Products with experts' weights: tokens sorted by expert, one launch for all experts, weights decoded in registers.

  dispatch    router logits → each token's score, the order by expert, and which tile of rows belongs to which expert
  prepare     rows of x in that order, times the score, in the form that the product takes
  product     tiles of rows · weightᵀ; gated ones end in silu(gate) · up; rows may be written to other places

Everything that depends on the routing stays on the device; the number of tiles launched is the most that there can be.
A dense linear is the case of one expert. A tile is computed as weight · xᵀ: the weight is the operand that lies in
registers, where it is decoded, and few tokens fill no more than the 16 columns that they need.

INT4: nibble n of a word, under the exponent of 128, is the bfloat16 128 + n, two of them for a shift and a logical
operation. So the product is of 128 + (q + 8), and scale · 136 · Σ x is taken off for each group: one more product, of
the scales and the sums that `prepare` makes.
Nibbles p and p + 4 of a word come out side by side, so x is stored in that order: within a group of G, place
p · G/4 + 2j + h holds k = 8j + p + 4h.

Legend: T tokens, R rows, N out features, K in features, G group size, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch.kernels.triton_banks import FP8, INT4, Bank
from batch.kernels.triton_rows import Prepared, Tiles, dispatch, one_expert, prepare
from batch.kernels.triton_support import MULTIPROCESSORS, ceil_div, dot, is_wide

EXPONENT = 0x43004300  # of two bfloat16; passed to the kernel, so that it lies in a register and "and, or" is one step
MOST_SPLITS = 8
SWIZZLE = 8  # tiles of columns that run beside each other on the same rows, so that x is read from the L2 cache


@triton.jit
def _expand_int4(words: tl.tensor, exponent: tl.tensor, ROWS: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """words int32 [ROWS, G/8] → bfloat16 128 + nibble [ROWS, G], in the order of `prepare`."""
    shift = tl.arange(0, 4) * 4
    pairs = ((words[:, None, :] >> shift[None, :, None]) & 0x000F000F) | exponent  # [ROWS, 4, G/8]
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.reshape(tl.join(low, high), (ROWS, GROUP)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _values(
    weight: tl.tensor, n: tl.tensor, step: tl.tensor, exponent: tl.tensor, like: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What is multiplied with DEPTH k of x, `like` [DEPTH, ROWS], before any scale: [COLUMNS, DEPTH]."""
    if KIND == 1:
        word = step * (DEPTH // 8) + tl.arange(0, DEPTH // 8)
        words = _load(weight + n[:, None].to(tl.int64) * (K // 8) + word[None, :], (n < N)[:, None], N % COLUMNS)
        return _expand_int4(words, exponent, COLUMNS, DEPTH).to(like.dtype)
    else:
        k = step * DEPTH + tl.arange(0, DEPTH)
        there = (n < N)[:, None] & (k < K)[None, :]
        values = _load(weight + n[:, None].to(tl.int64) * K + k[None, :], there, N % COLUMNS + K % DEPTH)
        if KIND == 2:
            values = values.to(tl.float32).to(like.dtype)
        return values


@triton.jit
def _load(pointers: tl.tensor, there: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Masked only where a tile can reach past the end: predicates cost registers and time."""
    if MASKED:
        return tl.load(pointers, mask=there, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _factor(scale: tl.tensor, n: tl.tensor, offset: tl.tensor, stride_n: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Scales of out features, float32 [COLUMNS, 1]."""
    return tl.load(scale + n * stride_n + offset, mask=n < N, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _scaled(
    total: tl.tensor, scale: tl.tensor, n: tl.tensor, stride_n: tl.tensor, token_scale: tl.tensor,
    N: tl.constexpr, KIND: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    if KIND >= 2:
        total = total * _factor(scale, n, 0, stride_n, N)
    if KIND == 3:
        total = total * token_scale[None, :]
    return total


@triton.jit
def _address(
    table: tl.tensor,
    line: tl.constexpr, num_experts: tl.tensor, expert: tl.tensor,
    KIND: tl.constexpr, DTYPE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A weight's pointer from line 0 or 2 of the table."""
    address = tl.load(table + line * num_experts + expert)
    if KIND == 0:
        pointer = address.to(tl.pointer_type(DTYPE))
    elif KIND == 1:
        pointer = address.to(tl.pointer_type(tl.int32))
    else:
        pointer = address.to(tl.pointer_type(tl.float8e4nv))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _product(
    x: tl.tensor, extra: tl.tensor, table: tl.tensor, tiles: tl.tensor, order: tl.tensor, out: tl.tensor,
    num_experts: tl.tensor, num_tiles: tl.tensor, num_rows: tl.tensor, stride_n: tl.tensor, stride_g: tl.tensor,
    exponent: tl.tensor,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, ROUTED: tl.constexpr, SCATTER: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, WEIGHT: tl.constexpr, ROUND: tl.constexpr, WIDE: tl.constexpr, SWIZZLE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of COLUMNS out features and ROWS rows; with SPLITS, of one part of K, to out float32 [SPLITS, R, N]."""
    program, split = tl.program_id(0), tl.program_id(1)
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    band = program // (num_tiles * SWIZZLE)
    width = min(across - band * SWIZZLE, SWIZZLE)
    inside = program - band * num_tiles * SWIZZLE
    tile, column = inside // width, band * SWIZZLE + inside % width
    expert, first, end = 0, tile * ROWS, num_rows
    if ROUTED:
        expert = tl.load(tiles + tile)
        if expert < 0:
            return
        first, end = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    row = first + tl.arange(0, ROWS)
    there = row < end
    row = tl.minimum(row, end - 1)  # what follows is computed again and not stored
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    weight = _address(table, 0, num_experts, expert, KIND, WEIGHT)
    scale = tl.load(table + num_experts + expert).to(tl.pointer_type(tl.bfloat16))
    weight_up = _address(table, 2 * GATED, num_experts, expert, KIND, WEIGHT)
    scale_up = tl.load(table + (2 * GATED + 1) * num_experts + expert).to(tl.pointer_type(tl.bfloat16))
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    total_up = tl.zeros((COLUMNS, ROWS), tl.float32)
    nothing = tl.zeros((COLUMNS, ROWS), tl.float32)
    steps: tl.constexpr = (K + DEPTH - 1) // DEPTH
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    for step in tl.range(split * share, min(split * share + share, steps), num_stages=STAGES):
        k = step * DEPTH + tl.arange(0, DEPTH)
        xt = _load(x + row[None, :].to(tl.int64) * K + k[:, None], (k < K)[:, None], K % DEPTH)
        values = _values(weight, n, step, exponent, xt, N, K, COLUMNS, DEPTH, KIND)
        if GATED:
            values_up = _values(weight_up, n, step, exponent, xt, N, K, COLUMNS, DEPTH, KIND)
        if KIND == 1:
            total += _factor(scale, n, step * stride_g, stride_n, N) * dot(values, xt, nothing, WIDE)
            if GATED:
                part = dot(values_up, xt, nothing, WIDE)
                total_up += _factor(scale_up, n, step * stride_g, stride_n, N) * part
        else:
            total = dot(values, xt, total, WIDE)
            if GATED:
                total_up = dot(values_up, xt, total_up, WIDE)
    if KIND == 1:
        for third in tl.static_range(3):
            group = tl.arange(0, GROUPS)
            sums = tl.load(extra + (row[None, :].to(tl.int64) * 3 + third) * GROUPS + group[:, None])
            mine = (group >= split * share) & (group < min(split * share + share, steps))
            where = n[:, None] * stride_n + group[None, :] * stride_g
            wanted = (n < N)[:, None] & mine[None, :]
            total = dot(tl.load(scale + where, mask=wanted, other=0.0), sums, total, WIDE)
            if GATED:
                total_up = dot(tl.load(scale_up + where, mask=wanted, other=0.0), sums, total_up, WIDE)
    token_scale = tl.zeros((ROWS,), tl.float32)
    if KIND == 3:
        token_scale = tl.load(extra + row)
    total = _scaled(total, scale, n, stride_n, token_scale, N, KIND)
    if GATED:
        up = _scaled(total_up, scale_up, n, stride_n, token_scale, N, KIND).to(ROUND).to(tl.float32)
        gate = total.to(ROUND).to(tl.float32)
        total = (gate / (1 + tl.exp(-gate))).to(ROUND).to(tl.float32) * up
    place = row
    if SCATTER:
        place = tl.load(order + row)
    base = out + split.to(tl.int64) * num_rows * N
    where = base + place[None, :].to(tl.int64) * N + n[:, None]
    tl.store(where, total.to(out.dtype.element_ty), mask=there[None, :] & (n < N)[:, None])


# (columns, warps, stages) of a tile by its rows. Gated tiles hold two sums; beside decoded weights, both of them at
# full width would not fit the registers.
SHAPES = {16: (64, 4, 5), 32: (64, 4, 4), 64: (128, 8, 4), 128: (128, 8, 3)}
GATED_SHAPES = {16: (64, 4, 4), 32: (64, 4, 4), 64: (64, 8, 4), 128: (128, 8, 3)}
GATED_DECODED_SHAPES = GATED_SHAPES | {128: (64, 8, 3)}
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def shapes_of(bank: Bank) -> dict[int, tuple[int, int, int]]:
    """The tiles of products with a Bank."""
    if not bank.gated:
        return SHAPES
    return GATED_DECODED_SHAPES if bank.form.kind in (INT4, FP8) else GATED_SHAPES


def splits_for(programs: int, steps: int) -> int:
    """How many programs share the k of one tile, so that few tiles still fill the device."""
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * programs <= 4 * MULTIPROCESSORS and 8 * splits <= steps:
        splits *= 2
    return splits


def product(x: Prepared, bank: Bank, tiles: Tiles, order: torch.Tensor | None = None) -> torch.Tensor:
    """Each row times its expert's weightᵀ → [R, N]; of gated weights silu(gate) · up. order int32 [R]: row i of the
    result goes to order[i]."""
    num_rows, form, table = x.rows.shape[0], bank.form, bank.table
    columns, warps, stages = shapes_of(bank)[tiles.rows]
    programs = tiles.count * ceil_div(form.out_features, columns)
    splits = 1 if bank.gated else splits_for(programs, ceil_div(form.in_features, form.group_size))
    shape, wide = (num_rows, form.out_features), is_wide(x.rows)
    if splits == 1:
        out = torch.empty(shape, dtype=x.dtype, device=x.rows.device)
    else:
        out = torch.empty((splits, *shape), dtype=torch.float32, device=x.rows.device)
    _product[(programs, splits)](
        x.rows, x.extra, table, table if tiles.table is None else tiles.table, table if order is None else order, out,
        table.shape[1], tiles.count, num_rows, *form.scale_strides, EXPONENT,
        N=form.out_features, K=form.in_features, COLUMNS=columns, ROWS=tiles.rows, DEPTH=form.group_size,
        KIND=form.kind, GATED=bank.gated, ROUTED=tiles.table is not None, SCATTER=order is not None, SPLITS=splits,
        STAGES=1 if wide else stages, WEIGHT=TRITON_DTYPES.get(bank.held[0].dtype), ROUND=TRITON_DTYPES[x.dtype],
        WIDE=wide, SWIZZLE=SWIZZLE, GROUPS=form.num_sums, num_warps=warps,
    )  # fmt: skip
    return out if splits == 1 else out.sum(0).to(x.dtype)


def linear(x: torch.Tensor, bank: Bank) -> torch.Tensor:
    """x [T, K] · weightᵀ → [T, N] with a Bank of one weight; of a gated one silu(gate) · up."""
    return product(prepare(x, bank), bank, one_expert(x.shape[0], x.dtype))


def routed_experts(x: torch.Tensor, logits: torch.Tensor, gate_up: Bank, down: Bank) -> torch.Tensor:
    """x [T, H] through the experts that the router's logits [T, E] choose → [T, H]."""
    score, order, tiles = dispatch(logits)
    hidden = product(prepare(x, gate_up, order, score), gate_up, tiles)  # [T, I], sorted by expert
    return product(prepare(hidden, down), down, tiles, order)
