"""Writing safetensors shards whose contents arrive in any order, from any thread, across interruptions.

How a pipeline uses it:
  1. `plans = plan_shards(specs)`: names, shapes and dtypes alone fix every file name, header and offset, so a plan
     made again after an interruption is the same plan.
  2. For each plan a `ShardFile(folder, plan, resume=True)`: the header is written first, `write(name, tensor, row)`
     puts rows at their place. After `sync()` what was written is durable, and a journal may say so.
  3. After an interruption: the same `ShardFile(folder, plan, resume=True)` keeps the `.part` file; `mark(name, …)`
     declares what the journal knows to be there. `exists(folder, plan)` tells shards that were finished.
  4. `finish()` refuses while a byte is missing, then fsync → rename → fsync of the folder.
  5. `write_index(folder, plans)` last, when every shard is finished.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.folder import INDEX
from converters.safetensors_io import DTYPE_NAMES
from l4tool.core.atomic import part_path, publish, write_errors, write_file

DEFAULT_SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8
MAX_PWRITE_BYTES = 2**30


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension (the whole of a scalar)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """One file, whatever its format: `header` at its beginning, each tensor at its offset, `rest` in between or behind.

    `header` never changes, and a file that begins with it and has the planned size is a file of this plan.
    `crc_at`: tensor → offsets of 4-byte little-endian fields in `rest` that take the CRC-32 of its bytes when all are
    there (the ZIP container of `.pth` files).
    """

    file_name: str
    specs: tuple[TensorSpec, ...]
    header: bytes
    starts: dict[str, int] = field(compare=False)  # name → absolute byte offset
    rest: tuple[tuple[int, bytes], ...] = ()  # (absolute offset, bytes)
    crc_at: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        ends = [self.starts[spec.name] + spec.nbytes for spec in self.specs]
        return max([len(self.header), *ends, *(at + len(data) for at, data in self.rest)])


def plan_shards(
    specs: Sequence[TensorSpec],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    together: Callable[[TensorSpec], str] = lambda spec: spec.name,
) -> list[ShardPlan]:
    """Fill shards in the order of `specs`; a tensor larger than `max_shard_bytes` gets a shard of its own.

    Neighbours for which `together` gives the same word (the parts of one quantized Linear) stay in one shard. Inside
    a shard wider dtypes come first, so that every tensor is aligned to its element size, as the safetensors library
    does. Raises ValueError for a name that occurs twice.
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("a tensor name occurs twice")
    groups: list[list[TensorSpec]] = []
    size = 0
    for _, run in itertools.groupby(specs, together):
        parts = list(run)
        nbytes = sum(spec.nbytes for spec in parts)
        if not groups or size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].extend(parts)
        size += nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [_plan(name, group) for name, group in zip(names, groups, strict=True)]


def _plan(file_name: str, group: list[TensorSpec]) -> ShardPlan:
    ordered = sorted(group, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for spec in ordered:
        offsets[spec.name] = end
        shape, dtype = list(spec.shape), DTYPE_NAMES[spec.dtype]
        entries[spec.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    header = len(raw).to_bytes(8, "little") + raw
    return ShardPlan(file_name, tuple(ordered), header, {name: len(header) + at for name, at in offsets.items()})


def exists(folder: Path, plan: ShardPlan, path: Path | None = None) -> bool:
    """True when a file of this very plan is there: same size, same header. `path`: not the finished one but this."""
    path = path or folder / plan.file_name
    try:
        if path.stat().st_size != plan.nbytes:
            return False
        with open(path, "rb") as file:
            return file.read(len(plan.header)) == plan.header
    except OSError:
        return False


class ShardFile:
    """One shard being written under its `.part` name. Thread-safe. Raises WriteError when the disk refuses.

    With `resume`, a `.part` file of the same plan is kept; nothing in it counts as written until `mark` says so.
    """

    def __init__(self, folder: Path, plan: ShardPlan, resume: bool = False) -> None:
        self.plan = plan
        self.path = folder / plan.file_name
        self.part = part_path(self.path)
        self._specs = {spec.name: spec for spec in plan.specs}
        self._written: dict[str, list[tuple[int, int]]] = {spec.name: [] for spec in plan.specs}
        self._lock = threading.Lock()
        with write_errors(self.part):
            self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not (resume and self._matches()):
                    os.ftruncate(self._fd, 0)
                    os.ftruncate(self._fd, plan.nbytes)
                    for at, data in ((0, plan.header), *plan.rest):
                        _pwrite(self._fd, data, at)
            except BaseException:
                os.close(self._fd)
                raise

    def _matches(self) -> bool:
        same_size = os.fstat(self._fd).st_size == self.plan.nbytes
        return same_size and os.pread(self._fd, len(self.plan.header), 0) == self.plan.header

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Put `tensor` (CPU, the planned dtype, planned shape but for the number of rows) at rows row, row+1, ….

        Raises ValueError for a tensor that does not fit the plan or rows that were written before.
        """
        spec = self._specs[name]
        rows = tensor.shape[0] if tensor.dim() else 1
        fits = tensor.dim() == len(spec.shape) and tuple(tensor.shape[1:]) == spec.shape[1:]
        if not fits or tensor.dtype != spec.dtype or tensor.device.type != "cpu":
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} does not fit {spec.shape} {spec.dtype}")
        self.mark(name, row, row + rows)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        with write_errors(self.part):
            _pwrite(self._fd, raw.data, self.plan.starts[name] + row * spec.row_bytes)

    def mark(self, name: str, row: int = 0, stop_row: int | None = None) -> None:
        """Declare rows [row, stop_row) written (by an earlier, interrupted run). Raises ValueError on an overlap."""
        shape = self._specs[name].shape
        num_rows = shape[0] if shape else 1
        stop = num_rows if stop_row is None else stop_row
        if not 0 <= row <= stop <= num_rows:
            raise ValueError(f"{name}: rows {row}..{stop} of {num_rows}")
        with self._lock:
            spans = self._written[name]
            if any(row < other_stop and other_row < stop for other_row, other_stop in spans):
                raise ValueError(f"{name}: rows {row}..{stop} were written before")
            spans.append((row, stop))

    def missing(self) -> list[str]:
        """Names of the tensors that are not completely written yet."""
        with self._lock:
            covered = {name: sum(stop - row for row, stop in spans) for name, spans in self._written.items()}
        return [s.name for s in self.plan.specs if s.nbytes and covered[s.name] != (s.shape[0] if s.shape else 1)]

    def sync(self) -> None:
        """Make everything written so far durable."""
        with write_errors(self.part):
            os.fsync(self._fd)

    def write_crcs(self, crcs: Mapping[str, int]) -> None:
        """Put the tensors' CRC-32 where the plan has fields for them."""
        with write_errors(self.part):
            for name, places in self.plan.crc_at.items():
                for at in places:
                    _pwrite(self._fd, crcs[name].to_bytes(4, "little"), at)

    def finish(self) -> None:
        """Every byte accounted for → fsync → final name → fsync of the folder. Raises ValueError if any is missing."""
        missing = self.missing()
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} tensor(s) are not complete: {', '.join(missing[:5])}")
        self.sync()
        self.close()
        with write_errors(self.path):
            publish(self.part, self.path)

    def close(self) -> None:
        """Give the file back; an unfinished `.part` stays for a later resume."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def write_index(folder: Path, plans: Sequence[ShardPlan]) -> None:
    """`model.safetensors.index.json`: tensor → file, and the total of tensor bytes. Written last."""
    weight_map = {spec.name: plan.file_name for plan in plans for spec in plan.specs}
    total = sum(spec.nbytes for plan in plans for spec in plan.specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`; the kernel may take less than asked in one call."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[:MAX_PWRITE_BYTES], offset)
        view, offset = view[count:], offset + count
