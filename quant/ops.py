"""One call per format: a fused kernel for a weight on the CPU or a CUDA device, else the specification in torch."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import numpy as np
import torch

from converters.writing.encoder import Scratch
from l4tool.core.errors import CheckpointError
from quant import reference

KNOWS_FP8 = (8, 9)  # compute capability from which Triton compiles e4m3


@dataclass(frozen=True)
class Int4:
    """packed int32 [out, in/8], scale bf16 [out, in/g]; error, square float64 [out]: squared error, squared weight."""

    packed: torch.Tensor
    scale: torch.Tensor
    error: torch.Tensor
    square: torch.Tensor


@dataclass(frozen=True)
class Fp8:
    """weight e4m3fn [out, in], scale bf16 [out, 1]; error, square float64 [out] as in Int4."""

    weight: torch.Tensor
    scale: torch.Tensor
    error: torch.Tensor
    square: torch.Tensor


def int4(
    weight: torch.Tensor,
    group_size: int,
    scale_method: str,
    name: str = "weight",
    row0: int = 0,
    scratch: Scratch | None = None,
) -> Int4:
    """Quantize rows of a weight [out, in], stored by rows or (a fused expert) by columns. `scale_method`: absmax, mse.

    NaN or Inf raises CheckpointError naming `name` and the element; `row0` is the first row's place in that tensor.
    """
    rows, cols = weight.shape
    if group_size % 8 or cols % group_size:
        raise ValueError(f"{cols} columns do not divide into groups of {group_size}")
    if weight.device.type != "cpu":
        _require_finite(weight, name, row0)
        if _has_triton():
            from quant.kernels import triton_quantize

            with torch.cuda.device(weight.device):  # kernels are launched on this thread's device
                return Int4(*(part.cpu() for part in triton_quantize.int4(weight, group_size, scale_method)))
        return int4_reference(weight, group_size, scale_method)
    from quant.kernels.int4 import int4_rows

    scratch = scratch or Scratch()
    packed = scratch.empty("packed", (rows, cols // 8), torch.int32)
    scale = scratch.empty("scale", (rows, cols // group_size), torch.bfloat16)
    row_error, row_square = np.empty(rows), np.empty(rows)
    source, stride, transposed = _flat(weight)
    bf16 = weight.dtype == torch.bfloat16
    bad = int4_rows(
        source, stride, transposed, scale_method == "mse", bf16, packed.numpy(), _bits(scale), row_error, row_square
    )
    if bad >= 0:
        _require_finite(weight, name, row0)
    return Int4(packed, scale, torch.from_numpy(row_error), torch.from_numpy(row_square))


def fp8(weight: torch.Tensor, name: str = "weight", row0: int = 0, scratch: Scratch | None = None) -> Fp8:
    """Quantize rows of a weight [out, in] to e4m3fn with one scale per row. Arguments and errors as `int4`."""
    rows, cols = weight.shape
    if weight.device.type != "cpu":
        _require_finite(weight, name, row0)
        if _has_triton() and torch.cuda.get_device_capability(weight.device) >= KNOWS_FP8:
            from quant.kernels import triton_quantize

            with torch.cuda.device(weight.device):
                return Fp8(*(part.cpu() for part in triton_quantize.fp8(weight)))
        return fp8_reference(weight)
    from quant.kernels.fp8 import fp8_rows

    scratch = scratch or Scratch()
    out = scratch.empty("packed", (rows, cols), torch.uint8)
    scale = scratch.empty("scale", (rows, 1), torch.bfloat16)
    row_error, row_square = np.empty(rows), np.empty(rows)
    source, stride, transposed = _flat(weight)
    bf16 = weight.dtype == torch.bfloat16
    bad = fp8_rows(source, stride, transposed, bf16, out.numpy(), _bits(scale)[:, 0], row_error, row_square)
    if bad >= 0:
        _require_finite(weight, name, row0)
    return Fp8(out.view(torch.float8_e4m3fn), scale, torch.from_numpy(row_error), torch.from_numpy(row_square))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def int4_reference(weight: torch.Tensor, group_size: int, scale_method: str) -> Int4:
    """The specification's result in this module's form, computed where `weight` is, returned on the CPU."""
    q, scale = reference.int4_quantize(weight, group_size, scale_method)
    error, square = reference.squared_error(weight, reference.int4_dequantize(q, scale), group_size)
    return Int4(reference.int4_pack(q).cpu(), scale.cpu(), error.cpu(), square.cpu())


def fp8_reference(weight: torch.Tensor) -> Fp8:
    """As `int4_reference`."""
    q, scale = reference.fp8_quantize(weight)
    error, square = reference.squared_error(weight, reference.fp8_dequantize(q, scale), reference.FP8_BLOCK)
    return Fp8(q.cpu(), scale.cpu(), error.cpu(), square.cpu())


def compare(weight: torch.Tensor, back: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Squared error and squared weight per row (float64), and the largest |weight - back|, of CPU tensors [rows, cols].

    `block`: columns whose sums stay in float32, the group size of INT4. `weight` may be stored by columns. NaN and Inf
    come through.
    """
    from quant.kernels.compare import row_errors

    rows, cols = weight.shape
    error, square, largest = np.empty(rows), np.empty(rows), np.empty(rows, np.float32)
    theirs, their_stride, transposed = _flat(back)
    assert not transposed
    row_errors(*_flat(weight), theirs, their_stride, cols, block, error, square, largest)
    return torch.from_numpy(error), torch.from_numpy(square), float(largest.max(initial=0))


def require_finite(tensor: torch.Tensor, name: str, row0: int = 0) -> None:
    """Raise CheckpointError naming the first NaN or Inf of a CPU tensor of any shape. Integers pass."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32) and tensor.is_contiguous():
        from quant.kernels.bits import INF_BITS, largest_bits

        if largest_bits(_flat(tensor.view(1, -1))[0]) < INF_BITS:
            return
    _require_finite(tensor, name, row0)


def _bits(scale: torch.Tensor) -> np.ndarray:
    return scale.view(torch.int16).numpy().view(np.uint16)


def _flat(weight: torch.Tensor) -> tuple[np.ndarray, int, bool]:
    """Zero-copy (flat storage, stride, transposed) of a 2-D weight; the element type tells the kernel the dtype."""
    (rows, cols), (row_stride, col_stride) = weight.shape, weight.stride()
    transposed = row_stride == 1 and col_stride != 1
    if not transposed and col_stride != 1:
        weight, row_stride = weight.contiguous(), cols
    stride = col_stride if transposed else row_stride
    lines, length = (cols, rows) if transposed else (rows, cols)
    flat = weight.as_strided(((lines - 1) * stride + length,), (1,))
    if weight.dtype == torch.float32:
        return flat.numpy(), stride, transposed
    bits = flat.view(torch.int16).numpy()
    return (bits.view(np.uint16) if weight.dtype == torch.bfloat16 else bits), stride, transposed


def _require_finite(tensor: torch.Tensor, name: str, row0: int) -> None:
    """Raise CheckpointError at the first NaN or Inf, in row order."""
    for start in range(0, len(tensor), 1024):
        bad = (~tensor[start : start + 1024].isfinite()).nonzero()
        if len(bad):
            first, *rest = bad[0].tolist()
            value = tensor[start + first][tuple(rest)].item()
            place = ", ".join(map(str, (row0 + start + first, *rest)))
            raise CheckpointError(
                f"tensor {name}[{place}] is {value}",
                hint="the checkpoint is damaged; fetch or convert it again",
            )
