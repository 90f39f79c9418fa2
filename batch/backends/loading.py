"""A checkpoint as a model: whole in memory, or its layers read from disk while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batch.backends.memory import available_bytes, swap_bytes, used_bytes
from batch.model.model import Model, load_model, resolve_device, resolve_dtype, stream_model
from converters.reader import Reader
from l4tool.core.errors import DeviceError, UsageError
from l4tool.core.sizes import format_bytes
from quant.streaming import Room, divide, needed_bytes, weigh


def load_whole(
    reader: Reader, device: str, dtype: str | None, activations: str, copies: int, kv_dtype: str = "auto"
) -> Model:
    """All weights in memory; `copies` processes do the same on this machine. Raises UsageError, DeviceError,
    CheckpointError."""
    if resolve_device(device).type == "cpu":
        require_memory([reader], dtype, copies)
    return load_model(reader, device, dtype, activations, kv_dtype)


def load_streamed(
    reader: Reader, device: str, dtype: str | None, activations: str, memory_bytes: int | None,
    max_batch_tokens: int | None, max_seqs: int | None, kv_bytes: int | None,
) -> tuple[Model, Room]:  # fmt: skip
    """A model that must be closed, and how memory is divided: `memory_bytes` for the whole process, None for what is
    available. What else is given stays as it is. The page cache gets a share where it can hold the whole checkpoint
    and leave as much again. Raises UsageError, DeviceError, CheckpointError, InputMissing."""
    if torch.device(device).type != "cpu":
        raise UsageError("--weights stream runs on the CPU only", hint="add --device cpu, or leave --weights away")
    item_bytes, text = resolve_dtype(dtype, reader.arch).itemsize, reader.arch.text
    weights, available = weigh(reader, item_bytes), available_bytes()
    if memory_bytes is not None:
        available = min(available, max(memory_bytes - used_bytes(), 0))
    file_bytes = sum(path.stat().st_size for path in reader.weight_files())
    room, keep_cached = None, 2 * file_bytes <= available
    if keep_cached:
        spare = available - file_bytes
        room = divide(text, weights, spare, item_bytes, max_batch_tokens, max_seqs, kv_bytes)
    if room is None:
        keep_cached = False
        room = divide(text, weights, available, item_bytes, max_batch_tokens, max_seqs, kv_bytes)
    if room is None:
        raise DeviceError(
            f"{reader.path}: with --weights stream a layer at a time takes "
            f"{format_bytes(needed_bytes(text, weights, item_bytes))} of memory, and {format_bytes(available)} are "
            "available" + ("" if memory_bytes is None else f", as --memory {format_bytes(memory_bytes)} says"),
            hint="give it more (--memory), lower --max-batch-tokens, or quantize it: l4tool quantize --int4",
        )
    return stream_model(reader, dtype, activations, room.ahead, keep_cached), room


def require_memory(readers: Sequence[Reader], dtype: str | None, copies: int = 1) -> None:
    """A process that loads more than there is would be killed halfway; this says so before. Raises DeviceError."""
    needed = copies * sum(weigh(reader, resolve_dtype(dtype, reader.arch).itemsize).total for reader in readers)
    available = available_bytes() + swap_bytes()
    if needed > available:
        names = " and ".join(str(reader.path) for reader in readers)
        raise DeviceError(
            f"the weights of {names} need {format_bytes(needed)} of memory, and {format_bytes(available)} are "
            "available",
            hint="--weights stream reads them from disk layer by layer while it runs; or quantize it: "
            "l4tool quantize --int4",
        )
