"""How a machine is divided among workers: cores that lie together, or one CUDA device each."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from batch.backends.worker_handle import Share
from l4tool.core.errors import UsageError


def cpu_shares(count: int) -> list[Share]:
    """The cores this process may use in `count` parts; both threads of a core fall to one worker. UsageError."""
    cores = sorted(usable_cores(), key=_place)
    if count > len(cores):
        raise UsageError(
            f"{count} workers on {len(cores)} CPU cores", hint=f"give --workers at most {len(cores)}, or fewer"
        )
    edges = [len(cores) * i // count for i in range(count + 1)]
    return [Share(tuple(cores[low:high])) for low, high in itertools.pairwise(edges)]


def cuda_shares(count: int, num_devices: int) -> list[Share]:
    """A CUDA device for each of `count` workers; `num_devices` is what torch sees. UsageError."""
    if count > num_devices:
        raise UsageError(
            f"{count} workers on {num_devices} CUDA devices: each needs one",
            hint=f"give --workers at most {num_devices}",
        )
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = named or [str(index) for index in range(num_devices)]
    return [Share(share.cores, name) for share, name in zip(_any_core_shares(count), names, strict=False)]


def _any_core_shares(count: int) -> list[Share]:
    """As cpu_shares; where there are more devices than cores, they share the cores."""
    cores = usable_cores()
    return cpu_shares(count) if count <= len(cores) else [Share((cores[i % len(cores)],)) for i in range(count)]


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _place(cpu: int) -> tuple[int, int, int]:
    """Where a logical CPU sits: package, core, itself; (0, cpu, cpu) where the kernel does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu
