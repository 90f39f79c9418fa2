"""A Linear as floats, however a checkpoint stores it."""

from __future__ import annotations

import numpy as np
import torch

from converters.names import canonical_shapes
from converters.quant_config import FOREIGN, LinearFormat
from converters.reader import Reader
from quant import reference


def read_linear(reader: Reader, prefix: str, rows: slice | None = None) -> torch.Tensor:
    """Weight [out, in] (or a range of its rows) of the Linear `prefix`, a canonical name without `.weight`.

    Quantized: a new tensor, code times scale rounded to the scale's dtype, which is what a runtime computes with.
    Not quantized: what `reader.read` gives. KeyError if a part of it is not there.
    """
    form = reader.linear_format(prefix)
    if form is None:
        return reader.read(f"{prefix}.weight", rows)
    if form.kind == FOREIGN:
        out, inner = canonical_shapes(reader.arch)[f"{prefix}.weight"]
        return _foreign(reader, prefix, form, inner, range(*(rows or slice(None)).indices(out)))
    scale = reader.read(f"{prefix}.weight_scale", rows)
    if form.kind == "int4":
        return int4_floats(reader.read(f"{prefix}.weight_packed", rows), scale)
    return reference.fp8_dequantize(reader.read(f"{prefix}.weight", rows), scale)


def int4_floats(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """packed int32 [out, in/8], scale [out, in/g] → [out, in] in the scale's dtype, as the specification has it."""
    if packed.device.type != "cpu" or scale.dtype != torch.bfloat16:
        return reference.int4_dequantize(reference.int4_unpack(packed), scale)
    from quant.kernels.compare import int4_expand

    out = torch.empty((packed.shape[0], packed.shape[1] * 8), dtype=torch.bfloat16)
    bits = [tensor.contiguous().view(torch.int16).numpy().view(np.uint16) for tensor in (scale, out)]
    int4_expand(packed.contiguous().numpy(), *bits)
    return out


def _foreign(reader: Reader, prefix: str, form: LinearFormat, inner: int, rows: range) -> torch.Tensor:
    """(code - zero point) · scale, each step in the scale's dtype, as compressed-tensors' `_dequantize` computes it."""
    asked = slice(rows.start, rows.stop)
    if form.packed:
        codes = unpack(reader.read(f"{prefix}.weight_packed", asked), form.num_bits, inner)
    else:
        codes = reader.read(f"{prefix}.weight", asked)
    order = reader.read(f"{prefix}.weight_g_idx").long() if form.reordered else None
    scale = spread(reader.read(f"{prefix}.weight_scale"), form, inner, rows, order)
    values = codes.to(scale.dtype)
    if not form.symmetric:
        zero = _zero_point(reader, prefix, form, rows)
        values = values - spread(zero, form, inner, range(len(rows)) if form.packed else rows, order).to(scale.dtype)
    return values * scale


def _zero_point(reader: Reader, prefix: str, form: LinearFormat, rows: range) -> torch.Tensor:
    """Packed along the outputs: the zero points [rows, groups] of these rows. Otherwise as stored."""
    stored = reader.read(f"{prefix}.weight_zero_point")
    if not form.packed or form.strategy == "tensor":
        return stored
    per_word = 32 // form.num_bits
    first, last = rows.start // per_word, -(-rows.stop // per_word)
    words = stored[first:last].T.contiguous()  # [groups, words]
    codes = unpack(words, form.num_bits, words.shape[1] * per_word).T
    return codes[rows.start - first * per_word : rows.stop - first * per_word]


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [rows, words] → int8 [rows, count]: code k of a word in its bits k·bits …, stored with an offset."""
    if bits == 8:
        return (packed.contiguous().view(torch.uint8)[:, :count].to(torch.int16) - 128).to(torch.int8)
    return reference.int4_unpack(packed)[:, :count]


def spread(
    scale: torch.Tensor, form: LinearFormat, inner: int, rows: range, order: torch.Tensor | None
) -> torch.Tensor:
    """Scales (or zero points) of these rows for every element: [rows, in], or what broadcasts to it."""
    if form.strategy == "tensor":
        return scale.reshape(1, 1)
    if form.strategy == "block":
        height, width = form.block or (1, 1)
        return scale[torch.arange(rows.start, rows.stop) // height].repeat_interleave(width, dim=1)[:, :inner]
    own = scale[rows.start : rows.stop]
    if form.strategy == "channel":
        return own
    return own[:, order] if order is not None else own.repeat_interleave(form.group_size or 1, dim=1)
