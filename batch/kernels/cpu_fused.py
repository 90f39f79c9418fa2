"""Element-wise CPU kernels, float32 and bfloat16, each one pass over memory, rounding where the reference rounds.

Legend: T tokens, H hidden, I intermediate, A heads, K kv heads, D head_dim. A work item is a few tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batch.kernels import parallel
from batch.kernels.paging import LayerCache
from batch.kernels.row_tiles import add_norm_row, scale_row, turn_head
from batch.kernels.simd import bits_to_float, elements_at, jit, narrow, silu_f32, take_item, widen

WHOLE = 32  # bfloat16 in a vector: rows of so many, or a multiple, go through row_tiles
TOKENS = 32  # per work item: a small step is not worth waking other threads
_I64, _I32, _U16, _F32 = np.int64(0), np.int32(0), np.uint16(0), np.float32(0)

_norm_row_0, _norm_row_1, _norm_row_2 = add_norm_row(0), add_norm_row(1), add_norm_row(2)
_turn_plain, _turn_normed = turn_head(False), turn_head(True)


@jit
def _sum_squares(x: Any, size: Any) -> Any:
    """float32 sum of x[i]² over 16 running sums, so that it vectorises and its order is fixed."""
    lanes = np.zeros(16, np.float32)
    whole = size // 16 * 16
    for start in range(0, whole, 16):
        for i in range(16):
            lanes[i] += x[start + i] * x[start + i]
    total = np.float32(0.0)
    for i in range(16):
        total += lanes[i]
    for i in range(whole, size):
        total += x[i] * x[i]
    return total


@jit
def _add_rms_norm(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, tokens, size, eps = args[1], args[2], args[3], bits_to_float(np.int32(args[4]))
    x, weight, out = elements_at(args[5], like), elements_at(args[6], like), elements_at(args[7], like)
    first, has_first = elements_at(args[8], like), args[8] != 0
    second, has_second = elements_at(args[9], like), args[9] != 0
    wide = np.empty(size, np.float32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            at = token * size
            if has_second:
                for i in range(size):
                    delta = widen(narrow(widen(first[at + i]) + widen(second[at + i]), like))
                    x[at + i] = narrow(widen(x[at + i]) + delta, like)
            elif has_first:
                for i in range(size):
                    x[at + i] = narrow(widen(x[at + i]) + widen(first[at + i]), like)
            for i in range(size):
                wide[i] = widen(x[at + i])
            factor = np.float32(1.0) / np.sqrt(_sum_squares(wide, size) / np.float32(size) + eps)
            for i in range(size):
                out[at + i] = narrow(widen(narrow(wide[i] * factor, like)) * widen(weight[i]), like)


@parallel.Kernel
def _add_rms_norm_rows(job: Any) -> None:
    """`_add_rms_norm` for bfloat16 rows of whole vectors."""
    args = elements_at(job, _I64)
    items, tokens, row_bytes, eps = args[1], args[2], 2 * args[3], bits_to_float(np.int32(args[4]))
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            at = token * row_bytes
            x, out = args[5] + at, args[7] + at
            if args[9] != 0:
                _norm_row_2(x, args[8] + at, args[9] + at, args[6], out, args[3], eps)
            elif args[8] != 0:
                _norm_row_1(x, args[8] + at, 0, args[6], out, args[3], eps)
            else:
                _norm_row_0(x, 0, 0, args[6], out, args[3], eps)


@jit
def _silu_mul(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, tokens, size = args[1], args[2], args[3]
    x, out = elements_at(args[4], like), elements_at(args[5], like)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            gate, up, at = 2 * token * size, 2 * token * size + size, token * size
            for i in range(size):
                silu = widen(narrow(silu_f32(widen(x[gate + i])), like))
                out[at + i] = narrow(silu * widen(x[up + i]), like)


@jit
def _rotate_head(source: Any, at: Any, dim: Any, cos: Any, sin: Any, eps: Any, like: Any, head: Any) -> None:
    """One head of D values at source[at:], rotated and, when eps >= 0, normalised, into float32 head [D]."""
    half = dim // 2
    for i in range(half):
        even, odd = widen(source[at + 2 * i]), widen(source[at + 2 * i + 1])
        head[2 * i] = widen(narrow(even * cos[i] - odd * sin[i], like))
        head[2 * i + 1] = widen(narrow(even * sin[i] + odd * cos[i], like))
    if eps >= np.float32(0.0):
        factor = np.float32(1.0) / np.sqrt(_sum_squares(head, dim) / np.float32(dim) + eps)
        for i in range(dim):
            head[i] *= factor


@jit
def _packed_head(slot: Any, head: Any, kv_heads: Any, block_size: Any, dim: Any) -> Any:
    """Place of a kv head's first element in the packed block of `slot`; see `paging.LayerCache`."""
    return (slot // block_size * kv_heads + head) * block_size * dim


@jit
def _store_values(
    qkv: Any, at: Any, values: Any, slot: Any, kv_heads: Any, block_size: Any, dim: Any, packed: Any
) -> None:
    """Values [K, D] at qkv[at:] to their slot; packed, they are every other element beside those of a second key."""
    if packed:
        offset = slot % block_size
        for h in range(kv_heads):
            first = _packed_head(slot, h, kv_heads, block_size, dim) + offset // 2 * 2 * dim + offset % 2
            for i in range(dim):
                values[first + 2 * i] = qkv[at + h * dim + i]
    else:
        for i in range(kv_heads * dim):
            values[slot * kv_heads * dim + i] = qkv[at + i]


@jit
def _store_qkv(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, tokens, heads, kv_heads, dim = args[1], args[2], args[3], args[4], args[5]
    qkv, q_out = elements_at(args[6], like), elements_at(args[7], like)
    keys, values, slots = elements_at(args[8], like), elements_at(args[9], like), elements_at(args[10], _I64)
    cos, sin, rope = args[11], args[12], args[11] != 0
    eps = bits_to_float(np.int32(args[13]))
    q_scale, scaled = elements_at(args[14], _F32), args[14] != 0
    block_size, packed = args[15], args[16] != 0
    head = np.empty(dim, np.float32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            source = token * (heads + 2 * kv_heads) * dim
            slot = slots[token]
            c, s = elements_at(cos + token * dim * 2, _F32), elements_at(sin + token * dim * 2, _F32)
            for h in range(heads + kv_heads):
                at = source + h * dim
                if rope:
                    _rotate_head(qkv, at, dim, c, s, eps, like, head)
                else:
                    factor = q_scale[token] if scaled and h < heads else np.float32(1.0)
                    for i in range(dim):
                        head[i] = widen(qkv[at + i]) * factor
                if h < heads:
                    for i in range(dim):
                        q_out[(token * heads + h) * dim + i] = narrow(head[i], like)
                elif packed:
                    first = _packed_head(slot, h - heads, kv_heads, block_size, dim) + slot % block_size * 2
                    for i in range(dim // 2):
                        keys[first + 2 * block_size * i] = narrow(head[2 * i], like)
                        keys[first + 2 * block_size * i + 1] = narrow(head[2 * i + 1], like)
                else:
                    first = (slot * kv_heads + h - heads) * dim
                    for i in range(dim):
                        keys[first + i] = narrow(head[i], like)
            at = source + (heads + kv_heads) * dim
            _store_values(qkv, at, values, slot, kv_heads, block_size, dim, packed)


@parallel.Kernel
def _store_qkv_rows(job: Any) -> None:
    """`_store_qkv` for bfloat16 heads of whole vectors."""
    args = elements_at(job, _I64)
    items, tokens, heads, kv_heads, dim = args[1], args[2], args[3], args[4], args[5]
    slots, q_scale, eps = elements_at(args[10], _I64), elements_at(args[14], _F32), bits_to_float(np.int32(args[13]))
    block_size, packed, head_bytes = args[15], args[16] != 0, 2 * dim
    scratch, turned = np.empty(dim, np.float32), np.empty(dim, np.uint16)
    at_scratch, words = scratch.ctypes.data, elements_at(turned.ctypes.data, _I32)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            source, slot = args[6] + token * (heads + 2 * kv_heads) * head_bytes, slots[token]
            cos, sin = args[11] + token * dim * 2, args[12] + token * dim * 2
            for h in range(heads + kv_heads):
                at, out = source + h * head_bytes, args[7] + (token * heads + h) * head_bytes
                if h >= heads:
                    plain = args[8] + (slot * kv_heads + h - heads) * head_bytes
                    out = turned.ctypes.data if packed else plain
                if args[11] == 0:
                    factor = q_scale[token] if args[14] != 0 and h < heads else np.float32(1.0)
                    scale_row(at, factor, out, dim)
                elif eps >= np.float32(0.0):
                    _turn_normed(at, cos, sin, at_scratch, out, dim, eps)
                else:
                    _turn_plain(at, cos, sin, at_scratch, out, dim, eps)
                if h >= heads and packed:
                    first = _packed_head(slot, h - heads, kv_heads, block_size, dim) // 2 + slot % block_size
                    keys = elements_at(args[8], _I32)
                    for i in range(dim // 2):
                        keys[first + block_size * i] = words[i]
            qkv, values = elements_at(args[6], _U16), elements_at(args[9], _U16)
            at = (token * (heads + 2 * kv_heads) + heads + kv_heads) * dim
            _store_values(qkv, at, values, slot, kv_heads, block_size, dim, packed)


@jit
def _gather_scaled(job: Any, like: Any) -> None:
    args = elements_at(job, _I64)
    items, tokens, size = args[1], args[2], args[3]
    x, score, order = elements_at(args[4], like), elements_at(args[5], like), elements_at(args[6], _I64)
    out = elements_at(args[7], like)
    while True:
        item = take_item(job)
        if item >= items:
            return
        for token in range(item * TOKENS, min(item * TOKENS + TOKENS, tokens)):
            source, factor, at = order[token] * size, widen(score[order[token]]), token * size
            for i in range(size):
                out[at + i] = narrow(widen(x[source + i]) * factor, like)


@parallel.Kernel
def _gather_scaled_bf16(job: Any) -> None:
    _gather_scaled(job, np.uint16(0))


@parallel.Kernel
def _gather_scaled_f32(job: Any) -> None:
    _gather_scaled(job, np.float32(0))


@parallel.Kernel
def _add_rms_norm_bf16(job: Any) -> None:
    _add_rms_norm(job, np.uint16(0))


@parallel.Kernel
def _add_rms_norm_f32(job: Any) -> None:
    _add_rms_norm(job, np.float32(0))


@parallel.Kernel
def _silu_mul_bf16(job: Any) -> None:
    _silu_mul(job, np.uint16(0))


@parallel.Kernel
def _silu_mul_f32(job: Any) -> None:
    _silu_mul(job, np.float32(0))


@parallel.Kernel
def _store_qkv_bf16(job: Any) -> None:
    _store_qkv(job, np.uint16(0))


@parallel.Kernel
def _store_qkv_f32(job: Any) -> None:
    _store_qkv(job, np.float32(0))


_ADD_RMS_NORM = {torch.bfloat16: _add_rms_norm_bf16, torch.float32: _add_rms_norm_f32}
_GATHER_SCALED = {torch.bfloat16: _gather_scaled_bf16, torch.float32: _gather_scaled_f32}
_SILU_MUL = {torch.bfloat16: _silu_mul_bf16, torch.float32: _silu_mul_f32}
_STORE_QKV = {torch.bfloat16: _store_qkv_bf16, torch.float32: _store_qkv_f32}


def fits(x: torch.Tensor) -> bool:
    """True where these kernels can take x: on the CPU, contiguous, float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in _SILU_MUL and x.is_contiguous()


def _items(tokens: int) -> int:
    return -(-tokens // TOKENS)


def add_rms_norm(
    residual: torch.Tensor, deltas: tuple[torch.Tensor, ...], weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.add_rms_norm`."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    first = deltas[0] if deltas else 0
    second = deltas[1] if len(deltas) > 1 else 0
    rows = residual.dtype == torch.bfloat16 and size % WHOLE == 0
    kernel = _add_rms_norm_rows if rows else _ADD_RMS_NORM[residual.dtype]
    parallel.run(
        kernel, _items(tokens), tokens, size, parallel.float_bits(eps), residual, weight, out, first, second,
    )  # fmt: skip
    return out


def gather_scaled(x: torch.Tensor, score: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, H] = x[order] · score[order], for x [T, H], score [T], order int64 [T]."""
    tokens, size = x.shape
    parallel.run(_GATHER_SCALED[x.dtype], _items(tokens), tokens, size, x, score, order, out)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `reference.silu_mul`."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, size))
    parallel.run(_SILU_MUL[gate_up.dtype], _items(tokens), tokens, size, gate_up, out)
    return out


def store_qkv(
    qkv: torch.Tensor, num_heads: int, cache: LayerCache, slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None, norm_eps: float | None, q_scale: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """As `reference.store_qkv`."""
    tokens, kv_heads, dim = qkv.shape[0], cache.num_kv_heads, cache.head_dim
    q = qkv.new_empty((tokens, num_heads, dim))
    cos, sin = (0, 0) if rotation is None else rotation
    kernel = _store_qkv_rows if qkv.dtype == torch.bfloat16 and dim % WHOLE == 0 else _STORE_QKV[qkv.dtype]
    parallel.run(
        kernel, _items(tokens), tokens, num_heads, kv_heads, dim, qkv, q, cache.k, cache.v, slots,
        cos, sin, parallel.float_bits(-1.0 if norm_eps is None else norm_eps), 0 if q_scale is None else q_scale,
        cache.block_size, int(cache.packed),
    )  # fmt: skip
    return q
