"""How much memory the KV cache gets when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from quant.memory import device_kv_bytes

CPU_SHARE = 0.5  # of what is free after loading; pages of the cache are only touched when used
CPU_MOST_BYTES = 16 << 30
CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def default_kv_bytes(device: torch.device, step_bytes: int) -> int:
    """Bytes for the KV cache on `device` after the weights are loaded; `step_bytes`: what one step itself needs."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return device_kv_bytes(free_bytes, step_bytes)
    return max(min(int(available_bytes() * CPU_SHARE), CPU_MOST_BYTES), 0)


def available_bytes() -> int:
    """Main memory that this process may still take: what the kernel calls available, within the cgroup's limit."""
    available = _meminfo_available()
    for limit_file, used_file in CGROUP_LIMITS:
        limit, used = _read_int(limit_file), _read_int(used_file)
        if limit is not None and used is not None:
            available = min(available, max(limit - used, 0))
    return available


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # No /proc: half of the physical memory is the best guess that needs no further library.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_int(path: str) -> int | None:
    """A number from a one-line file; None where it is absent or says "max"."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
