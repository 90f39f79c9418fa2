"""A reader for layouts that cut tensors over files, or give their files other headers than safetensors'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from converters.folder import shorten
from converters.mapped import MappedFile, StoredTensor
from converters.names import Part, Row
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from converters.safetensors_io import DTYPE_NAMES
from converters.transforms import join, part_view
from l4tool.core.arch import Arch
from l4tool.core.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Source:
    """One file and what it must hold. `drops`: True for the name of a tensor that is left out on purpose."""

    file: MappedFile
    rows: Sequence[Row]
    drops: Callable[[str], bool] = lambda name: False


@dataclass(frozen=True)
class _Piece:
    """Where a piece lies. `part` says which rows and columns of the canonical tensor it is."""

    part: Part
    file: MappedFile
    stored: StoredTensor


class PieceReader(Reader):
    """See `converters.reader.Reader`. Tensors may lie in pieces; what files repeat is read from the first of them.

    `allowed`: dtypes besides the checkpoint's that a stored tensor of this name may have. `made`: makes the files
    beside the weights in Hugging Face's form. Raises CheckpointError for tensors that are missing, unknown, or of other
    shapes or dtypes than `sources` say, and for repeated ones that differ.
    """

    quantization: dict[str, Any] | None = None

    def __init__(
        self,
        path: Path,
        layout: str,
        arch: Arch,
        config: dict[str, Any],
        sources: Sequence[Source],
        made: Callable[[], dict[str, bytes]],
        side_files: Sequence[Path],
        allowed: Callable[[str], tuple[torch.dtype, ...]] = lambda name: (),
    ) -> None:
        self.path, self.layout, self.arch, self.config = path, layout, arch, config
        self.dtype: torch.dtype = getattr(torch, arch.dtype)
        self._sources, self._made, self._side_files = sources, made, list(side_files)
        for source in sources:
            _check(source, lambda name: (self.dtype, *allowed(name)))
        self._where = _places(sources)
        self._infos = {name: self._info(name, pieces) for name, pieces in self._where.items()}

    def _info(self, name: str, pieces: list[_Piece]) -> TensorInfo:
        shape, first = pieces[0].part.shape, pieces[0]
        dtype = self.dtype_of(first.stored)
        return TensorInfo(name, shape, dtype, math.prod(shape) * dtype.itemsize, first.file.path)

    def dtype_of(self, stored: StoredTensor) -> torch.dtype:
        """The dtype that `read` gives for a stored tensor."""
        return stored.dtype

    def values(self, piece: Part, stored: StoredTensor, view: torch.Tensor) -> torch.Tensor:
        """What the view of a piece means: itself, for who stores plain floats."""
        return view

    def tensors(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Zero-copy where one piece is enough, else a new tensor of the rows asked for. KeyError if unknown."""
        wanted = slice(*(rows or slice(None)).indices(self._infos[name].shape[0])[:2])
        return join(self.pieces(name, wanted), wanted, self._infos[name].dtype)

    def pieces(self, name: str, rows: slice) -> list[tuple[Part, torch.Tensor]]:
        """The pieces that these rows touch, each cut to them."""
        found = []
        for piece in self._where[name]:
            part, view = _narrow(piece.part, part_view(piece.file.view(piece.stored.name), piece.part), rows)
            if view is not None:
                found.append((part, self.values(part, piece.stored, view)))
        return found

    def extent(self, name: str) -> Extent:
        """Where a tensor lies that is stored whole and untransposed. Raises UsageError for any other."""
        pieces = self._where[name]
        if len(pieces) > 1 or pieces[0].part.transposed or pieces[0].stored.shape != pieces[0].part.shape:
            raise UsageError(
                f"{self.path} cannot be used as it is: {name} lies there in pieces",
                hint=f"first: l4tool convert {self.path} -o OUT --to hf",
            )
        stored = pieces[0].stored
        return Extent(stored.file, stored.start, stored.stop)

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        stored = self._where[name][0].stored
        return raw.view(stored.dtype).view(stored.shape)

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        if rows is None or not rows.start:
            for piece in self._where[name]:
                piece.file.prefetch(*_bytes(piece))

    def release(self, name: str) -> None:
        for piece in self._where[name]:
            piece.file.release(*_bytes(piece))

    def linear_format(self, prefix: str) -> LinearFormat | None:
        return None

    def stored_name(self, name: str) -> str:
        """What the files call the tensor that holds the canonical one. KeyError if unknown."""
        return self._where[name][0].stored.name

    def mapped_files(self) -> dict[Path, MappedFile]:
        return {source.file.path: source.file for source in self._sources}

    def stored_tensors(self) -> list[StoredTensor]:
        """Every tensor as the files have it, in their order."""
        return [t for source in self._sources for t in sorted(source.file.tensors.values(), key=lambda t: t.start)]

    def side_files(self) -> list[Path]:
        return self._side_files

    @cached_property
    def _made_files(self) -> dict[str, bytes]:
        return self._made()

    def made_files(self) -> dict[str, bytes]:
        return self._made_files

    def weight_files(self) -> list[Path]:
        return sorted(source.file.path for source in self._sources)

    def forget(self, file: Path) -> None:
        for source in self._sources:
            if source.file.path == file:
                source.file.close()

    def close(self) -> None:
        for source in self._sources:
            source.file.close()


def _check(source: Source, allowed: Callable[[str], tuple[torch.dtype, ...]]) -> None:
    """One file against its rows."""
    file, expected = source.file, {row.stored: row for row in source.rows}
    missing = [name for name, row in expected.items() if name not in file.tensors and row.required]
    if missing:
        raise CheckpointError(
            f"{file.path} lacks {len(missing)} tensor(s) of this architecture: {shorten(missing)}",
            hint="the file is incomplete, or belongs to another model",
        )
    unknown = [name for name in file.tensors if name not in expected and not source.drops(name)]
    if unknown:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} tensor(s) that this architecture does not have: {shorten(unknown)}",
            hint="the file belongs to another model, or to a kind of checkpoint that this version does not know",
        )
    for name, row in expected.items():
        stored = file.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != row.shape:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {list(stored.shape)}, it must be {list(row.shape)}"
            )
        if stored.dtype not in allowed(name):
            names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed(name))
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is {DTYPE_NAMES[stored.dtype]}, the others are {names}"
            )


def _places(sources: Sequence[Source]) -> dict[str, list[_Piece]]:
    """Canonical name → its pieces; a whole tensor that several files repeat is checked to be equal in all."""
    where: dict[str, list[_Piece]] = {}
    for source in sources:
        for row in source.rows:
            for part in row.parts if row.stored in source.file.tensors else ():
                where.setdefault(part.name, []).append(_Piece(part, source.file, source.file.tensors[row.stored]))
    for name, pieces in where.items():
        if len(pieces) > 1 and all(piece.part.is_whole for piece in pieces):
            _require_equal(name, pieces)
            where[name] = pieces[:1]
    return where


def _require_equal(name: str, pieces: list[_Piece]) -> None:
    first = pieces[0].file.view(pieces[0].stored.name).contiguous().view(-1).view(torch.uint8)
    for piece in pieces[1:]:
        other = piece.file.view(piece.stored.name).contiguous().view(-1).view(torch.uint8)
        if not torch.equal(first, other):
            raise CheckpointError(
                f"{piece.file.path}: tensor {piece.stored.name!r} differs from that of {pieces[0].file.path.name}, "
                "every file must hold the same",
                hint="the files are not of one checkpoint: download or convert them again",
            )


def _narrow(part: Part, view: torch.Tensor, rows: slice) -> tuple[Part, torch.Tensor | None]:
    """A piece cut to the canonical rows that are wanted; None where it has none of them."""
    top, bottom = part.rows or (0, part.shape[0] if part.shape else 1)
    first, last = max(top, rows.start), min(bottom, rows.stop)
    if first >= last:
        return part, None
    if (first, last) == (top, bottom) or not part.shape:
        return part, view
    return replace(part, rows=(first, last)), view[first - top : last - top]


def _bytes(piece: _Piece) -> tuple[int, int]:
    """File bytes of a piece: of its rows where it takes whole rows of the stored tensor, else of all of it."""
    stored, part = piece.stored, piece.part
    width = stored.shape[-1] if len(stored.shape) > 1 else 1
    height, wide = part.stored_size
    if wide != width:
        return stored.start, stored.stop
    row_bytes = width * stored.dtype.itemsize
    return stored.start + part.row * row_bytes, stored.start + (part.row + height) * row_bytes
