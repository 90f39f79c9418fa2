"""Between stored and canonical tensors: pieces are placed, cut out and turned, as the table's parts say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from converters.names import Part, Row, as_matrix

SMALL = 4096  # elements: below it a compiled kernel gains nothing
PiecesOf = Callable[[str, slice], Iterable[tuple[Part, torch.Tensor]]]


def part_view(stored: torch.Tensor, part: Part) -> torch.Tensor:
    """Stored tensor → the piece `part` of it, canonical orientation, sharing its memory.

    A whole tensor has its canonical shape, a piece is [rows, cols] (of a vector: [rows]).
    """
    height, width = part.stored_size
    if as_matrix(tuple(stored.shape)) == (height, width) and not part.transposed:
        return stored.view(part.shape) if part.is_whole else stored
    matrix = stored.view(as_matrix(tuple(stored.shape)))
    piece = matrix[part.row : part.row + height, part.col : part.col + width]
    piece = piece.T if part.transposed else piece
    if len(part.shape) < 2:
        return piece[:, 0]
    return piece.view(part.shape) if part.is_whole and len(part.shape) > 2 else piece


def join(pieces: Iterable[tuple[Part, torch.Tensor]], rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Canonical rows out of the pieces of one canonical tensor (each `part_view` of its stored tensor).

    A new tensor unless one piece is all of it. Raises ValueError where the pieces leave a gap.
    """
    found = list(pieces)
    whole = Part(found[0][0].name, found[0][0].shape)
    row = Row(whole.name, whole.shape, (whole,))
    return assemble(row, lambda name, asked: found, rows, dtype).reshape(-1, *whole.shape[1:])


def assemble(
    row: Row, pieces_of: PiecesOf, rows: slice, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of the stored tensor `row`, seen as a matrix, out of canonical tensors: [rows, cols].

    `pieces_of(name, rows)` gives pieces of a canonical tensor that cover at least those of its rows. One piece that is
    all of the answer and contiguous is given as it lies; anything else is copied into `out` (a buffer of the answer's
    shape; a new one if None). Raises ValueError where the pieces leave a gap.
    """
    height, width = as_matrix(row.shape)
    top, bottom, _ = rows.indices(height)
    covered = 0
    for part in row.parts:
        high, wide = part.stored_size
        first, last = max(top, part.row), min(bottom, part.row + high)
        if first >= last:
            continue
        asked = _Box(first - part.row, last - part.row, 0, wide)
        asked = (asked.turned() if part.transposed else asked).moved(*_origin(part))
        for piece, tensor in pieces_of(part.name, slice(asked.top, asked.bottom)):
            shared = asked.shared(_box(piece))
            if shared is None:
                continue
            values = shared.moved(*(-at for at in _origin(piece))).cut(_matrix(tensor))
            place = shared.moved(*(-at for at in _origin(part)))
            place = (place.turned() if part.transposed else place).moved(part.row - top, part.col)
            values = values.T if part.transposed else values
            if place == _Box(0, bottom - top, 0, width) and values.dtype == dtype and values.is_contiguous():
                return values
            if out is None:
                out = torch.empty((bottom - top, width), dtype=dtype)
            copy_into(place.cut(out), values)
            covered += values.numel()
    if out is None or covered != out.numel():
        raise ValueError(f"{row.stored}: its parts do not fill rows {top} to {bottom}")
    return out


@dataclass(frozen=True)
class _Box:
    """Rows [top, bottom) and columns [left, right) of a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    def turned(self) -> _Box:
        return _Box(self.left, self.right, self.top, self.bottom)

    def moved(self, down: int, right: int) -> _Box:
        return _Box(self.top + down, self.bottom + down, self.left + right, self.right + right)

    def shared(self, other: _Box) -> _Box | None:
        box = _Box(
            max(self.top, other.top), min(self.bottom, other.bottom),
            max(self.left, other.left), min(self.right, other.right),
        )  # fmt: skip
        return box if box.top < box.bottom and box.left < box.right else None

    def cut(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix[self.top : self.bottom, self.left : self.right]


def _origin(part: Part) -> tuple[int, int]:
    """Canonical (row, column) of the piece's first element."""
    return (part.rows or (0, 0))[0], (part.cols or (0, 0))[0]


def _box(part: Part) -> _Box:
    height, width = part.size
    return _Box(0, height, 0, width).moved(*_origin(part))


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """[n] → [n, 1]; more than two dimensions: the leading ones flattened."""
    return tensor if tensor.dim() == 2 else tensor.reshape(as_matrix(tuple(tensor.shape)))


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """target ← source, [rows, cols] both, any strides; a turned source goes through a kernel that is made for it."""
    turned = source.stride(0) == 1 and source.stride(1) != 1 and target.stride(1) == 1
    if turned and source.dtype == target.dtype and source.numel() >= SMALL:
        from converters.kernels.transpose import turn

        turn(source.T, target)
    else:
        target.copy_(source)
