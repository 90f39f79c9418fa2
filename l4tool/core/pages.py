"""Memory straight from the kernel: zero, taking room only where it is touched, in huge pages where these are given."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

HUGE_PAGE = 2 << 20


def fresh_pages(num_bytes: int) -> memoryview:
    """`num_bytes` zero bytes that start on a page, on a huge one if there are that many.

    Huge pages are quicker to get and to walk than small ones; the kernel gives them for whole ones only, as each is
    first touched. The memory goes back when nobody refers to it any more. Raises MemoryError.
    """
    large = num_bytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    try:
        memory = mmap.mmap(-1, max(num_bytes, 1) + HUGE_PAGE * large, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {num_bytes:,} bytes of memory: {error}") from error
    if not large:
        return memoryview(memory)[:num_bytes]
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE, start // mmap.PAGESIZE * mmap.PAGESIZE, num_bytes // HUGE_PAGE * HUGE_PAGE)
    return memoryview(memory)[start : start + num_bytes]
