"""Packing weights in panels (linears.py has the layout) for the CPU's bfloat16 kernels.

Legend: N out features (gate and up together), K in features, P = N / 32 panels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.linears import HALF, PANEL, PANEL_GROUP, PanelFp8Linear, PanelInt4Linear, PanelLinear
from batch.kernels.pack_tiles import SIDE, pair_tile, turn_tile
from batch.kernels.panel_tiles import LINE_BYTES
from batch.kernels.simd import elements_at, jit, take_item
from batch.kernels.vector_ir import has_avx512_vnni
from l4tool.core.pages import fresh_pages

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
    """Sources are [rows, K] with neighbouring k in neighbouring words: `words` of 4 bytes a row. Items: half panels.

    The arguments are those that `_pack` gives.
    """
    args = elements_at(job, _I64)
    items, words, out, sources, ends = args[1], args[2], args[3], elements_at(args[4], _I64), elements_at(args[5], _I64)
    gated, int4, panels, parts = args[6] != 0, args[7] != 0, args[8], args[9]
    while True:
        item = take_item(job)
        if item >= items:
            return
        weight, half = item // (2 * panels), item % (2 * panels)
        part, row, columns = _half_source(half // 2, half % 2, ends, gated)
        stride = sources[2 * (weight * parts + part) + 1]
        base = sources[2 * (weight * parts + part)] + row * stride
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
    k, a few neighbouring ones, so that the source is read in long runs. The arguments are those that `_pack` gives."""
    args = elements_at(job, _I64)
    items, pairs, out, sources, ends = args[1], args[2], args[3], elements_at(args[4], _I64), elements_at(args[5], _I64)
    gated, panels, parts, per_weight = args[6] != 0, args[8], args[9], args[10]
    while True:
        item = take_item(job)
        if item >= items:
            return
        weight, first = item // per_weight, item % per_weight * PAIRS_PER_ITEM
        for half in range(2 * panels):
            part, row, columns = _half_source(half // 2, half % 2, ends, gated)
            stride = sources[2 * (weight * parts + part) + 1]
            for j in range(first, min(first + PAIRS_PER_ITEM, pairs)):
                low = sources[2 * (weight * parts + part)] + 2 * j * stride + 2 * row
                to = out + ((weight * panels + half // 2) * pairs + j) * LINE_BYTES + half % 2 * (LINE_BYTES // 2)
                if columns == HALF:
                    pair_tile(low, low + stride, to)
                else:
                    for c in range(columns):
                        elements_at(to, _U16)[2 * c] = elements_at(low, _U16)[c]
                        elements_at(to, _U16)[2 * c + 1] = elements_at(low + stride, _U16)[c]


def packs(rows: Sequence[int], size: int, gated: bool) -> bool:
    """True where dense weights [rows[i], size] over one input can be packed. A single one may end in a part of a
    panel."""
    return size % MIN_K == 0 and (whole(rows, gated) or (len(rows) == 1 and not gated))


def packs_int4(rows: Sequence[int], size: int, gated: bool, group_size: int | None) -> bool:
    """The same for INT4 weights with scales for `group_size` k."""
    return group_size == PANEL_GROUP and size % PANEL_GROUP == 0 and whole(rows, gated)


def packs_fp8(rows: Sequence[int], size: int, gated: bool) -> bool:
    """The same for FP8 weights."""
    return size % (4 * SIDE) == 0 and whole(rows, gated)


def whole(rows: Sequence[int], gated: bool) -> bool:
    """True where parts of so many rows end where (half) panels do."""
    return all(n % (HALF if gated else PANEL) == 0 for n in rows)


def pack_dense(
    weights: Sequence[Sequence[torch.Tensor]], gated: bool, out: torch.Tensor | None = None
) -> list[PanelLinear]:
    """bfloat16 weights of one shape, each of one or more parts [rows, K] over the same input, into panels.

    gated: the parts are (gate, up). Parts lie in memory by rows or (transposed views) by columns. `out` int32
    [weights, P, K/2, 32]: where they go.
    """
    rows, size = sum(part.shape[0] for part in weights[0]), weights[0][0].shape[1]
    words = empty_words((len(weights), *panel_shape(rows, size))) if out is None else out
    if rows % PANEL:
        words[:, -1] = 0
    if all(part.stride(0) == 1 and part.shape[0] > 1 for parts in weights for part in parts):
        _pack(weights, words, gated, by_columns=True)
    else:
        _pack([[_by_rows(part) for part in parts] for parts in weights], words, gated)
    return [PanelLinear(panels, gated, rows) for panels in words]


def has_int8() -> bool:
    """True where this CPU multiplies int8 activations with INT4 panels."""
    return has_avx512_vnni()


def pack_int4(
    packed: Sequence[Sequence[torch.Tensor]],
    scales: Sequence[Sequence[torch.Tensor]],
    gated: bool,
    int8_activations: bool = False,
) -> list[PanelInt4Linear]:
    """compressed-tensors INT4 weights of one shape, each of one or more parts (packed int32 [rows, K/8], scale bfloat16
    [rows, K/128]), into panels."""
    rows, count = sum(part.shape[0] for part in packed[0]), packed[0][0].shape[1]
    words = empty_words((len(packed), rows // PANEL, count, PANEL))
    _pack([[_by_rows(part) for part in parts] for parts in packed], words, gated, int4=True)
    factors = torch.stack([_scale_panels(parts, gated) for parts in scales])  # [weights, P, K/128, 32]
    return [PanelInt4Linear(*both, gated, int8_activations) for both in zip(words, factors, strict=True)]


def pack_fp8(
    weights: Sequence[Sequence[torch.Tensor]],
    scales: Sequence[Sequence[torch.Tensor]],
    gated: bool,
    dynamic_activations: bool,
) -> list[PanelFp8Linear]:
    """FP8 weights of one shape, each of one or more parts (float8_e4m3fn [rows, K], scale [rows, 1] or one number),
    into panels."""
    rows, count = sum(part.shape[0] for part in weights[0]), weights[0][0].shape[1] // 4
    words = empty_words((len(weights), rows // PANEL, count, PANEL))
    _pack([[part.contiguous() for part in parts] for parts in weights], words, gated)
    made = []
    for panels, parts, factors in zip(words, weights, scales, strict=True):
        columns = [f.float().reshape(-1, 1).expand(len(p), 1) for p, f in zip(parts, factors, strict=True)]
        made.append(
            PanelFp8Linear(panels, _scale_panels(columns, gated)[:, 0].contiguous(), gated, dynamic_activations)
        )
    return made


def _scale_panels(scales: Sequence[torch.Tensor], gated: bool) -> torch.Tensor:
    """Scales of the parts [rows, groups] → [P, groups, 32]."""
    if gated:
        joined = torch.cat([scale.unflatten(0, (-1, HALF)) for scale in scales], dim=1)  # [P, 32, groups]
    else:
        joined = torch.cat(list(scales)).unflatten(0, (-1, PANEL))
    return joined.transpose(1, 2)


def panel_shape(rows: int, size: int) -> tuple[int, int, int]:
    """Of the words of a dense weight [rows, size]."""
    return -(-rows // PANEL), size // 2, PANEL


def empty_words(shape: tuple[int, ...]) -> torch.Tensor:
    """An int32 tensor that starts on a cache line; a large one lies in huge pages."""
    return torch.frombuffer(fresh_pages(4 * math.prod(shape)), dtype=torch.int32).view(shape)


def _by_rows(part: torch.Tensor) -> torch.Tensor:
    return part if part.stride(1) == 1 else part.contiguous()


def _pack(
    weights: Sequence[Sequence[torch.Tensor]], words: torch.Tensor, gated: bool, int4: bool = False,
    by_columns: bool = False,
) -> None:  # fmt: skip
    """Parts [rows, K] of bfloat16, of FP8 or of eight INT4 in an int32 → words int32 [weights, P, lines, 32]."""
    count, panels, lines, _ = words.shape
    step = 1 if by_columns else 0
    sources = [
        n for parts in weights for part in parts for n in (part.data_ptr(), part.stride(step) * part.element_size())
    ]
    ends = torch.tensor([0, *np.cumsum([part.shape[0] for part in weights[0]]).tolist(), -1])  # rows before each part
    per_weight = -(-lines // PAIRS_PER_ITEM) if by_columns else 2 * panels
    parallel.run(
        _pack_columns if by_columns else _pack_rows, count * per_weight, lines, words, torch.tensor(sources), ends,
        int(gated), int(int4), panels, len(weights[0]), per_weight,
    )  # fmt: skip
