"""One register tile of any number of rows, by kind of weight: machine code that `cpu_panels` calls by its address."""

from __future__ import annotations

import functools
from typing import Any

from batch.kernels import parallel
from batch.kernels.linears import PANEL_GROUP
from batch.kernels.panel_tiles import dense_tile, int4_tile, int8_tile

BF16, INT4, INT8, FP8 = 0, 1, 2, 3  # kinds: bfloat16 weights, INT4, INT4 for int8 activations, FP8

_dense_1, _dense_2, _dense_3, _dense_4, _dense_5, _dense_6 = (dense_tile(rows) for rows in range(1, 7))
_dense_7, _dense_8, _dense_9, _dense_10, _dense_11, _dense_12 = (dense_tile(rows) for rows in range(7, 13))
_int4_1, _int4_2, _int4_3, _int4_4, _int4_5, _int4_6 = (int4_tile(rows) for rows in range(1, 7))
_int4_7, _int4_8, _int4_9, _int4_10, _int4_11, _int4_12 = (int4_tile(rows) for rows in range(7, 13))

_int8_1, _int8_2, _int8_3, _int8_4, _int8_5, _int8_6 = (int8_tile(rows) for rows in range(1, 7))
_int8_7, _int8_8, _int8_9, _int8_10, _int8_11, _int8_12 = (int8_tile(rows) for rows in range(7, 13))


def _tile_runner(function: Any) -> parallel.Kernel:
    """Compiled on its own, when a weight of its kind is met first: together they take seconds."""
    return parallel.Kernel(function, arguments=13)


@_tile_runner
def _run_dense(
    rows: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any, size: Any, sums: Any, outs: Any,
    gated: Any, ahead: Any, ahead_bytes: Any,
) -> None:  # fmt: skip
    """One tile of 1 to 12 rows: `panel_tiles.dense_tile`."""
    if rows == 12:
        _dense_12(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 11:
        _dense_11(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 10:
        _dense_10(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 9:
        _dense_9(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 8:
        _dense_8(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 7:
        _dense_7(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 6:
        _dense_6(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 5:
        _dense_5(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 4:
        _dense_4(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 3:
        _dense_3(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    elif rows == 2:
        _dense_2(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)
    else:
        _dense_1(x, x_bytes, x_scale, w, scale, size // 2, outs, gated, ahead, ahead_bytes)


@_tile_runner
def _run_int4(
    rows: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any, size: Any, sums: Any, outs: Any,
    gated: Any, ahead: Any, ahead_bytes: Any,
) -> None:  # fmt: skip
    """One tile of 1 to 12 rows: `panel_tiles.int4_tile`."""
    if rows == 12:
        _int4_12(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 11:
        _int4_11(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 10:
        _int4_10(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 9:
        _int4_9(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 8:
        _int4_8(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 7:
        _int4_7(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 6:
        _int4_6(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 5:
        _int4_5(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 4:
        _int4_4(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 3:
        _int4_3(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 2:
        _int4_2(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)
    else:
        _int4_1(x, x_bytes, w, scale, size // PANEL_GROUP, sums, outs, gated)


@_tile_runner
def _run_int8(
    rows: Any, x: Any, x_bytes: Any, x_scale: Any, x_base: Any, w: Any, scale: Any, size: Any, sums: Any, outs: Any,
    gated: Any, ahead: Any, ahead_bytes: Any,
) -> None:  # fmt: skip
    """One tile of 1 to 12 rows: `panel_tiles.int8_tile`."""
    if rows == 12:
        _int8_12(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 11:
        _int8_11(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 10:
        _int8_10(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 9:
        _int8_9(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 8:
        _int8_8(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 7:
        _int8_7(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 6:
        _int8_6(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 5:
        _int8_5(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 4:
        _int8_4(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 3:
        _int8_3(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    elif rows == 2:
        _int8_2(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)
    else:
        _int8_1(x, x_bytes, x_scale, x_base, w, scale, size // PANEL_GROUP, sums, outs, gated)


@functools.cache
def runner(kind: int) -> int:
    """The address of what computes a tile; FP8 panels are expanded to bfloat16."""
    address: int = {BF16: _run_dense, FP8: _run_dense, INT4: _run_int4, INT8: _run_int8}[kind].compiled.address
    return address
