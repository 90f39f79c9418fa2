"""A checkpoint seen in another layout: tensors as the target stores them, out of whatever layout they lie in."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from converters.names import Row, as_matrix
from converters.reader import Reader, TensorInfo
from converters.transforms import assemble


class LayoutView:
    """The rows of a target, by keys of the caller's, as matrices [rows, cols] (vectors [n]).

    What `converters.writing.stream.Source` asks for: `read` gives a range of rows, uncopied where the reader's file
    holds them that way, else in memory that lies there until the same thread reads again.
    """

    def __init__(self, reader: Reader, rows: Mapping[str, Row]) -> None:
        self._reader, self._rows = reader, rows
        self._infos = reader.tensors()
        self._local = threading.local()

    def info(self, key: str) -> TensorInfo:
        """The target's tensor as a matrix in the source's dtype; its file is where the first of its parts lies.

        Raises ValueError for parts of several dtypes.
        """
        row = self._rows[key]
        parts = [self._infos[part.name] for part in row.parts]
        dtypes = {part.dtype for part in parts}
        if len(dtypes) != 1:
            raise ValueError(f"{row.stored} has parts of {', '.join(sorted(map(str, dtypes)))}")
        dtype = parts[0].dtype
        shape = row.shape if len(row.shape) < 2 else as_matrix(row.shape)
        return TensorInfo(key, shape, dtype, math.prod(shape) * dtype.itemsize, parts[0].file)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Rows of the matrix; [n] of a vector."""
        row = self._rows[name]
        height, width = as_matrix(row.shape)
        top, bottom, _ = (rows or slice(None)).indices(height)
        dtype = self._infos[row.parts[0].name].dtype
        out = self._buffer((bottom - top, width), dtype)
        found = assemble(row, self._reader.pieces, slice(top, bottom), dtype, out)
        return found[:, 0] if len(row.shape) == 1 else found.reshape(()) if not row.shape else found

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """This thread's memory, used again and again: fresh pages would cost more than the copy."""
        nbytes = math.prod(shape) * dtype.itemsize
        held: torch.Tensor | None = getattr(self._local, "held", None)
        if held is None or held.nbytes < nbytes:
            held = self._local.held = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(shape)

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        """Ask for the parts that begin in these rows."""
        for part in self._rows[name].parts:
            if rows is None or rows.start <= part.row < rows.stop:
                self._reader.prefetch(part.name)

    def release(self, name: str) -> None:
        for part in self._rows[name].parts:
            self._reader.release(part.name)

    def forget(self, file: Path) -> None:
        """Nothing: rows of one file of the target may need several of the source, in any order."""
