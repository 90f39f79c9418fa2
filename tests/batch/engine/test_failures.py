"""What counts as memory that ran out, and how steps shrink and grow."""

import pytest
import torch

from batch.engine.failures import (
    FAILURES_IN_A_ROW,
    GOOD_STEPS_TO_GROW,
    StepLimit,
    is_out_of_memory,
    raise_unless_theirs,
)
from l4tool.core.errors import CheckpointError, DeviceError


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
])  # fmt: skip
def test_out_of_memory_has_many_names(error):
    assert is_out_of_memory(error)
    raise_unless_theirs(error)


def test_other_errors():
    assert not any(map(is_out_of_memory, (ValueError("out of memory"), RuntimeError("an illegal address"))))
    with pytest.raises(DeviceError, match="the device failed: an illegal"):
        raise_unless_theirs(torch.AcceleratorError("an illegal address"))
    with pytest.raises(CheckpointError):
        raise_unless_theirs(CheckpointError("cut short"))
    raise_unless_theirs(ValueError("of one sequence"))


def test_steps_shrink_and_grow(capsys):
    limit = StepLimit(100)
    limit.halve(80)
    limit.halve(30)
    assert (limit.tokens, limit.num_halved) == (15, 2)
    for expected in (30, 60, 100, 100):
        for _ in range(GOOD_STEPS_TO_GROW):
            limit.went_well()
        assert limit.tokens == expected
    limit.halve(100)
    assert limit.tokens == 50 and capsys.readouterr().err.count("ran out of memory") == 2  # only what is news


def test_failures_one_after_another_are_the_rule():
    limit, error = StepLimit(100), ValueError("always")
    for _ in range(FAILURES_IN_A_ROW - 1):
        limit.failed(error)
    limit.went_well()
    for _ in range(FAILURES_IN_A_ROW - 1):
        limit.failed(error)
    with pytest.raises(ValueError, match="always"):
        limit.failed(error)
