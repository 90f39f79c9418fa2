"""GPUs that people plan for, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from l4tool.core.errors import UsageError
from l4tool.core.sizes import format_bytes, parse_bytes

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """`usable_bytes`: what one process finds on an empty device, CUDA context included."""

    name: str
    usable_bytes: int
    text: str


def _gpu(name: str, usable_gib: float, text: str) -> Gpu:
    return Gpu(name, int(usable_gib * GIB), text)


# Usable: the device total that PyTorch names in its out-of-memory messages ("GPU 0 has a total capacity of …"), as
# found in public reports; where they differ (drivers, ECC), the lowest, rounded down. It is less than what
# nvidia-smi shows: 81559 MiB for an H100 is 79.65 GiB, of which 79.1 can be used.
GPUS = (
    _gpu("rtx4090", 23.5, "GeForce RTX 4090, 24 GB; reported 23.52-23.68"),
    _gpu("rtx5090", 31.3, "GeForce RTX 5090, 32 GB; reported 31.37"),
    _gpu("a100-40", 39.3, "A100 40 GB; reported 39.38-39.56"),
    _gpu("l40s", 44.3, "L40S 48 GB; reported 44.34-44.42"),
    _gpu("a100-80", 79.1, "A100 80 GB; reported 79.14-79.25"),
    _gpu("h100", 79.1, "H100 80 GB; reported 79.10-79.19"),
    _gpu("h200", 139.7, "H200 141 GB; reported 139.72-139.81"),
    _gpu("b200", 178.3, "B200 180 GB; reported 178.35-178.36"),
    _gpu("mi300x", 191.6, "Instinct MI300X 192 GB; reported 191.69-191.98"),
)
DEFAULT = "h100"
_BY_NAME = {gpu.name: gpu for gpu in GPUS}


def parse_gpu(text: str) -> Gpu:
    """A name of the table, or the usable memory of any other GPU ('24GiB'). Raises UsageError."""
    known = _BY_NAME.get(text.strip().lower())
    if known is not None:
        return known
    try:
        usable_bytes = parse_bytes(text)
    except (UsageError, OverflowError):
        usable_bytes = 0
    if not 2**20 <= usable_bytes <= 2**50:
        names = ", ".join(_BY_NAME)
        raise UsageError(f"not a GPU: {text!r}", hint=f"use {names}, or its usable memory, for example 24GiB")
    return Gpu(format_bytes(usable_bytes), usable_bytes, "usable memory as given")
