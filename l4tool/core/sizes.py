"""Byte sizes as people type and read them."""

from __future__ import annotations

import re

from l4tool.core.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """'8GiB', '500MB', '4G' (binary) or a plain number of bytes → bytes. Raises UsageError."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"not a size: {text!r}", hint="write for example 8GiB, 500MB or a number of bytes")
    return int(float(match.group(1)) * unit)


def parse_tokens(text: str) -> int:
    """'8k', '128K', '1M' (binary: 8192, 131072, 1048576) or a plain number → tokens, at least 1. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,12})\s*([km]?)\s*", text, re.IGNORECASE | re.ASCII)
    count = int(match.group(1)) * {"": 1, "k": 2**10, "m": 2**20}[match.group(2).lower()] if match else 0
    if count < 1:
        raise UsageError(f"not a number of tokens: {text!r}", hint="write for example 8k, 128K, 1M or 8192")
    return count


def format_bytes(num_bytes: float) -> str:
    """Bytes → '60.4 GiB' (binary units, three significant digits)."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def format_duration(seconds: float) -> str:
    """Seconds → '4.2 s', '3 min 05 s' or '2 h 07 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
