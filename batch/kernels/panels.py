"""Packing weights in panels (linears.py has the layout) for the CPU's bfloat16 kernels.

Legend: N out features (gate and up together), K in features, P = N / 32 panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.linears import HALF, PANEL, PANEL_GROUP, PanelInt4Linear, PanelLinear
from batch.kernels.pack_tiles import SIDE, pair_tile, turn_tile
from batch.kernels.panel_tiles import LINE_BYTES
from batch.kernels.simd import elements_at, jit, take_item
from batch.kernels.tiles import has_avx512_vnni

MIN_K = 32  # bfloat16 k in whole cache lines
PAIRS_PER_ITEM = 4
_I64, _U32, _U16 = np.int64(0), np.uint32(0), np.uint16(0)


@jit
def _half_source(p: Any, half: Any, table: Any, gated: Any) -> Any:
    """(part, first row in it, number of rows) of the up to 16 columns `half` of panel p; table: rows of the parts,
    added up, then -1."""
    if gated:
        return half, p * HALF, HALF
    row, part = p * PANEL + half * HALF, 0
    while row >= table[part + 1] and table[part + 2] >= 0:
        part += 1
    return part, row - table[part], max(min(HALF, table[part + 1] - row), 0)


_turn_words, _turn_int4 = turn_tile(False), turn_tile(True)


@jit
def _pack_part(source: Any, stride: Any, columns: Any, count: Any, target: Any) -> None:
    """What is not a whole tile: `count` words of `columns` rows; the other columns are left alone."""
    for c in range(columns):
        row = elements_at(source + c * stride, _U32)
        for i in range(count):
            elements_at(target + i * LINE_BYTES, _U32)[c] = row[i]


@parallel.Kernel
def _pack_rows(job: Any) -> None:
    """Sources are [rows, K] with neighbouring k in neighbouring words: `words` of 4 bytes a row. Items: half panels."""
    args = elements_at(job, _I64)
    items, words, out = args[1], args[2], args[3]
    sources, ends, gated, int4 = elements_at(args[4], _I64), elements_at(args[5], _I64), args[6] != 0, args[7] != 0
    while True:
        item = take_item(job)
        if item >= items:
            return
        part, row, columns = _half_source(item // 2, item % 2, ends, gated)
        stride = sources[2 * part + 1]
        base = sources[2 * part] + row * stride
        target = out + item // 2 * words * LINE_BYTES + item % 2 * (LINE_BYTES // 2)
        for j in range(0, words, SIDE):
            at, to = base + 4 * j, target + j * LINE_BYTES
            if columns < HALF or j + SIDE > words:
                _pack_part(at, stride, columns, min(SIDE, words - j), to)
            elif int4:
                _turn_int4(at, stride, to, LINE_BYTES)
            else:
                _turn_words(at, stride, to, LINE_BYTES)


@parallel.Kernel
def _pack_columns(job: Any) -> None:
    """Sources are bfloat16 [K, rows], neighbouring rows side by side: what fused experts are on disk. Items: pairs of
    k, a few neighbouring ones, so that the source is read in long runs."""
    args = elements_at(job, _I64)
    items, pairs, out = args[1], args[2], args[3]
    sources, ends, gated, panels = elements_at(args[4], _I64), elements_at(args[5], _I64), args[6] != 0, args[7]
    while True:
        item = take_item(job)
        if item >= items:
            return
        first = item * PAIRS_PER_ITEM
        for half in range(2 * panels):
            part, row, columns = _half_source(half // 2, half % 2, ends, gated)
            stride = sources[2 * part + 1]
            for j in range(first, min(first + PAIRS_PER_ITEM, pairs)):
                low = sources[2 * part] + 2 * j * stride + 2 * row
                to = out + (half // 2 * pairs + j) * LINE_BYTES + half % 2 * (LINE_BYTES // 2)
                if columns == HALF:
                    pair_tile(low, low + stride, to)
                else:
                    for c in range(columns):
                        elements_at(to, _U16)[2 * c] = elements_at(low, _U16)[c]
                        elements_at(to, _U16)[2 * c + 1] = elements_at(low + stride, _U16)[c]


def packs(rows: Sequence[int], size: int, gated: bool, group_size: int | None = None) -> bool:
    """True where weights [rows[i], size] over one input can be packed; `group_size`: that of INT4.

    One dense weight may end in a part of a panel; INT4 and several joined ones must be whole.
    """
    if group_size is not None and (group_size != PANEL_GROUP or size % PANEL_GROUP):
        return False
    whole = all(n % (HALF if gated else PANEL) == 0 for n in rows)
    return (whole or (len(rows) == 1 and group_size is None and not gated)) and size % MIN_K == 0


def pack_dense(parts: Sequence[torch.Tensor], gated: bool, out: torch.Tensor | None = None) -> PanelLinear:
    """bfloat16 weights [rows, K] over the same input → one PanelLinear, into `out` int32 [P, K/2, 32] if given.

    gated: parts are (gate, up). Parts lie in memory by rows or (transposed views) by columns.
    """
    rows, size = sum(part.shape[0] for part in parts), parts[0].shape[1]
    words = torch.empty(panel_shape(rows, size), dtype=torch.int32) if out is None else out
    if rows % PANEL:
        words[-1] = 0
    if all(part.stride(0) == 1 and part.shape[0] > 1 for part in parts):
        sources = [n for part in parts for n in (part.data_ptr(), part.stride(1) * 2)]
        items = -(-(size // 2) // PAIRS_PER_ITEM)
        parallel.run(
            _pack_columns, items, size // 2, words, torch.tensor(sources), _ends(parts), int(gated), len(words)
        )
    else:
        parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
        _run_pack_rows(parts, words, gated, False)
    return PanelLinear(words, gated, rows)


def panel_shape(rows: int, size: int) -> tuple[int, int, int]:
    """Of the words of a dense weight [rows, size]."""
    return -(-rows // PANEL), size // 2, PANEL


def has_int8() -> bool:
    """True where this CPU multiplies int8 activations with INT4 panels."""
    return has_avx512_vnni()


def pack_int4(
    packed: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], gated: bool, int8_activations: bool = False
) -> PanelInt4Linear:
    """compressed-tensors INT4 (packed int32 [rows, K/8], scale bfloat16 [rows, K/128]) → one PanelInt4Linear."""
    rows, count = sum(part.shape[0] for part in packed), packed[0].shape[1]
    words = torch.empty((rows // PANEL, count, PANEL), dtype=torch.int32)
    _run_pack_rows([part.contiguous() for part in packed], words, gated, True)
    if gated:
        halves = [scale.reshape(rows // PANEL, HALF, -1) for scale in scales]
        joined = torch.cat(halves, dim=1)  # [P, 32, K/128]
    else:
        joined = torch.cat(list(scales)).reshape(rows // PANEL, PANEL, -1)
    return PanelInt4Linear(words, joined.transpose(1, 2).contiguous(), gated, int8_activations)


def _run_pack_rows(parts: Sequence[torch.Tensor], words: torch.Tensor, gated: bool, int4: bool) -> None:
    sources = [n for part in parts for n in (part.data_ptr(), part.stride(0) * part.element_size())]
    parallel.run(
        _pack_rows, 2 * len(words), words.shape[1], words, torch.tensor(sources), _ends(parts), int(gated), int(int4)
    )


def _ends(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64: rows before each part, all of them, and -1."""
    return torch.tensor([0, *np.cumsum([part.shape[0] for part in parts]).tolist(), -1])
