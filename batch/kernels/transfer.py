"""Small tensors between host and device, without waiting: in page-locked memory, on the current stream.

A copy from other memory, or one that is not non_blocking, would wait for all that was launched before it. torch gives
page-locked memory out again only when the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT = 16  # bytes: what kernels are compiled for


def send(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same tensors on a device: those that lie on the CPU in one copy, those that are there already as they are."""
    away = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type == "cpu" or not away:
        return list(tensors)
    arrived = iter(unpack(pack(away, device).to(device, non_blocking=True), away))
    return [next(arrived) if tensor.device.type == "cpu" else tensor for tensor in tensors]


def pack(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """CPU tensors one behind the other, uint8 in memory from which a device copies without waiting."""
    total = sum(_room(tensor) for tensor in tensors)
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=device.type != "cpu")
    for place, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of what `pack` has made of tensors with the shapes and dtypes of `like`, wherever it lies now."""
    views, first = [], 0
    for tensor in like:
        views.append(packed[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        first += _room(tensor)
    return views


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """On its way to the host, where it is not there: good once the device has come so far."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
