"""safetensors files: the header, strictly checked, and zero-copy views of the mapped file.

Layout: 8 bytes little-endian header length, that many bytes of JSON (name → dtype, shape, data_offsets), then the
tensors' bytes. Opening reads the header only.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from converters.fields import parse_json
from converters.mapped import MappedFile, StoredTensor
from l4tool.core.errors import CheckpointError, InputMissing

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(MappedFile):
    """One open file. Raises CheckpointError for anything wrong with the header or the size."""

    def __init__(self, path: Path) -> None:
        tensors, self.metadata = read_header(path)
        super().__init__(path, tensors)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Header → tensors by name in file order, and the metadata. Every offset is checked against the file's size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _bad(path, f"its header cannot be {length} bytes long in a file of {size} bytes")
            raw = file.read(length)
    except FileNotFoundError as error:
        raise InputMissing(f"{path} does not exist", hint="download the missing shard again") from error
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = parse_json(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "__metadata__ in its header is not an object of strings")
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"header entry {name!r} must have dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _bad(path, f"tensor {name!r} has unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"tensor {name!r} has a malformed shape or data_offsets")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _bad(
            path, f"tensor {name!r} of shape {shape} needs {needed} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1], path)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap and end where the file ends."""
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise _bad(path, f"tensor {tensor.name!r} {what}")
        end = tensor.stop
    if end > size:
        last = next(tensor for tensor in tensors if tensor.stop > size)
        raise _bad(path, f"it is truncated: tensor {last.name!r} ends at byte {last.stop}, the file has {size}")
    if end < size:
        raise _bad(path, f"{size - end} bytes follow its last tensor")


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {what}", hint="download or copy this file again")
