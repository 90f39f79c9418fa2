"""Memory from the kernel: zero, aligned, no more than what is touched."""

import gc

import numpy as np
import psutil
import pytest

from l4tool.core.pages import HUGE_PAGE, fresh_pages


@pytest.mark.parametrize("num_bytes", [0, 1, 4097, HUGE_PAGE, 5 * HUGE_PAGE + 3])
def test_so_many_zero_bytes(num_bytes):
    array = np.frombuffer(fresh_pages(num_bytes), np.uint8)
    assert array.size == num_bytes and not array.any()
    array[:] = 7
    assert (array == 7).all()
    if num_bytes:
        assert array.ctypes.data % (HUGE_PAGE if num_bytes >= HUGE_PAGE else 4096) == 0


def test_only_what_is_touched_takes_room_and_it_goes_back():
    process = psutil.Process()
    before = process.memory_info().rss
    array = np.frombuffer(fresh_pages(512 << 20), np.uint8)
    assert process.memory_info().rss - before < 64 << 20
    array[: 128 << 20] = 1
    assert process.memory_info().rss - before > 120 << 20
    del array
    gc.collect()
    assert process.memory_info().rss - before < 64 << 20


def test_more_than_there_is():
    with pytest.raises(MemoryError):
        fresh_pages(1 << 62)
