"""How a canonical tensor is cut out of a stored one, without copying."""

from __future__ import annotations

import torch

from converters.names import Part


def part_view(stored: torch.Tensor, part: Part, rows: slice | None = None) -> torch.Tensor:
    """Stored tensor → the canonical part (rows of it), sharing its memory.

    Fused experts: stored [E, in, out'] → stored[e, :, start:stop].T, [out, in] with strides (1, out').
    """
    tensor = stored
    if part.expert is not None:
        tensor = stored[part.expert, :, part.start : part.stop].T  # [in, out] → [out, in]
    return tensor if rows is None else tensor[rows]
