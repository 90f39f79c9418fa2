"""`.pth` files: their tensors' names and places without reading them, and planning one to be written.

A `.pth` file is a ZIP archive of stored records: `data.pkl`, a pickle of the state dict in which storages are names,
and a record for the bytes of each storage. The pickle is read by `torch.load(weights_only=True)` alone, under
FakeTensorMode: that gives names, shapes, dtypes and offsets without reading or allocating a byte of the tensors.
torch's own `mmap=True` is not used for the bytes: it maps the file privately and writable, which Linux refuses for a
file larger than the machine's memory; our map is read-only and shared.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import struct
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.mapped import MappedFile, StoredTensor
from converters.safetensors_io import DTYPE_NAMES
from converters.writer import ShardPlan, TensorSpec
from l4tool.core.errors import CheckpointError, InputMissing

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # signature, …, length of the name, length of the extra field (appnote 4.3.7)
LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_HEADER_BYTES, CENTRAL_CRC_AT = 46, 16  # appnote 4.3.12
DESCRIPTOR_CRC_AT = 4  # appnote 4.3.9
MAX_PICKLE_BYTES = 100_000_000
FAKE_TENSORS = "torch._subclasses.fake_tensor"


class PthFile(MappedFile):
    """The tensors of one file. Whatever is no tensor (`io.BytesIO` of transformer-engine) is left out.

    Raises InputMissing, or CheckpointError for anything wrong with the archive, the pickle or an offset, and for
    tensors that do not lie in one piece.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, {name: stored for name, (stored, _) in _tensors(path).items()})


def load_small(path: Path) -> object:
    """The contents of a small `.pt` file, in memory. Raises as PthFile does."""
    _tensors(path)  # every check, before anything is read
    return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(path: Path) -> dict[str, tuple[StoredTensor, _Record | None]]:
    """Name → (the tensor, its record; None for one without bytes)."""
    records = _records(path)
    found = {}
    for name, value in load_restricted(path).items():
        if not isinstance(name, str):
            raise _bad(path, f"its state dict has the key {name!r}, which is no name")
        if isinstance(value, torch.Tensor):
            found[name] = _stored(path, name, value, records)
    return found


def _stored(
    path: Path, name: str, tensor: torch.Tensor, records: dict[int, _Record]
) -> tuple[StoredTensor, _Record | None]:
    """One fake tensor's place, checked against the archive's directory."""
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise _bad(path, f"tensor {name!r} ({tensor.dtype}) does not lie there in one piece")
    shape = tuple(tensor.shape)
    if not tensor.numel():
        return StoredTensor(name, tensor.dtype, shape, 0, 0, path), None
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    first = tensor.storage_offset() * tensor.dtype.itemsize
    record = records.get(offset) if offset is not None else None
    if offset is None or record is None or record.size < first + tensor.nbytes:
        raise _bad(path, f"tensor {name!r} lies outside its record")
    start = offset + first
    return StoredTensor(name, tensor.dtype, shape, start, start + tensor.nbytes, path), record


class _Quiet:
    """Keeps torch from logging a traceback of its own for a tensor that cannot be; what it raises says it all."""

    def __init__(self) -> None:
        self._log, self._lock, self._depth = logging.getLogger(FAKE_TENSORS), threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            self._log.disabled = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            self._log.disabled = self._depth > 0


_QUIET = _Quiet()


def load_restricted(path: Path) -> dict[Any, Any]:
    """The state dict of a `.pth` file by `torch.load(weights_only=True)`, its tensors fake ones.

    Beyond what torch allows, only `io.BytesIO` objects pass: Meta's files hold some. Raises CheckpointError for a
    pickle that needs more, or is no dict.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    allowed: list[Any] = [io.BytesIO, (_no_bytes, "builtins.bytes")]
    try:
        with torch.serialization.safe_globals(allowed), FakeTensorMode(), _QUIET:
            state = torch.load(path, weights_only=True)
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch's unpickler raises whatever a broken pickle makes its steps raise
        raise _unreadable(path, error) from error
    if not isinstance(state, dict):
        raise _bad(path, f"it holds a {type(state).__name__}, not a state dict")
    return state


def _no_bytes(*args: object) -> bytes:
    """How protocol 2 of pickle writes b""; bytes(n) could ask for any amount of memory."""
    if args:
        raise pickle.UnpicklingError("bytes is called with arguments")
    return b""


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What torch.load said, without its advice to load unsafely."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # the same broken pickle
        unsafe = []
    unsafe = [name for name in unsafe if name not in ("_io.BytesIO", "builtins.bytes")]
    if unsafe:
        return CheckpointError(
            f"{path} is not loaded: its pickle wants to run {', '.join(unsafe[:5])}, and only tensors are safe to load",
            hint="use files from a source you trust, saved as a plain state dict of tensors",
        )
    said = [line.strip() for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    return _bad(path, f"its pickle cannot be read ({said[0][:200] if said else type(error).__name__})")


@dataclass(frozen=True)
class _Record:
    """`size` bytes of the archive; `central_at`: where its entry in the central directory begins."""

    size: int
    central_at: int


def _records(path: Path) -> dict[int, _Record]:
    """Offset of each record's bytes → the record, from the archive's own directory."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            records: dict[int, _Record] = {}
            central_at = archive.start_dir
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                if info.compress_type != zipfile.ZIP_STORED:
                    raise _bad(path, f"its record {info.filename!r} is compressed")
                if name == "data.pkl" and info.file_size > MAX_PICKLE_BYTES:
                    raise _bad(path, f"its pickle has {info.file_size} bytes")
                if name == "byteorder" and archive.read(info)[:8] != b"little":
                    raise _bad(path, "it was written on a big-endian machine")
                start = _data_offset(file, info.header_offset)
                if start is None or start + info.file_size > size:
                    raise _bad(path, f"its record {info.filename!r} lies outside the file")
                if start not in records or records[start].size < info.file_size:
                    records[start] = _Record(info.file_size, central_at)
                central_at += CENTRAL_HEADER_BYTES + len(info.orig_filename.encode()) + len(info.extra)
            return records
    except FileNotFoundError as error:
        raise InputMissing(f"{path} does not exist", hint="download the missing shard again") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # the directory sent us to a place that is none
            raise _bad(path, "its directory is damaged") from error
        raise InputMissing(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, struct.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _bad(path, f"it is truncated, or no ZIP archive of torch.save ({error})") from error


def _data_offset(file: io.BufferedReader, header: int) -> int | None:
    """Where a record's bytes begin: behind its local header, whose extra field aligns them."""
    file.seek(header)
    raw = file.read(LOCAL_HEADER.size)
    if len(raw) < LOCAL_HEADER.size or raw[:4] != LOCAL_SIGNATURE:
        return None
    name, extra = LOCAL_HEADER.unpack(raw)[-2:]
    return header + LOCAL_HEADER.size + int(name) + int(extra)


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound .pth file: {what}", hint="download or copy this file again")


def plan_pth(file_name: str, specs: Sequence[TensorSpec]) -> ShardPlan:
    """The plan of a `.pth` file with these tensors in a dictionary, as `torch.save` lays it out.

    torch itself writes the archive around tensors that have no bytes (`torch.serialization.skip_data`), into a sparse
    file; everything but the tensors' places is then read back.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        shells = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
    with tempfile.TemporaryDirectory(prefix="l4tool-") as folder:
        path = Path(folder) / file_name  # the archive's own name comes from it
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(shells, path)
        stored = _tensors(path)
        gaps = _gaps(path, sorted((t.start, t.stop) for t, record in stored.values() if record is not None))
    starts = {name: tensor.start for name, (tensor, _) in stored.items()}
    # a data descriptor follows each record: its CRC stands there and in the central directory
    crc_at = {
        name: (tensor.stop + DESCRIPTOR_CRC_AT, record.central_at + CENTRAL_CRC_AT)
        for name, (tensor, record) in stored.items()
        if record is not None
    }
    return ShardPlan(file_name, tuple(specs), gaps[0][1], starts, tuple(gaps[1:]), crc_at)


def _gaps(path: Path, spans: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """(offset, bytes) of what lies before, between and behind the tensors."""
    size, at, found = path.stat().st_size, 0, []
    with open(path, "rb") as file:
        for start, stop in [*spans, (size, size)]:
            file.seek(at)
            found.append((at, file.read(start - at)))
            at = stop
    return found
