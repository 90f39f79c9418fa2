"""`.pth` files: their tensors' names and places without reading them, and planning one to be written.

A `.pth` file is a ZIP archive of stored records: a pickle of the names, and one record for each tensor's bytes. Only
torch's restricted loader (`weights_only=True`) ever unpickles one.
"""

from __future__ import annotations

import io
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.mapped import MappedFile, StoredTensor
from converters.safetensors_io import DTYPE_NAMES
from converters.writer import ShardPlan, TensorSpec
from l4tool.core.errors import CheckpointError, InputMissing

LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of the ZIP format, appnote 4.3.7
CENTRAL_HEADER_BYTES, CENTRAL_CRC_AT = 46, 16  # appnote 4.3.12
DESCRIPTOR_CRC_AT = 4  # appnote 4.3.9


class PthFile(MappedFile):
    """The tensors of one file. Whatever is no tensor (`io.BytesIO` of transformer-engine) is left out.

    Raises InputMissing, or CheckpointError for what torch's restricted loader refuses and for tensors that do not lie
    in one piece.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _tensors(path))


def load_small(path: Path) -> object:
    """The contents of a small `.pt` file, in memory. Raises as PthFile does."""
    return _load(path, mmap=False)


def _load(path: Path, mmap: bool) -> object:
    if not path.is_file():
        raise InputMissing(f"{path} does not exist", hint="download the missing file again")
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors, and loading it could run code: {first}",
            hint="do not load it by other means unless you trust its maker; ask for a file that holds tensors alone",
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a sound .pth file: {first}", hint="download or copy it again") from error


def _tensors(path: Path) -> dict[str, StoredTensor]:
    loaded = _load(path, mmap=True)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} does not hold a dictionary of tensors", hint="give Meta's consolidated.*.pth")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    offset = _offset_of(path, list(tensors.values()))
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path}: tensor {name!r} ({tensor.dtype}) does not lie there in one piece")
        start = tensor.data_ptr() + offset if tensor.numel() else 0
        found[name] = StoredTensor(name, tensor.dtype, tuple(tensor.shape), start, start + tensor.nbytes, path)
    return found


def _offset_of(path: Path, tensors: list[torch.Tensor]) -> int:
    """What turns an address in torch's map of the file into an offset in the file.

    Every storage is a record of the archive: the lowest address belongs to the first record that holds one, and all
    others must then fall on a record, too.
    """
    addresses = sorted({t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes()})
    if not addresses:
        return 0
    starts = {record.start for record in _records(path) if record.size}
    for start in sorted(starts):
        offset = start - addresses[0]
        if all(address + offset in starts for address in addresses):
            return offset
    raise CheckpointError(f"{path}: its tensors are not where the archive says", hint="download or copy it again")


@dataclass(frozen=True)
class _Record:
    """Bytes [start, start + size) of the archive; `central_at`: where its entry in the central directory begins."""

    start: int
    size: int
    central_at: int


def _records(path: Path) -> list[_Record]:
    """Every record of tensor data."""
    found = []
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            central_at = archive.start_dir
            for info in archive.infolist():
                if "/data/" in info.filename and info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                    start = info.header_offset + LOCAL_HEADER.size + fields[-2] + fields[-1]
                    found.append(_Record(start, info.file_size, central_at))
                central_at += CENTRAL_HEADER_BYTES + len(info.orig_filename.encode()) + len(info.extra)
    except (zipfile.BadZipFile, OSError, struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is not a sound .pth file: {error}", hint="download or copy it again") from error
    return found


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
        stored = PthFile(path).tensors
        starts = {name: tensor.start for name, tensor in stored.items()}
        gaps = _gaps(path, sorted((t.start, t.stop) for t in stored.values() if t.nbytes))
        central = {record.start: record.central_at for record in _records(path)}
    # a data descriptor follows each record: its CRC stands there and in the central directory
    crc_at = {
        name: (tensor.stop + DESCRIPTOR_CRC_AT, central[tensor.start] + CENTRAL_CRC_AT)
        for name, tensor in stored.items()
        if tensor.nbytes
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
