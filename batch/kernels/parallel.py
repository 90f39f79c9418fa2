"""Runs a compiled kernel on torch's own threads.

A kernel is `void kernel(intp job)`: `job` is the address of an int64 array whose first two entries are a shared counter
and the number of items. Every thread takes items from the counter until none is left, so uneven items balance out.
Using the OpenMP team that torch already keeps (GOMP_parallel) avoids a second pool fighting for the same cores: idle
OpenMP threads spin for milliseconds after each torch op. Without libgomp a small Python thread pool does the same work.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from l4tool.core.jit import numba_cache

COUNTER, ITEMS, FIRST_ARG = 0, 1, 2  # layout of a job: counter, number of items, then the kernel's own arguments
MIN_ITEMS = 2  # per thread: less is not worth waking it


class Kernel:
    """Decorates `kernel(job)`: machine code without the GIL, compiled (or read from numba's cache) on first use.

    `arguments`: how many integers it takes; one that is not called by `run` may take more than the job's address.
    """

    def __init__(self, function: Callable[..., None], arguments: int = 1) -> None:
        self.function = function
        self.arguments = arguments
        self.__name__ = function.__name__

    @functools.cached_property
    def compiled(self) -> Any:
        from numba import cfunc

        with numba_cache(Path(__file__).parent) as cached:
            return cfunc(f"void({', '.join(['intp'] * self.arguments)})", cache=cached)(self.function)


def run(kernel: Kernel, items: int, *args: int | torch.Tensor) -> None:
    """Run `kernel` over `items` items; tensors among `args` are passed as addresses."""
    if items == 0:
        return
    job = array("q", [0, items, *[arg if isinstance(arg, int) else arg.data_ptr() for arg in args]])
    address, _ = job.buffer_info()
    threads = min(torch.get_num_threads(), items // MIN_ITEMS)
    if threads <= 1:
        kernel.compiled.ctypes(address)
    else:
        _team()(kernel.compiled, address, threads)


@functools.cache
def _team() -> Callable[[Any, int, int], None]:
    """A function (kernel, job address, threads) that runs the kernel on that many threads at once."""
    start = _gomp_parallel()
    if start is None:
        return _run_on_pool

    def run_on_gomp(kernel: Any, job: int, threads: int) -> None:
        start(kernel.address, job, threads, 0)

    return run_on_gomp


def _gomp_parallel() -> Any:
    """GOMP_parallel of the libgomp that torch has loaded; None where torch uses another OpenMP runtime."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    if len(loaded) != 1:
        return None
    function = ctypes.CDLL(loaded.pop()).GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="kernel")


def _run_on_pool(kernel: Any, job: int, threads: int) -> None:
    helpers: Sequence[Any] = [_pool().submit(kernel.ctypes, job) for _ in range(threads - 1)]
    kernel.ctypes(job)
    for helper in helpers:
        helper.result()


def float_bits(value: float) -> int:
    """The bits of a float32, to hand it to a kernel as an argument."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)
