"""The last product of a step: from hidden states to logits, as many rows at a time as the caller can hold.

Legend: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batch.kernels import ops
from batch.kernels.linears import PANEL, DenseLinear, Linear, PanelLinear

BLOCK = 4096  # vocabulary rows widened to float32 at a time: 84 MB at H = 5120


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Rows whose logits come when they are asked for: hidden [N, H], normed, and the head. While this is held, the
    head of a streamed model stays in memory."""

    hidden: torch.Tensor
    head: Linear

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """All of them, float32 [N, V], rounded to the activation dtype: what tokens are drawn from."""
        return ops.linear(self.hidden, self.head).float()

    @torch.inference_mode()
    def exact(self, rows: slice) -> torch.Tensor:
        """Some of them, float32 [n, V], never rounded to bfloat16, which has steps of 0.125 at 16 … 32. A quantized
        head's are as in `logits`."""
        x = self.hidden[rows]
        if x.dtype == torch.float32 or not isinstance(self.head, DenseLinear | PanelLinear):
            return ops.linear(x, self.head).float()
        x = x.float()
        size = self.head.out_features
        out = torch.empty(x.shape[0], size, dtype=torch.float32, device=x.device)
        for first in range(0, size, BLOCK):
            out[:, first : first + BLOCK] = F.linear(x, _block(self.head, first, min(first + BLOCK, size)))
        return out


def _block(head: DenseLinear | PanelLinear, first: int, end: int) -> torch.Tensor:
    """Rows first … end - 1 of the weight, float32 [·, H]; `first` begins a panel."""
    if isinstance(head, DenseLinear):
        return head.weight[first:end].float()
    words = head.words[first // PANEL : -(-end // PANEL)]
    return PanelLinear(words, False, end - first).dense().float()
