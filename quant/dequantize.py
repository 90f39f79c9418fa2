"""A Linear as floats, however a checkpoint stores it.

Value = (code - zero point) · scale, each step rounded to the scale's dtype: what the compressed-tensors library
(`quantization/lifecycle/forward_helpers.py`, `_dequantize`) gives, bit for bit, on the CPU.
Legend: R rows that are asked for, C inputs, G scales of a row, b bits of a code.
"""

from __future__ import annotations

import numpy as np
import torch

from converters.quant_config import LinearFormat
from converters.reader import Reader
from l4tool.core.errors import CheckpointError

WORD_BITS = 32
CHUNK_ELEMENTS = 2**20  # converted at a time where plain torch does it: bounds what lies beside the result


def read_linear(reader: Reader, prefix: str, rows: slice | None = None) -> torch.Tensor:
    """Weight [out, in] (or a range of its rows) of the Linear `prefix`, a canonical name without `.weight`.

    Quantized: a new tensor in the scale's dtype, which is what a runtime computes with. Not quantized: what
    `reader.read` gives. Of other rows nothing is read but a word or a block that they share. KeyError if a part of it
    is not there; CheckpointError for a `weight_g_idx` that names groups which do not exist.
    """
    form = reader.linear_format(prefix)
    if form is None:
        return reader.read(f"{prefix}.weight", rows)
    name = f"{prefix}.{form.codes}"
    start, stop, _ = (rows or slice(None)).indices(reader.tensors()[name].shape[0])
    codes = reader.read(name, slice(start, stop))
    scale = _grid(reader, f"{prefix}.weight_scale", form, start, stop)
    zero = _zero_points(reader, prefix, form, start, stop)
    inner = _inputs(reader, prefix, form, scale) if form.packed else codes.shape[1]
    if form.kind == "int4" and form.packed and _in_whole_words(form, inner):
        return int4_floats(codes, scale, zero)
    if form.packed:
        codes = unpack(codes, form.num_bits, inner)
    if form.has_g_idx:
        order = _order(reader, f"{prefix}.weight_g_idx", scale.shape[1])
        return _in_torch(codes, scale, zero, order)
    span = form.block[1] if form.block else form.group_size or inner
    return _expand(codes, scale, zero, span)


def int4_floats(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """packed int32 [R, C/8], scale [R, G], zero points int8 [R, G] → [R, C] in the scale's dtype, as the specification
    has it. Groups are whole words."""
    inner = packed.shape[1] * 8
    if scale.dtype != torch.bfloat16:
        return _expand(unpack(packed, 4, inner), scale, zero, inner // scale.shape[1])
    from quant.kernels.compare import int4_expand

    out = torch.empty((packed.shape[0], inner), dtype=torch.bfloat16)
    zeros = torch.zeros((1, 1), dtype=torch.int8).expand(scale.shape) if zero is None else zero
    bits = [tensor.contiguous().view(torch.int16).numpy().view(np.uint16) for tensor in (scale, out)]
    int4_expand(packed.contiguous().numpy(), bits[0], zeros.contiguous().numpy(), bits[1])
    return out


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [N, ceil(count·b / 32)] → int8 [N, count]: code i of a line is in bits i·b … i·b + b - 1 of its words,
    little-endian, stored as code + 2**(b - 1)."""
    if bits == 8:
        return (words.contiguous().view(torch.uint8)[:, :count] ^ 0x80).view(torch.int8)
    from quant.kernels.expand import unpack_words

    out = torch.empty((len(words), count), dtype=torch.int8)
    unpack_words(words.contiguous().numpy().view(np.uint32), bits, out.numpy())
    return out


def _in_whole_words(form: LinearFormat, inner: int) -> bool:
    """The fast INT4 kernel's case: each scale is for the same number of whole words of a row."""
    if form.has_g_idx or form.strategy not in ("group", "channel"):
        return False
    if form.group_size is not None:
        return form.group_size % 8 == 0
    return inner % 8 == 0


def _inputs(reader: Reader, prefix: str, form: LinearFormat, scale: torch.Tensor) -> int:
    """C: packed codes do not tell it, as the last word may be filled up."""
    if form.group_size is not None:
        return scale.shape[1] * form.group_size
    return int(reader.read(f"{prefix}.weight_shape")[1])


def _grid(reader: Reader, name: str, form: LinearFormat, start: int, stop: int) -> torch.Tensor:
    """Scales, or zero points that are not packed, of the rows: [R, G]."""
    if form.strategy == "tensor":
        return reader.read(name).view(1, 1).expand(stop - start, 1)
    if form.block is None:
        return reader.read(name, slice(start, stop))
    height = form.block[0]
    first = start // height
    blocks = reader.read(name, slice(first, -(-stop // height)))
    return blocks.repeat_interleave(height, 0)[start - first * height : stop - first * height]


def _zero_points(reader: Reader, prefix: str, form: LinearFormat, start: int, stop: int) -> torch.Tensor | None:
    """int8 (of FP8: e4m3fn) [R, G]. Packed ones lie end to end along the outputs: 32 of them fill b whole words."""
    if form.symmetric:
        return None
    name = f"{prefix}.weight_zero_point"
    if not form.packed or form.strategy not in ("group", "channel"):
        return _grid(reader, name, form, start, stop)
    bits, first = form.num_bits, start // WORD_BITS
    words = reader.read(name, slice(first * bits, -(-stop * bits // WORD_BITS)))  # [W, G]
    codes = unpack(words.T, bits, stop - first * WORD_BITS).T  # [R + what precedes it in its words, G]
    return codes[start - first * WORD_BITS :]


def _order(reader: Reader, name: str, groups: int) -> torch.Tensor:
    """The group of each column, int64 [C]."""
    order = reader.read(name).long()
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < groups:
        file = reader.tensors()[name].file
        raise CheckpointError(
            f"{file}: tensor {name!r} holds {int(order.min())} … {int(order.max())}, there are {groups} groups",
            hint="the checkpoint is damaged; fetch it again",
        )
    return order


def _columns(scale: torch.Tensor, span: int, count: int) -> torch.Tensor:
    """The group of each column where `span` neighbours share one."""
    return torch.arange(count) // span


def _expand(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, span: int) -> torch.Tensor:
    """codes int8 or e4m3fn [R, C], scale and zero points [R, G], `span` neighbours sharing one → [R, C]."""
    is_fp8 = codes.dtype == torch.float8_e4m3fn
    exact = scale.dtype == torch.float32
    if scale.dtype == torch.float16 or (is_fp8 and zero is not None):
        return _in_torch(codes, scale, zero, _columns(scale, span, codes.shape[1]))
    from quant.kernels.expand import expand_fp8, expand_int8

    out = torch.empty(codes.shape, dtype=scale.dtype)
    bits, wide = np.empty((0, 0), np.uint16), np.empty((0, 0), np.float32)
    outputs = (bits, out.numpy()) if exact else (out.view(torch.int16).numpy().view(np.uint16), wide)
    scales = scale.float().contiguous().numpy()
    if is_fp8:
        expand_fp8(codes.contiguous().view(torch.uint8).numpy(), scales, span, not exact, *outputs)
    else:
        zeros = np.zeros(scale.shape, np.float32) if zero is None else zero.float().contiguous().numpy()
        expand_int8(codes.contiguous().numpy(), scales, zeros, span, not exact, *outputs)
    return out


def _in_torch(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor:
    """As `_expand`, column c belonging to group order[c]."""
    out = torch.empty(codes.shape, dtype=scale.dtype)
    for rows in _chunks(*codes.shape):
        value = codes[rows].to(scale.dtype)
        if zero is not None:
            value -= zero[rows].to(scale.dtype)[:, order]
        torch.mul(value, scale[rows][:, order], out=out[rows])
    return out


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(CHUNK_ELEMENTS // max(columns, 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
