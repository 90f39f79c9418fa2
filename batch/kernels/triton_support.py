"""What every Triton kernel here shares: how it is launched, and products that the interpreter can do, too.

The kernels are written for Triton 3.6 on sm_90. With TRITON_INTERPRET=1 in the environment before Triton is imported
they run on CPU tensors, slowly, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import os

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where nobody says, and 3.10 changes it
import triton
import triton.language as tl
from triton import knobs

MULTIPROCESSORS = 132  # of an H100 or H200: how many programs fill the card


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def runs_on(x: torch.Tensor) -> bool:
    """Whether the kernels can take tensors like x."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.is_cuda != is_interpreted()


@functools.cache
def knows_fp8(device: torch.device) -> bool:
    """Whether kernels may use e4m3: compiled ones from Ada (8.9) on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def is_wide(x: torch.Tensor) -> bool:
    """Whether products are to be in float32: for float32 activations, and in the interpreter, which multiplies the
    bits of bfloat16 as integers."""
    return x.dtype == torch.float32 or is_interpreted()


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """total float32 [M, N] + a [M, K] · b [K, N]."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    elif a.dtype == tl.float8e4nv:
        # Hopper adds products of e4m3 up in 14 bits or so; after 128 of them the sum goes on in float32.
        return tl.dot(a, b, total, max_num_imprecise_acc=128)
    else:
        return tl.dot(a, b, total)
