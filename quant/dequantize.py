"""A Linear as floats, however a checkpoint stores it."""

from __future__ import annotations

import numpy as np
import torch

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
