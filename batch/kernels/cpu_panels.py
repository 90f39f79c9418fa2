"""bfloat16 products with weights packed in panels: one call computes every group (expert) of a layer.

The rows of a group are cut into tiles of at most 12; a work item is a few neighbouring panels of one group, through
which every tile goes while they lie in the cache. Needs AVX512-BF16.
Legend: R rows of x, N out features, K in features, G groups, T tokens, E experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.linears import HALF, PANEL, PANEL_GROUP, PanelInt4Linear, PanelLinear
from batch.kernels.panel_tiles import INT8_ORDER, LINE_BYTES, MAX_ROWS, dense_tile, expand_int4, int4_tile, int8_tile
from batch.kernels.simd import elements_at, jit, narrow, take_item, widen

ITEM_BYTES = 512 * 1024  # of weights, half of a usual L2 cache
MOST_PANELS = 4  # per item
EXPAND_ROWS = 2 * MAX_ROWS  # INT4 panels that meet more rows than this are expanded to bfloat16 once
BLOCK_BYTES = 1 << 20  # of x that one group's rows have at most, so that they stay in the cache from panel to panel
BF16, INT4, INT8 = 0, 1, 2  # kinds of a Bank: bfloat16 weights, INT4 ones, INT4 ones for int8 activations
ALIAS_BYTES = 4096  # rows this far apart fall into the same lines of the L1 cache
_I64 = np.int64(0)


_dense_1, _dense_2, _dense_3, _dense_4, _dense_5, _dense_6 = (dense_tile(rows) for rows in range(1, 7))
_dense_7, _dense_8, _dense_9, _dense_10, _dense_11, _dense_12 = (dense_tile(rows) for rows in range(7, 13))
_int4_1, _int4_2, _int4_3, _int4_4, _int4_5, _int4_6 = (int4_tile(rows) for rows in range(1, 7))
_int4_7, _int4_8, _int4_9, _int4_10, _int4_11, _int4_12 = (int4_tile(rows) for rows in range(7, 13))

_int8_1, _int8_2, _int8_3, _int8_4, _int8_5, _int8_6 = (int8_tile(rows) for rows in range(1, 7))
_int8_7, _int8_8, _int8_9, _int8_10, _int8_11, _int8_12 = (int8_tile(rows) for rows in range(7, 13))


@jit
def _run_dense(rows: Any, x: Any, x_bytes: Any, w: Any, pairs: Any, outs: Any, gated: Any) -> None:
    """One tile of 1 to 12 rows; see `panel_tiles.dense_tile`."""
    if rows == 12:
        _dense_12(x, x_bytes, w, pairs, outs, gated)
    elif rows == 11:
        _dense_11(x, x_bytes, w, pairs, outs, gated)
    elif rows == 10:
        _dense_10(x, x_bytes, w, pairs, outs, gated)
    elif rows == 9:
        _dense_9(x, x_bytes, w, pairs, outs, gated)
    elif rows == 8:
        _dense_8(x, x_bytes, w, pairs, outs, gated)
    elif rows == 7:
        _dense_7(x, x_bytes, w, pairs, outs, gated)
    elif rows == 6:
        _dense_6(x, x_bytes, w, pairs, outs, gated)
    elif rows == 5:
        _dense_5(x, x_bytes, w, pairs, outs, gated)
    elif rows == 4:
        _dense_4(x, x_bytes, w, pairs, outs, gated)
    elif rows == 3:
        _dense_3(x, x_bytes, w, pairs, outs, gated)
    elif rows == 2:
        _dense_2(x, x_bytes, w, pairs, outs, gated)
    else:
        _dense_1(x, x_bytes, w, pairs, outs, gated)


@jit
def _run_int4(
    rows: Any, x: Any, x_bytes: Any, w: Any, scale: Any, groups: Any, sums: Any, outs: Any, gated: Any
) -> None:
    """One tile of 1 to 12 rows; see `panel_tiles.int4_tile`."""
    if rows == 12:
        _int4_12(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 11:
        _int4_11(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 10:
        _int4_10(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 9:
        _int4_9(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 8:
        _int4_8(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 7:
        _int4_7(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 6:
        _int4_6(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 5:
        _int4_5(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 4:
        _int4_4(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 3:
        _int4_3(x, x_bytes, w, scale, groups, sums, outs, gated)
    elif rows == 2:
        _int4_2(x, x_bytes, w, scale, groups, sums, outs, gated)
    else:
        _int4_1(x, x_bytes, w, scale, groups, sums, outs, gated)


@jit
def _run_int8(
    rows: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any, groups: Any, sums: Any, outs: Any,
    gated: Any,
) -> None:  # fmt: skip
    """One tile of 1 to 12 rows; see `panel_tiles.int8_tile`."""
    if rows == 12:
        _int8_12(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 11:
        _int8_11(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 10:
        _int8_10(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 9:
        _int8_9(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 8:
        _int8_8(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 7:
        _int8_7(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 6:
        _int8_6(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 5:
        _int8_5(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 4:
        _int8_4(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 3:
        _int8_3(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    elif rows == 2:
        _int8_2(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)
    else:
        _int8_1(x, x_bytes, x_scale, x_base, w, scale, groups, sums, outs, gated)


@jit
def _place_rows(outs: Any, out: Any, out_bytes: Any, order: Any, ordered: Any, begin: Any, end: Any) -> None:
    """Addresses of the rows of the result that rows begin … end - 1 go to."""
    for row in range(begin, end):
        outs[row - begin] = out + (order[row] if row < ordered else row) * out_bytes


@parallel.Kernel
def _product(job: Any) -> None:
    """Items of all groups; the arguments are those that `product` gives."""
    args = elements_at(job, _I64)
    x, tail, tail_row, out, out_bytes = args[2], args[3], args[4], args[5], args[6]
    table, addresses, order = elements_at(args[7], _I64), elements_at(args[8], _I64), elements_at(args[9], _I64)
    ordered, size, panels, per_item, per_group = args[10], args[11], args[12], args[13], args[14]
    gated, int4, int8, x_bytes, tail_bytes = args[15], args[16] != BF16, args[16] == INT8, args[17], args[18]
    expands, counter, x_scale, x_base = int4 and not int8, job + 8 * 20, args[21], args[22]
    width = 2 * HALF if gated else 2 * PANEL  # bytes of a row that one panel gives
    pairs, groups = size // 2, size // PANEL_GROUP
    panel_bytes, scale_bytes = (pairs // 4 if int4 else pairs) * LINE_BYTES, groups * PANEL * 2
    expanded = args[19] + take_item(counter) * pairs * LINE_BYTES if expands else 0
    sums, outs = np.empty(MAX_ROWS * PANEL, np.float32), np.empty(MAX_ROWS, np.int64)
    at_sums, at_outs, items = sums.ctypes.data, outs.ctypes.data, table[0] * per_group
    while True:
        item = take_item(job)
        if item >= items:
            return
        entry, first = 1 + 3 * (item // per_group), item % per_group * per_item
        group, begin, rows = table[entry], table[entry + 1], table[entry + 2]
        w, scale = addresses[2 * group] + first * panel_bytes, addresses[2 * group + 1] + first * scale_bytes
        source, row_bytes = x + begin * x_bytes, x_bytes
        if begin >= tail_row:
            source, row_bytes = tail + (begin - tail_row) * tail_bytes, tail_bytes
        tiles, count, target = (rows + MAX_ROWS - 1) // MAX_ROWS, min(per_item, panels - first), out + first * width
        if expands and rows > EXPAND_ROWS:
            for p in range(count):
                expand_int4(w + p * panel_bytes, scale + p * scale_bytes, groups, expanded)
                for tile in range(tiles):
                    low, high = rows * tile // tiles, rows * (tile + 1) // tiles
                    _place_rows(outs, target + p * width, out_bytes, order, ordered, begin + low, begin + high)
                    _run_dense(high - low, source + low * row_bytes, row_bytes, expanded, pairs, at_outs, gated)
            continue
        for tile in range(tiles):
            low, high = rows * tile // tiles, rows * (tile + 1) // tiles
            _place_rows(outs, target, out_bytes, order, ordered, begin + low, begin + high)
            at, taken = source + low * row_bytes, high - low
            for p in range(count):
                panel, factors = w + p * panel_bytes, scale + p * scale_bytes
                if int8:
                    at_group = (begin + low) * groups * 4
                    _run_int8(
                        taken, at, row_bytes, x_scale + at_group, x_base + at_group, panel, factors, groups, at_sums,
                        at_outs, gated,
                    )  # fmt: skip
                elif int4:
                    _run_int4(taken, at, row_bytes, panel, factors, groups, at_sums, at_outs, gated)
                else:
                    _run_dense(taken, at, row_bytes, panel, pairs, at_outs, gated)
                for m in range(taken):
                    outs[m] += width


@dataclass(frozen=True)
class Bank:
    """Where the weights of one product's groups lie: all of one kind and shape. addresses int64 [G, 2].

    It does not keep the weights alive.
    """

    addresses: torch.Tensor
    kind: int
    gated: bool
    in_features: int
    width: int  # features of the result
    panels: int
    per_item: int

    @staticmethod
    def of(weights: Sequence[object]) -> Bank:
        """`weights` are `same_kind`."""
        parts = [weight for weight in weights if isinstance(weight, PanelLinear | PanelInt4Linear)]
        first = parts[0]
        panels, panel_bytes = first.words.shape[0], first.words.stride(0) * 4
        per_item = max(1, min(MOST_PANELS, ITEM_BYTES // panel_bytes, panels // (4 * torch.get_num_threads())))
        return Bank(
            torch.tensor([part.addresses() for part in parts]), _kind(first), first.gated,
            first.in_features, first.out_features // (2 if first.gated else 1), first.words.shape[0], per_item,
        )  # fmt: skip


def _kind(weight: PanelLinear | PanelInt4Linear) -> int:
    if isinstance(weight, PanelLinear):
        return BF16
    return INT8 if weight.int8_activations else INT4


def same_kind(weights: Sequence[object]) -> bool:
    """True where `weights` can be one Bank."""
    first = weights[0]
    return isinstance(first, PanelLinear | PanelInt4Linear) and all(
        isinstance(w, PanelLinear | PanelInt4Linear) and _kind(w) == _kind(first)
        and (w.gated, w.out_features, w.words.shape) == (first.gated, first.out_features, first.words.shape)
        for w in weights
    )  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """Which rows meet which weights: table int64 [1 + 3·G], the number of groups with rows, then (weight, first row,
    rows) of each; `most` is what that number can be at most. Many rows of one weight are several groups."""

    table: torch.Tensor
    most: int


def block_rows(size: int) -> int:
    """Rows of K = size in one group at most."""
    return max(BLOCK_BYTES // (2 * size) // MAX_ROWS, 4) * MAX_ROWS


@functools.lru_cache(1024)
def one_weight(rows: int, size: int) -> Groups:
    """Groups of rows of K = size that all meet weight 0."""
    step = block_rows(size)
    entries = [n for first in range(0, rows, step) for n in (0, first, min(step, rows - first))]
    return Groups(torch.tensor([len(entries) // 3, *entries]), len(entries) // 3)


def product(
    xs: tuple[torch.Tensor, ...], bank: Bank, groups: Groups, order: torch.Tensor | None = None, spread: bool = False
) -> torch.Tensor:
    """Rows of x bfloat16 [R, K] times their group's weight → bfloat16 [R, N], or silu(gate) · up where it is gated.

    xs: one or two tensors whose rows are numbered through; no group has rows of both. `order` int64 [≤ R]: row r of the
    product goes to row order[r] of the result; rows without an entry stay where they are.
    spread: the result, meant for another product, may have rows that are not contiguous with one another.
    """
    rows = sum(len(part) for part in xs)
    x, tail = xs[0], xs[-1]
    width = x.element_size()
    meta: tuple[int | torch.Tensor, ...] = (0, 0)
    if bank.kind == INT8:
        q = quantize_rows(xs)
        x = tail = q.values
        width, meta = 1, (q.scale, q.base)
    room = bank.panels * (HALF if bank.gated else PANEL)  # columns that are written
    if spread and room * 2 % ALIAS_BYTES == 0:
        room += PANEL
    out = torch.empty((rows, room), dtype=torch.bfloat16)
    per_group = -(-bank.panels // bank.per_item)
    parallel.run(
        _product, groups.most * per_group, x, tail, len(x), out, out.stride(0) * 2, groups.table, bank.addresses,
        0 if order is None else order, 0 if order is None else len(order), bank.in_features, bank.panels,
        bank.per_item, per_group, int(bank.gated), bank.kind, x.stride(0) * width, tail.stride(0) * width,
        _scratch(bank.in_features), 0, *meta,
    )  # fmt: skip
    return out if room == bank.width else out[:, : bank.width]


@dataclass(frozen=True)
class Int8Rows:
    """values int8 [R, K], each eight k in INT8_ORDER; scale float32 and base int32 [R, K/128]; see `int8_tile`."""

    values: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor


@parallel.Kernel
def _quantize_rows(job: Any) -> None:
    """Items are rows; the arguments are those that `quantize_rows` gives."""
    args = elements_at(job, _I64)
    items, x, x_bytes, tail, tail_row, tail_bytes, size = args[1], args[2], args[3], args[4], args[5], args[6], args[7]
    groups, values = size // PANEL_GROUP, elements_at(args[8], np.int8(0))
    scale, base = elements_at(args[9], np.float32(0)), elements_at(args[10], np.int32(0))
    wide, whole = np.empty(PANEL_GROUP, np.float32), np.empty(PANEL_GROUP, np.int32)
    while True:
        row = take_item(job)
        if row >= items:
            return
        address = x + row * x_bytes if row < tail_row else tail + (row - tail_row) * tail_bytes
        source = elements_at(address, np.uint16(0))
        for g in range(groups):
            most = np.float32(0.0)
            for i in range(PANEL_GROUP):
                wide[i] = widen(source[g * PANEL_GROUP + i])
                most = max(most, abs(wide[i]))
            step = most / np.float32(127.0)
            inverse = np.float32(1.0) / step if step > 0 else np.float32(0.0)
            total = np.int32(0)
            for i in range(PANEL_GROUP):
                whole[i] = np.int32(np.rint(wide[i] * inverse))
                total += whole[i]
            at = row * size + g * PANEL_GROUP
            for i in range(0, PANEL_GROUP, 8):
                for j in range(8):
                    values[at + i + j] = np.int8(whole[i + INT8_ORDER[j]])
            scale[row * groups + g], base[row * groups + g] = step, -8 * total


def quantize_rows(xs: tuple[torch.Tensor, ...]) -> Int8Rows:
    """Rows of one or two tensors bfloat16 [R, K] as `reference.quantize_int8_groups` quantizes them."""
    x, tail, rows, size = xs[0], xs[-1], sum(len(part) for part in xs), xs[0].shape[1]
    values = torch.empty((rows, size), dtype=torch.int8)
    scale = torch.empty((rows, size // PANEL_GROUP), dtype=torch.float32)
    base = torch.empty(scale.shape, dtype=torch.int32)
    parallel.run(_quantize_rows, rows, x, x.stride(0) * 2, tail, len(x), tail.stride(0) * 2, size, values, scale, base)
    return Int8Rows(values, scale, base)


_expanded = torch.empty(0, dtype=torch.int32)


def _scratch(size: int) -> torch.Tensor:
    """Room for one expanded panel of K = size per thread."""
    global _expanded
    needed = torch.get_num_threads() * size * HALF
    if len(_expanded) < needed:
        _expanded = torch.empty(needed, dtype=torch.int32)
    return _expanded


@jit
def _route(logits: Any, stride: Any, tokens: Any, experts: Any, score: Any, chosen: Any, first: Any) -> None:
    """Each token's best expert, the sigmoid of its logit, and in first[e + 1] the number of tokens of expert e."""
    for t in range(tokens):
        best, value = 0, widen(logits[t * stride])
        for e in range(1, experts):
            other = widen(logits[t * stride + e])
            if other > value:
                best, value = e, other
        chosen[t] = best
        first[best + 1] += 1
        score[t] = narrow(np.float32(1.0 / (1.0 + math.exp(-np.float64(value)))), np.uint16(0))


@jit
def _add_groups(table: Any, count: Any, weight: Any, begin: Any, rows: Any, most: Any) -> Any:
    """Groups of at most `most` rows; returns how many there are now."""
    for low in range(0, rows, most):
        entry = 1 + 3 * count
        table[entry], table[entry + 1], table[entry + 2] = weight, begin + low, min(most, rows - low)
        count += 1
    return count


@parallel.Kernel
def _dispatch(job: Any) -> None:
    """In one thread; the arguments are those that `dispatch` gives."""
    args = elements_at(job, _I64)
    tokens, experts, most = args[3], args[4], args[9]
    order, table = elements_at(args[6], _I64), elements_at(args[7], _I64)
    chosen, first = np.empty(tokens, np.int32), np.zeros(experts + 1, np.int64)
    logits, score = elements_at(args[2], np.uint16(0)), elements_at(args[5], np.uint16(0))
    _route(logits, args[10], tokens, experts, score, chosen, first)
    count = 0
    for e in range(experts):
        count = _add_groups(table, count, e, first[e], first[e + 1], most)
        first[e + 1] += first[e]
    for t in range(tokens):
        order[first[chosen[t]]] = t
        first[chosen[t]] += 1
    if args[8]:
        count = _add_groups(table, count, experts, tokens, tokens, most)
    table[0] = count


def dispatch(logits: torch.Tensor, with_shared: bool, size: int) -> tuple[torch.Tensor, torch.Tensor, Groups]:
    """Top-1 routing: router logits bfloat16 [T, E] → (score bfloat16 [T] = sigmoid of the best logit, order int64 [T]
    by expert, the experts' groups). with_shared: rows T … 2T - 1 are groups of weight E. `size`: largest K to come."""
    tokens, experts = logits.shape
    most = block_rows(size)
    groups = min(tokens, experts) + tokens // most + (-(-tokens // most) if with_shared else 0)
    score, order = logits.new_empty(tokens), torch.empty(tokens, dtype=torch.int64)
    table = torch.empty(1 + 3 * groups, dtype=torch.int64)
    stride = logits.stride(0)
    parallel.run(_dispatch, 1, logits, tokens, experts, score, order, table, int(with_shared), most, stride)
    return score, order, Groups(table, groups)


def fits(x: torch.Tensor) -> bool:
    """True where x [R, K] can meet weights in panels: on the CPU, bfloat16, each row in one piece."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(1) == 1
