"""numba-compiled kernels and where their machine code is kept. Imports numba only when a kernel module asks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache
def cache_folder(package: Path) -> str | None:
    """A private, writable folder for the compiled kernels of `package`; None where there is none.

    Its name changes with the source of the whole package: numba's own check sees only the file of one kernel, and
    would go on using old code after a change in a module that the kernel imports.
    """
    source = b"".join(path.read_bytes() for path in sorted(package.glob("*.py")))
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(source).hexdigest()[:16]
    try:
        folder = Path(base).expanduser() / "l4tool" / f"{package.parent.name}-{package.name}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError):
        return None


@contextlib.contextmanager
def numba_cache(package: Path) -> Iterator[bool]:
    """While it is open, numba's decorators keep machine code in `cache_folder(package)`; yields whether there is one.

    numba reads its setting in the decorator only, so other users of numba in this process keep theirs.
    """
    import numba

    folder = cache_folder(package)
    saved = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = folder or saved
    try:
        yield folder is not None
    finally:
        numba.config.CACHE_DIR = saved


def kernel_jit(package: Path, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba.njit with C division for the kernels of `package`, cached on disk where that is possible."""
    import numba

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        with numba_cache(package) as cached:
            compiled: Callable[..., Any] = numba.njit(cache=cached, error_model="numpy", **options)(function)
        return compiled

    return decorate
