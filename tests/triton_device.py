"""Where the Triton kernels run in tests: in Triton's interpreter where there is no CUDA device, else on the device."""

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def convert_float(values, from_type, to_type, rounding):
    """As the interpreter's own, which cuts bfloat16 off and drops the carry of e4m3; a device rounds."""
    source, target = TORCH_TYPES[from_type.scalar.name], TORCH_TYPES[to_type.scalar.name]
    bits = torch.frombuffer(bytearray(values.tobytes()), dtype=source).to(target).view(torch.uint8).numpy()
    return bits.view(WORDS[target.itemsize]).reshape(values.shape)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_CUDA else "cpu"])
def device(request, monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated and never written is NaN, or an index far outside, so that it shows."""
    empty = torch.empty

    def full_of_nan(*args, **options):
        made = empty(*args, **options)
        made.view(torch.uint8).fill_(0xFF)
        return made

    monkeypatch.setattr(torch, "empty", full_of_nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: full_of_nan(x.shape, dtype=x.dtype, device=x.device))
