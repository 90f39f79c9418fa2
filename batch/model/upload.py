"""From the host to a device through a few page-locked buffers: while one is on its way, the next is filled by several
threads. The host's memory is bounded by the buffers, and what has to be turned or cast is so on the device."""

from __future__ import annotations

import torch

BUFFER_BYTES = 32 << 20
BUFFERS = 3


class Upload:
    """Copies to one device, in order, on its current stream."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        pin = self._on_cuda
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pin) for _ in range(BUFFERS)]
        self._sent: list[torch.cuda.Event | None] = [None] * BUFFERS
        self._place = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target, on the device, becomes source: any strides, any dtypes. Source may be overwritten afterwards."""
        if source.device == target.device and self._on_cuda:
            target.copy_(source)
            return
        is_turned = source.dim() == 2 and not source.is_contiguous() and source.T.is_contiguous()
        flat = source.T if is_turned else source.contiguous()
        if target.is_contiguous() and source.dtype == target.dtype and not is_turned:
            self._send(target, flat)
            return
        sent = torch.empty(flat.shape, dtype=source.dtype, device=self._device)
        self._send(sent, flat)
        target.copy_(sent.T if is_turned else sent)

    def _send(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Both contiguous and of one dtype."""
        to, data = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        for first in range(0, data.numel(), self._buffers[0].numel()):
            piece = data[first : first + self._buffers[0].numel()]
            buffer, event = self._buffers[self._place][: piece.numel()], self._sent[self._place]
            if event is not None:
                event.synchronize()
            buffer.copy_(piece)
            to[first : first + piece.numel()].copy_(buffer, non_blocking=True)
            if self._on_cuda:
                self._sent[self._place] = torch.cuda.current_stream(self._device).record_event()
            self._place = (self._place + 1) % BUFFERS
