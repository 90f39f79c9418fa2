"""The CUDA device of a benchmark, or one line that says that there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]


def require_cuda(name: str = "cuda") -> Any:
    """torch.device. Raises SystemExit where it is none, or not CUDA's."""
    from batch.model.model import resolve_device
    from l4tool.core.errors import L4Error

    script = Path(sys.argv[0]).name
    try:
        device = resolve_device(name)
    except L4Error as error:
        raise SystemExit(f"{script} needs a CUDA device: {error}") from error
    if device.type != "cuda":
        raise SystemExit(f"{script} needs a CUDA device, not {device}")
    return device
