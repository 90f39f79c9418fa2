"""How much memory there is, and how much of it the KV cache gets when nobody says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from quant.memory import device_kv_bytes

CPU_SHARE = 0.5  # of what is free after loading; pages of the cache are only touched when used
CPU_MOST_BYTES = 16 << 30
CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Per version of cgroups: limit, use, and the line of memory.stat that counts cached file pages, given up on demand.
CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def default_kv_bytes(device: torch.device, step_bytes: int) -> int:
    """Bytes for the KV cache on `device` after the weights are loaded; `step_bytes`: what one step itself needs."""
    if device.type == "cuda":
        return device_kv_bytes(free_device_bytes(device), step_bytes)
    return max(min(int(available_bytes() * CPU_SHARE), CPU_MOST_BYTES), 0)


def free_device_bytes(device: torch.device) -> int:
    """What this process may still take of a CUDA device, within torch.cuda.set_per_process_memory_fraction."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    share_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
    return max(min(free_bytes, share_bytes - torch.cuda.memory_reserved(device)), 0)


def give_back_cached() -> None:
    """What torch keeps of device memory for later goes back. Some versions refuse after a capture that failed."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def available_bytes() -> int:
    """Main memory that this process may still take: what the kernel calls available, within the limits of its control
    groups."""
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        # No /proc: half of the physical memory is the best guess that needs no further library.
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(min(available, *_cgroup_rooms()), 0)


def used_bytes() -> int:
    """Main memory that this process has taken, mapped files included; 0 where the system does not say."""
    return _field(Path("/proc/self/status"), "VmRSS") or 0


def swap_bytes() -> int:
    """Swap space that is free."""
    return _field(Path("/proc/meminfo"), "SwapFree") or 0


def _cgroup_rooms() -> Iterator[int]:
    """What each control group with a limit, from this process's own up to the root, has left."""
    for version, folder in _cgroup_folders():
        limit_file, used_file, cached_line = CGROUP_FILES[version]
        limit, used = _read_int(folder / limit_file), _read_int(folder / used_file)
        if limit is not None and used is not None:
            yield limit - used + (_field(folder / "memory.stat", cached_line, 1) or 0)
    yield 1 << 62


def _cgroup_folders() -> Iterator[tuple[int, Path]]:
    """(cgroups version, folder) of this process's memory groups and all above them that can be seen."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, CGROUP_ROOT / "memory") if controllers else (2, CGROUP_ROOT)
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            yield version, root / folder


def _field(path: Path, name: str, unit_bytes: int = 1024) -> int | None:
    """Bytes in the line `name` of a file like /proc/meminfo or memory.stat; None where there is none."""
    try:
        for line in path.read_text().splitlines():
            if line.split(maxsplit=1)[0].rstrip(":") == name:
                return int(line.split()[1]) * unit_bytes
    except (OSError, IndexError, ValueError):
        pass
    return None


def _read_int(path: Path) -> int | None:
    """A number from a one-line file; None where it is absent or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
