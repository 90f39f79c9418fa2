"""bfloat16 products with weights packed in panels: one call computes every group (expert) of a layer.

The rows of a group are cut into tiles of at most 12; a work item is a few neighbouring panels of one group, through
which every tile goes while they lie in the cache. Needs AVX512-BF16.
Legend: R rows of x, N out features, K in features, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel, reference
from batch.kernels.cpu_activations import quantize_rows
from batch.kernels.cpu_routing import Groups
from batch.kernels.linears import HALF, PANEL, PANEL_GROUP, PanelFp8Linear, PanelLinear, Panels
from batch.kernels.panel_runners import BF16, FP8, INT4, INT8, runner
from batch.kernels.panel_tiles import (
    AHEAD_BYTES,
    LINE_BYTES,
    MAX_ROWS,
    call_tile,
    expand_fp8,
    expand_int4,
)
from batch.kernels.simd import elements_at, jit, take_item

ITEM_BYTES = 512 * 1024  # of weights, half of a usual L2 cache
MOST_PANELS = 4  # per item
EXPAND_ROWS = 2 * MAX_ROWS  # INT4 panels that meet more rows than this are expanded to bfloat16 once
ALIAS_BYTES = 4096  # rows this far apart fall into the same lines of the L1 cache
_I64 = np.int64(0)


@jit
def _place_rows(outs: Any, out: Any, out_bytes: Any, order: Any, ordered: Any, begin: Any, end: Any) -> None:
    """Addresses of the rows of the result that rows begin … end - 1 go to."""
    for row in range(begin, end):
        outs[row - begin] = out + (order[row] if row < ordered else row) * out_bytes


@parallel.Kernel
def _product(job: Any) -> None:
    """Items of all groups; the arguments are those that `product` gives."""
    args = elements_at(job, _I64)
    x, x_bytes, tail, tail_row, tail_bytes = args[2], args[3], args[4], args[5], args[6]
    out, out_bytes, order, ordered = args[7], args[8], elements_at(args[9], _I64), args[10]
    table, addresses = elements_at(args[11], _I64), elements_at(args[12], _I64)
    kind, gated, size, panels, panel_bytes, scale_bytes = args[13], args[14], args[15], args[16], args[17], args[18]
    per_item, per_group, x_scale, x_base, x_scale_bytes = args[19], args[20], args[21], args[22], args[23]
    run, run_dense, ones, groups = args[24], args[25], args[26], size // PANEL_GROUP
    width = 2 * HALF if gated else 2 * PANEL  # bytes of a row that one panel gives
    expanded = args[27] + take_item(job + 8 * 28) * (size // 2) * LINE_BYTES
    sums, outs = np.empty(MAX_ROWS * PANEL, np.float32), np.empty(MAX_ROWS, np.int64)
    at_sums, at_outs, items = sums.ctypes.data, outs.ctypes.data, table[0] * per_group
    following = take_item(job)
    while following < items:
        item, following = following, take_item(job)
        entry, first = 1 + 3 * (item // per_group), item % per_group * per_item
        group, begin, rows = table[entry], table[entry + 1], table[entry + 2]
        w, scale = addresses[2 * group] + first * panel_bytes, addresses[2 * group + 1] + first * scale_bytes
        source, row_bytes = x + begin * x_bytes, x_bytes
        if begin >= tail_row:
            source, row_bytes = tail + (begin - tail_row) * tail_bytes, tail_bytes
        tiles, count, target = (rows + MAX_ROWS - 1) // MAX_ROWS, min(per_item, panels - first), out + first * width
        next_w = w + count * panel_bytes
        if following < items:
            next_group, next_first = table[1 + 3 * (following // per_group)], following % per_group * per_item
            next_w = addresses[2 * next_group] + next_first * panel_bytes
        if kind == FP8 or (kind == INT4 and rows > EXPAND_ROWS):
            for p in range(count):
                panel, factors = w + p * panel_bytes, scale + p * scale_bytes
                ahead = panel + panel_bytes if p + 1 < count else next_w
                if kind == FP8:
                    expand_fp8(panel, size // 4, expanded)
                else:
                    expand_int4(panel, factors, groups, expanded)
                    factors = ones
                for tile in range(tiles):
                    low, high = rows * tile // tiles, rows * (tile + 1) // tiles
                    _place_rows(outs, target + p * width, out_bytes, order, ordered, begin + low, begin + high)
                    at, row_scale = source + low * row_bytes, x_scale + (begin + low) * x_scale_bytes
                    part = panel_bytes // tiles // 64 * 64  # of the next panel, which this tile asks for
                    call_tile(
                        run_dense, high - low, at, row_bytes, row_scale, 0, expanded, factors, size, at_sums, at_outs,
                        gated, ahead + tile * part, part // (size // 2),
                    )  # fmt: skip
            continue
        for tile in range(tiles):
            low, high = rows * tile // tiles, rows * (tile + 1) // tiles
            _place_rows(outs, target, out_bytes, order, ordered, begin + low, begin + high)
            at, taken, at_scale = source + low * row_bytes, high - low, (begin + low) * x_scale_bytes
            # The first tile asks for its own panels a little ahead, the others for a part of the next item's.
            part = panel_bytes // max(tiles - 1, 1) // 64 * 64
            for p in range(count):
                ahead, ahead_bytes = w + p * panel_bytes + AHEAD_BYTES, LINE_BYTES
                if tile > 0:
                    ahead, ahead_bytes = next_w + p * panel_bytes + (tile - 1) * part, part // (size // 2)
                call_tile(
                    run, taken, at, row_bytes, x_scale + at_scale, x_base + at_scale, w + p * panel_bytes,
                    scale + p * scale_bytes, size, at_sums, at_outs, gated, ahead, ahead_bytes,
                )  # fmt: skip
                for m in range(taken):
                    outs[m] += width


_ONES = torch.ones(PANEL)
_ONES_AT = _ONES.data_ptr()


@dataclass(frozen=True)
class Bank:
    """Where the weights of one product's groups lie: all of one kind and shape. addresses int64 [G, 2].

    It does not keep the weights alive.
    """

    addresses: torch.Tensor
    kind: int
    gated: bool
    dynamic_activations: bool
    in_features: int
    width: int  # features of the result
    panels: int
    panel_bytes: int
    scale_bytes: int
    per_item: int

    @functools.cached_property
    def per_group(self) -> int:
        """Items of one group."""
        return -(-self.panels // self.per_item)

    @functools.cached_property
    def fixed(self) -> tuple[int, ...]:
        """The kernel's arguments that are the same in every call."""
        return (
            self.addresses.data_ptr(), self.kind, int(self.gated), self.in_features, self.panels, self.panel_bytes,
            self.scale_bytes, self.per_item, self.per_group,
        )  # fmt: skip

    @staticmethod
    def of(weights: Sequence[object]) -> Bank:
        """`weights` are `same_kind`."""
        parts = [weight for weight in weights if isinstance(weight, Panels)]
        first, kind = parts[0], _kind(parts[0])
        panels, panel_bytes = first.words.shape[0], first.words.stride(0) * 4
        per_item = max(1, min(MOST_PANELS, ITEM_BYTES // panel_bytes, panels // (4 * torch.get_num_threads())))
        return Bank(
            torch.tensor([(words, scale or _ONES_AT) for words, scale in (part.addresses() for part in parts)]),
            kind, first.gated, isinstance(first, PanelFp8Linear) and first.dynamic_activations,
            first.in_features, first.out_features // (2 if first.gated else 1), panels, panel_bytes,
            0 if isinstance(first, PanelLinear) else first.scale.stride(0) * first.scale.element_size(), per_item,
        )  # fmt: skip


def _kind(weight: Panels) -> int:
    if isinstance(weight, PanelLinear):
        return BF16
    if isinstance(weight, PanelFp8Linear):
        return FP8
    return INT8 if weight.int8_activations else INT4


def _traits(weight: Panels) -> tuple[object, ...]:
    dynamic = isinstance(weight, PanelFp8Linear) and weight.dynamic_activations
    return _kind(weight), dynamic, weight.gated, weight.out_features, weight.words.shape


def same_kind(weights: Sequence[object]) -> bool:
    """True where `weights` can be one Bank."""
    first = weights[0]
    return isinstance(first, Panels) and all(isinstance(w, Panels) and _traits(w) == _traits(first) for w in weights)


def product(
    xs: tuple[torch.Tensor, ...], bank: Bank, groups: Groups, order: torch.Tensor | None = None, spread: bool = False
) -> torch.Tensor:
    """Rows of x bfloat16 [R, K] times their group's weight → bfloat16 [R, N], or silu(gate) · up where it is gated.

    xs: one or two tensors whose rows are numbered through; no group has rows of both. `order` int64 [≤ R]: row r of the
    product goes to row order[r] of the result; rows without an entry stay where they are.
    spread: the result, meant for another product, may have rows that are not contiguous with one another.
    """
    rows, values = sum(part.shape[0] for part in xs), xs
    scales: tuple[int | torch.Tensor, int | torch.Tensor, int] = (_ONES_AT, 0, 0)
    if bank.kind == INT8:
        q = quantize_rows(xs)
        values, scales = (q.values,), (q.scale, q.base, q.scale.stride(0) * 4)
    elif bank.dynamic_activations:
        quantized = [reference.quantize_fp8_tokens(part) for part in xs]
        values, scales = tuple(part for part, _ in quantized), (torch.cat([scale for _, scale in quantized]), 0, 4)
    x, tail = values[0], values[-1]
    room = bank.panels * (HALF if bank.gated else PANEL)  # columns that are written
    if spread and room * 2 % ALIAS_BYTES == 0:
        room += PANEL
    out = torch.empty((rows, room), dtype=torch.bfloat16)
    places = (0, 0) if order is None else (order, order.shape[0])
    parallel.run(
        _product, groups.most * bank.per_group, x, _row_bytes(x), tail, x.shape[0], _row_bytes(tail), out, room * 2,
        *places, groups.table, *bank.fixed, *scales, runner(bank.kind), runner(BF16), _ONES_AT,
        _scratch(bank.in_features), 0,
    )  # fmt: skip
    return out if room == bank.width else out[:, : bank.width]


def _row_bytes(x: torch.Tensor) -> int:
    return x.stride(0) * x.element_size()


_expanded = torch.empty(0, dtype=torch.int32)


def _scratch(size: int) -> torch.Tensor:
    """Room for one expanded panel of K = size per thread."""
    global _expanded
    needed = torch.get_num_threads() * size * HALF
    if len(_expanded) < needed:
        _expanded = torch.empty(needed, dtype=torch.int32)
    return _expanded


def fits(x: torch.Tensor) -> bool:
    """True where x [R, K] can meet weights in panels: on the CPU, bfloat16, each row in one piece."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.stride(1) == 1
